"""Training after pretraining: few-step distillation, and preference."""
