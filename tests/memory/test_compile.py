"""Compiling for a device that is not there."""

import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

from lrjax.memory import TARGETS, GpuTarget, compile_for, peak_bytes, temp_bytes
from lrjax.memory import compile as compiling
from marks import COMPILES_FOR_H200

pytestmark = pytest.mark.users_compiler

MIB = 2**20
GPUS = [t.name for t in TARGETS.values() if isinstance(t, GpuTarget) and t.is_in_cuda13]


def matmul_chain(x, y):
    return jnp.sin(x @ y) @ y


@pytest.fixture
def square():
    return jax.ShapeDtypeStruct((1024, 1024), jnp.float32)  # 4 MiB


class TestForATarget:
    pytestmark = COMPILES_FOR_H200

    @pytest.mark.parametrize("target", GPUS)
    def test_peak_holds_arguments_output_and_temporary(self, square, target):
        compiled = compile_for(matmul_chain, square, square, target=target)
        assert 4 * MIB <= temp_bytes(compiled) < 16 * MIB
        assert peak_bytes(compiled) >= 3 * 4 * MIB + 4 * MIB

    def test_donated_argument_is_not_counted_twice(self, square):
        plain = compile_for(jnp.sin, square)
        donated = compile_for(jnp.sin, square, donate_argnums=0)
        assert peak_bytes(plain) - peak_bytes(donated) == pytest.approx(4 * MIB, rel=0.01)

    @pytest.mark.parametrize("position", [1, -1])
    def test_static_argument_stays_a_python_value(self, square, position):
        compiled = compile_for(lambda x, n: x * len(range(n)), square, 3, static_argnums=position)
        assert peak_bytes(compiled) >= 2 * 4 * MIB

    def test_arrays_scalars_and_keys_do_as_arguments(self):
        compiled = compile_for(
            lambda tree, key: jax.random.normal(key, tree["x"].shape) * tree["scale"],
            {"x": jnp.ones(3), "scale": 2.0},
            jax.random.key(0),
        )
        assert peak_bytes(compiled) > 0

    @pytest.mark.slow
    def test_nothing_on_stderr_without_a_driver(self):
        script = (
            "import jax, jax.numpy as jnp\n"
            "from lrjax.memory import compile_for\n"
            "compile_for(jnp.sin, jax.ShapeDtypeStruct((8,), jnp.float32), target='h200')\n"
        )
        environment = {k: v for k, v in os.environ.items() if k != "JAX_PLATFORMS"}
        process = subprocess.run(
            [sys.executable, "-c", script], env=environment, capture_output=True, text=True
        )
        assert process.returncode == 0, process.stderr
        assert process.stderr == ""


def test_unknown_target_is_named(square):
    with pytest.raises(ValueError, match="h200x"):
        compile_for(jnp.sin, square, target="h200x")


def test_missing_plugin_gives_the_install_command(square, monkeypatch):
    compiling._stand_in.cache_clear()
    monkeypatch.setattr(compiling, "is_installed", lambda target: False)
    with pytest.raises(ImportError, match=r'pip install "jax\[cuda13\]==' + jax.__version__):
        compile_for(jnp.sin, square)


def test_plugin_that_did_not_load_is_told_from_a_missing_one(square, monkeypatch):
    def no_topology(*args, **kwargs):
        raise NotImplementedError

    compiling._stand_in.cache_clear()
    monkeypatch.setattr(compiling, "is_installed", lambda target: True)
    monkeypatch.setattr(compiling.topologies, "get_topology_desc", no_topology)
    with pytest.raises(ImportError, match="JAX_PLATFORMS=cpu"):
        compile_for(jnp.sin, square)


def test_peak_on_cpu_counts_temporaries(square):
    compiled = jax.jit(lambda x: jnp.linalg.qr(x)[0] @ x).lower(square).compile()
    assert peak_bytes(compiled) >= temp_bytes(compiled) > 0


def test_peak_on_cpu_counts_small_temporaries_too():
    rows = jax.ShapeDtypeStruct((8192, 256), jnp.float32)  # 8 MiB; the temporary is 256 KiB
    compiled = jax.jit(lambda x: jnp.sin(x.T @ x) @ x.T).lower(rows).compile()
    assert temp_bytes(compiled) > 0
    assert peak_bytes(compiled) == pytest.approx(2 * 8 * MIB + temp_bytes(compiled), abs=4096)
