"""Fixtures shared by the tests of the row engine, and how programs are compiled for them."""

import contextlib
import gc
from pathlib import Path
from typing import Any

import jax
import pytest
from jax._src import compiler

import graphs

# A test runs a program once. Without LLVM's optimisations XLA:CPU compiles it in half the time, and
# with its older emitters, which it has until jax 0.11, in an eighth (a gradient by rows of two
# convolutions: 1.06 s, 0.60 s, 0.12 s).
QUICK_COMPILE = {
    "xla_backend_optimization_level": 0,
    "xla_llvm_disable_expensive_passes": True,
}
if jax.__version_info__ < (0, 11):
    QUICK_COMPILE |= {
        "xla_cpu_use_fusion_emitters": False,
        "xla_cpu_parallel_codegen_split_count": 1,
    }

_default_options = compiler.get_compile_options


def _quick_options(*args: Any, env_options_overrides: Any = None, backend: Any, **others: Any):
    """JAX has no setting for the compiler options of every program."""
    if backend.platform == "cpu":
        env_options_overrides = {**QUICK_COMPILE, **(env_options_overrides or {})}
    return _default_options(
        *args, env_options_overrides=env_options_overrides, backend=backend, **others
    )


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item):
    """Before any fixture compiles something."""
    as_users_do = item.get_closest_marker("users_compiler") is not None
    compiler.get_compile_options = _default_options if as_users_do else _quick_options


def _options_without_fusions(*args: Any, env_options_overrides: Any = None, **others: Any):
    env_options_overrides = {"xla_disable_hlo_passes": "fusion", **(env_options_overrides or {})}
    return _default_options(*args, env_options_overrides=env_options_overrides, **others)


@pytest.fixture
def users_compiler():
    """A context in which programs are compiled as users' are, those compiled before too."""

    @contextlib.contextmanager
    def as_users_do(*, without_fusions: bool = False):
        options = compiler.get_compile_options
        compiler.get_compile_options = (
            _options_without_fusions if without_fusions else _default_options
        )
        jax.clear_caches()
        try:
            yield
        finally:
            compiler.get_compile_options = options
            jax.clear_caches()

    return as_users_do


def pytest_configure(config):
    """Without slow tests rules are tested under two strategies: OverL runs steps as 2PS does."""
    if "not slow" in config.option.markexpr:
        graphs.STRATEGIES = ("stream", "2ps")


# Every compiled program maps memory, and a process may have 65,530 mappings (Linux's default); LLVM
# aborts when there is none left, after about 1,500 tests.
MOST_MAPPINGS = 20_000
MAPPINGS = Path("/proc/self/maps")


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown(item):
    """Forget compiled programs where there are many."""
    if MAPPINGS.exists() and MAPPINGS.read_bytes().count(b"\n") > MOST_MAPPINGS:
        jax.clear_caches()
        gc.collect()


@pytest.fixture
def x64():
    """Double precision, for this test only."""
    with jax.enable_x64(True):
        yield
