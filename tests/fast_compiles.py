"""Flags with which XLA compiles for CPUs in two thirds of the time, into slower programs."""

from importlib.metadata import version

FAST_COMPILES = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
if version("jaxlib").startswith("0.10."):  # a flag that XLA does not know ends the process
    FAST_COMPILES += " --xla_cpu_use_fusion_emitters=false"
