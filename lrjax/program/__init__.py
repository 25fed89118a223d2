"""Functions as flat programs: tracing, inlining, constants, and what depends on JAX's version."""
