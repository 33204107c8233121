"""A config and a TPU topology -> every stage's train step, compiled on a machine without a TPU."""
