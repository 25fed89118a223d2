"""Compiler options of the tests: a test runs a program once.

Without LLVM's optimisations XLA:CPU compiles it in half the time, and with its older emitters,
which it has until jax 0.11, in an eighth (a gradient by rows of two convolutions: 1.06 s, 0.60 s,
0.12 s).
"""

import jax

OPTIONS = {
    "xla_backend_optimization_level": 0,
    "xla_llvm_disable_expensive_passes": True,
}
if jax.__version_info__ < (0, 11):
    OPTIONS |= {
        "xla_cpu_use_fusion_emitters": False,
        "xla_cpu_parallel_codegen_split_count": 1,
    }

# The same for a process of its own: a value of XLA_FLAGS.
FLAGS = " ".join(f"--{name}={str(value).lower()}" for name, value in OPTIONS.items())
