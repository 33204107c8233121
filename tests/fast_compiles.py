"""Flags with which XLA compiles for CPUs in two thirds of the time, into slower programs."""

from importlib.metadata import version

FAST_COMPILES = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
METADATA = ("invariant_load", "alias_scope", "noalias")
if version("jaxlib").startswith("0.10."):  # flags that XLA does not know end the process
    FAST_COMPILES += " --xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
    FAST_COMPILES += "".join(f" --xla_llvm_enable_{name}_metadata=false" for name in METADATA)
