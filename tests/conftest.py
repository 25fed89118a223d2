"""Fixtures shared by the tests of the row engine, and how programs are compiled for them."""

import contextlib
import gc
import itertools
import os
from pathlib import Path
from typing import Any

import jax
import pytest
from jax._src import compiler

import graphs
import quick

_default_options = compiler.get_compile_options


def _quick_options(*args: Any, env_options_overrides: Any = None, backend: Any, **others: Any):
    """JAX has no setting for the compiler options of every program."""
    if backend.platform == "cpu":
        env_options_overrides = {**quick.OPTIONS, **(env_options_overrides or {})}
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


@pytest.fixture
def quick_processes(monkeypatch):
    """Processes that the test starts compile as quickly as this one."""
    jax.devices()  # XLA has read its flags then: for this process they stay what they were
    flags = f"{quick.FLAGS} {os.environ.get('XLA_FLAGS', '')}".strip()
    monkeypatch.setenv("XLA_FLAGS", flags)


def pytest_configure(config):
    # Tracing makes so many objects that Python looks for cycles all the time.
    gc.set_threshold(50_000, 20, 100)
    if "not slow" in config.option.markexpr:
        # Rules are tested under two strategies: OverL runs steps as 2PS does.
        graphs.STRATEGIES = ("stream", "2ps")


# Every compiled program maps memory, and a process may have 65,530 mappings (Linux's default); LLVM
# aborts when there is none left, after about 1,500 tests.
MOST_MAPPINGS = 20_000
MAPPINGS = Path("/proc/self/maps")
TESTS = itertools.count(1)


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown(item):
    """Forget compiled programs where there are many. Counting takes long, hence now and then."""
    if next(TESTS) % 10 or not MAPPINGS.exists():
        return
    if MAPPINGS.read_bytes().count(b"\n") > MOST_MAPPINGS:
        jax.clear_caches()
        gc.collect()


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session):
    """What follows looks for cycles five times and more, among all that is left."""
    gc.freeze()


@pytest.fixture
def x64():
    """Double precision, for this test only."""
    with jax.enable_x64(True):
        yield
