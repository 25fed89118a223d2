"""Profiles of functions: XLA's own figure, every byte explained, and clear answers to bad input."""

import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.experimental.compilation_cache import compilation_cache

import lrjax
from lrjax import memory
from lrjax.memory import compile as compiling
from lrjax.memory import profiling

pytestmark = pytest.mark.users_compiler

MIB = 2**20


def needs(target):
    return pytest.mark.skipif(
        not memory.is_installed(target), reason=f"needs {compiling.install_command(target)}"
    )


ON_TARGETS = [
    "cpu",
    pytest.param("rtx3090", marks=[needs("rtx3090"), pytest.mark.cuda]),
    pytest.param("tpu-v5e", marks=needs("tpu-v5e")),
]

MATRIX = jax.ShapeDtypeStruct((1024, 1024), jnp.float32)  # 4 MiB


def chain(x, y):
    with jax.named_scope("first"):
        x = jnp.sin(x @ y)
    with jax.named_scope("second"):
        return x @ y


def two_convolutions(kernels, images):
    x = images
    for i, kernel in enumerate(kernels):
        with jax.named_scope(f"conv{i}"):
            x = lax.conv_general_dilated(
                x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
            )
            x = jax.nn.relu(x)
    return jnp.sum(x**2)


CONVOLUTIONS = (
    [jax.ShapeDtypeStruct((3, 3, 8, 8), jnp.float32)] * 2,
    jax.ShapeDtypeStruct((1, 256, 64, 8), jnp.float32),
)


class TestProfile:
    @pytest.mark.parametrize("target", ON_TARGETS)
    def test_peak_is_what_xla_says_and_fully_explained(self, target):
        profile = memory.profile(chain, MATRIX, MATRIX, target=target)
        by_hand = memory.compile_for(chain, MATRIX, MATRIX, target=target)
        assert profile.peak_bytes == memory.peak_bytes(by_hand) >= 12 * MIB
        assert profile.argument_bytes == 8 * MIB
        assert profile.output_bytes == 4 * MIB
        assert sum(b.bytes for b in profile.at_peak()) == profile.peak_bytes
        assert profile.fits
        assert {"first", "(arguments)"} <= {b.layer for b in profile.buffers}

    def test_default_target_is_the_device_at_hand(self):
        profile = memory.profile(chain, MATRIX, MATRIX)
        assert profile.target == jax.devices()[0].device_kind
        assert profile == memory.profile(chain, np.ones(MATRIX.shape, np.float32), MATRIX)

    def test_donated_argument_is_counted_once(self):
        plain = memory.profile(jnp.sin, MATRIX)
        donated = memory.profile(jnp.sin, MATRIX, donate_argnums=0)
        assert plain.peak_bytes - donated.peak_bytes == pytest.approx(4 * MIB, rel=0.01)
        assert donated.alias_bytes == 4 * MIB
        assert sum(b.bytes for b in donated.at_peak()) == donated.peak_bytes

    def test_static_argument(self):
        profile = memory.profile(lambda x, n: jnp.concatenate([x] * n), MATRIX, 3, static_argnums=1)
        assert profile.output_bytes == 12 * MIB

    def test_largest_first_at_the_peak_and_totals_agree(self):
        profile = memory.profile(jax.grad(two_convolutions), *CONVOLUTIONS, target="cpu")
        sizes = [b.bytes for b in profile.at_peak()]
        assert sizes == sorted(sizes, reverse=True)
        assert sum(profile.by_layer().values()) == sum(sizes) == max(profile.timeline())
        assert len({b.name for b in profile.buffers}) == len(profile.buffers)

    def test_prints_a_summary_that_fits_a_screen(self):
        profile = memory.profile(jax.grad(two_convolutions), *CONVOLUTIONS, target="cpu")
        lines = str(profile).splitlines()
        assert len(lines) <= 36
        assert max(map(len, lines)) <= 160
        largest = profile.at_peak()[0]
        for part in ("cpu: peak", ", fits", "parameter gradients", "conv1", largest.name[:30]):
            assert part in str(profile)
        assert len(repr(profile)) < 120
        assert len(repr(memory.compare({"column": profile}))) < 120
        assert "MiB" in str(memory.compare({"column": profile})).splitlines()[0]

    def test_json_round_trip(self):
        profile = memory.profile(chain, MATRIX, MATRIX, target="cpu")
        assert memory.MemoryProfile.from_json(profile.to_json()) == profile

    @pytest.mark.parametrize("text", ["", "[]", "{}", '{"format": "lrjax memory profile"}'])
    def test_other_json_is_refused(self, text):
        with pytest.raises(ValueError, match="lrjax memory profile"):
            memory.MemoryProfile.from_json(text)


