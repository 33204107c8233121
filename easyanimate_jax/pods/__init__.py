"""Compile or predict the train steps of a config for a pod, on a machine without it."""