class TestRowLoops:
    """lrjax's own programs: the layers survive, and line buffers are known for what they are."""

    @pytest.mark.parametrize("strategy", ["stream", "2ps", "overl"])
    def test_layers_of_the_original_function(self, strategy):
        way = lrjax.rowwise(two_convolutions, in_axes=(None, 1), num_blocks=8, strategy=strategy)
        profile = memory.profile(jax.grad(way), *CONVOLUTIONS, target="cpu")
        layers = profile.by_layer()
        explained = sum(layers.get(name, 0) for name in ("conv0", "conv1", "(arguments)"))
        assert explained >= 0.95 * profile.peak_bytes
        assert min(layers["conv0"], layers["conv1"]) > 0
        lines = [b for b in profile.buffers if b.kind == "line buffers" and b.bytes >= 4096]
        assert bool(lines) == (strategy != "overl")
        maps = [b for b in lines if len(b.shape) == 4]  # small sums, a vector, start like lines
        assert all(b.shape[1] < 256 for b in maps)  # never the image's height

    def test_source_lines_are_the_functions_own(self):
        way = lrjax.rowwise(two_convolutions, in_axes=(None, 1), num_blocks=8)
        profile = memory.profile(jax.grad(way), *CONVOLUTIONS, target="cpu")
        here = [b for b in profile.at_peak() if "test_profile.py:" in b.source]
        assert sum(b.bytes for b in here) >= 0.5 * (profile.peak_bytes - profile.argument_bytes)


class TestTargets:
    def test_every_target_is_listed_with_memory_and_command(self):
        listed = {t.name: t for t in memory.targets()}
        assert list(listed) == list(memory.TARGETS)
        assert {"cpu", "h200", "a100-40gb", "l4", "v100", "tpu-v4", "tpu-v6e"} <= set(listed)
        assert listed["rtx3090"].memory_bytes == 24 * 2**30
        assert all(t.memory_bytes > 2**30 for t in listed.values())
        assert listed["cpu"].install == ""
        assert listed["h200"].install == f'pip install "jax[cuda13]=={jax.__version__}"'
        assert listed["tpu-v5p"].install == f'pip install "jax[tpu]=={jax.__version__}"'
        assert "cuda12" in listed["v100"].install  # CUDA 13 has dropped it

    def test_unknown_target_names_the_nearest(self):
        with pytest.raises(ValueError, match="Did you mean 'tpu-v5e'"):
            memory.profile(jnp.sin, MATRIX, target="tpuv5e")

    @pytest.mark.parametrize("target", ["h200", "tpu-v5e"])
    def test_missing_plugin_gives_the_command(self, target, monkeypatch):
        compiling._stand_in.cache_clear()
        monkeypatch.setattr(compiling, "is_installed", lambda name: False)
        command = compiling.install_command(target).replace("[", r"\[")
        with pytest.raises(ImportError, match=command):
            memory.profile(jnp.sin, MATRIX, target=target)

    @needs("tpu-v5e")
    def test_program_too_large_for_a_tpu(self):
        huge = jax.ShapeDtypeStruct((2**16, 2**16), jnp.float32)  # 16 GiB
        with pytest.raises(memory.DoesNotFitError, match=r"tpu-v5e.*15\.75G"):
            memory.profile(chain, huge, huge, target="tpu-v5e")

    @pytest.mark.slow
    @needs("h200")
    @needs("tpu-v5e")
    def test_nothing_on_stderr_without_devices(self):
        script = (
            "import jax, jax.numpy as jnp\n"
            "from lrjax import memory\n"
            "x = jax.ShapeDtypeStruct((512, 512), jnp.float32)\n"
            "for target in (None, 'cpu', 'h200', 'tpu-v5e', 'tpu-v6e'):\n"
            "    assert memory.profile(lambda x: jnp.sin(x @ x), x, target=target).fits\n"
            "huge = jax.ShapeDtypeStruct((2**17, 2**17), jnp.bfloat16)\n"
            "assert not memory.profile(jnp.sin, huge, target='rtx3080').fits\n"
        )
        environment = {k: v for k, v in os.environ.items() if k != "JAX_PLATFORMS"}
        process = subprocess.run(
            [sys.executable, "-c", script], env=environment, capture_output=True, text=True
        )
        assert process.returncode == 0, process.stderr
        assert process.stderr == ""


class TestBadInput:
    def test_function_that_fails_to_trace_raises_its_own_error(self, capfd):
        def broken(x):
            raise KeyError("mine")

        with pytest.raises(KeyError, match="mine"):
            memory.profile(broken, MATRIX, target="cpu")

    @pytest.mark.parametrize("argument", ["text", object(), {"a": "text"}])
    def test_argument_without_shape_is_named(self, argument):
        with pytest.raises(TypeError, match=r"argument 1 has no shape.*static_argnums"):
            memory.profile(lambda x, y: x, MATRIX, argument, target="cpu")

    def test_no_dump_is_an_error_of_ours(self, monkeypatch):
        def nothing(path):
            raise FileNotFoundError("nothing there")

        monkeypatch.setattr(profiling, "read_dump", nothing)
        with pytest.raises(RuntimeError, match=f"jax {jax.__version__}.*nothing there"):
            memory.profile(jnp.sin, MATRIX, target="cpu")

    @pytest.mark.parametrize("save", ["save_png", "save_html"])
    def test_unwritable_path_leaves_nothing(self, save, tmp_path):
        profile = memory.profile(jnp.sin, MATRIX, target="cpu")
        with pytest.raises(OSError, match="missing"):
            getattr(profile, save)(tmp_path / "missing" / "picture")
        assert list(tmp_path.iterdir()) == []


class TestComparison:
    def test_rows_are_measured_by_the_first(self):
        profiles = {
            "one": memory.profile(jnp.sin, MATRIX, target="cpu"),
            "two": memory.profile(chain, MATRIX, MATRIX, target="cpu"),
        }
        rows = memory.compare(profiles).rows()
        assert [row["name"] for row in rows] == ["one", "two"]
        assert rows[0]["ratio"] == 1
        assert rows[1]["ratio"] == profiles["two"].peak_bytes / profiles["one"].peak_bytes
        text = str(memory.compare(profiles))
        assert "arguments" in text
        assert f"{rows[1]['peak_bytes'] / MIB:,.0f}" in text

    def test_nothing_to_compare(self):
        with pytest.raises(ValueError, match="empty"):
            memory.compare({})


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="resident memory is read from /proc")
def test_measured_memory_is_what_was_predicted():
    def large(tree, n):  # 640 MiB, and the same turned round: nothing that a library computes
        rows = lax.optimization_barrier(jnp.outer(jnp.arange(n, dtype=jnp.float32), tree["x"]))
        return rows[::-1]

    tree = {"x": jnp.ones(2 * MIB)}
    measured = memory.measure(large, tree, 80, static_argnums=1)
    assert measured.source == "rss"
    assert measured.predicted_bytes > 500 * MIB
    assert measured.ratio == pytest.approx(1, abs=0.15)


def test_a_program_in_the_compilation_cache_is_compiled_again(tmp_path):
    """JAX asks once whether there is a cache, at the first compilation."""
    changed = {
        "jax_compilation_cache_dir": str(tmp_path),
        "jax_persistent_cache_min_compile_time_secs": 0.0,
        "jax_persistent_cache_min_entry_size_bytes": -1,
    }
    before = {name: getattr(jax.config, name) for name in changed}
    compilation_cache.reset_cache()
    try:
        for name, value in changed.items():
            jax.config.update(name, value)
        fun, x = jax.grad(lambda x: jnp.sin(x).sum()), jnp.ones((64, 64))
        jax.jit(fun)(x)
        assert list(tmp_path.iterdir())
        first, second = (lrjax.memory.profile(fun, x, target="cpu").peak_bytes for _ in range(2))
        assert first == second > 0
        assert jax.config.jax_enable_compilation_cache
    finally:
        for name, value in before.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()
