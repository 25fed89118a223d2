"""``lrjax memory``: what it prints and writes, its statuses, and what it says of bad input."""

import jax
import jax.numpy as jnp
import pytest
from typer.testing import CliRunner

from lrjax import memory
from lrjax.app.cli import app
from lrjax.app.profiling import parse_arguments
from marks import COMPILES_FOR_H200

MIB = 2**20
SMALL = ("--width", "0.03125", "--image", "64", "--target", "cpu")


def invoke(*arguments):
    return CliRunner().invoke(app, ["memory", *map(str, arguments)])


@pytest.fixture
def module(tmp_path, monkeypatch):
    """``shapes:twice`` and ``shapes:broken``, importable from the current directory."""
    (tmp_path / "shapes.py").write_text(
        "import jax.numpy as jnp\n"
        "def twice(tree, y): return jnp.sin(tree['x'] @ y) @ y\n"
        "def broken(x): raise KeyError('mine')\n"
        "def named(x, *, scale): return x * scale\n"
        "def text(x): return 'text'\n"
        "const = 3\n"
    )
    (tmp_path / "unwell.py").write_text("raise ValueError('not today')\n")
    (tmp_path / "no_python.py").write_text("def f(:\n")
    (tmp_path / "needs_more.py").write_text("import not_installed_anywhere\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


def test_function_with_a_pytree_and_every_file(module):
    result = invoke(
        *("shapes:twice", "--args", '[{"x": "f32[512,512]"}, "f32[512,512]"]', "--target", "cpu"),
        *("--json", "p.json", "--png", "p.png", "--html", "p.html"),
    )
    assert result.exit_code == 0, result.output
    profile = memory.MemoryProfile.from_json((module / "p.json").read_text())
    assert profile.argument_bytes == 2 * MIB
    assert f"peak {profile.peak_bytes / MIB:,.0f} MiB" in result.output
    assert "step intermediates" in result.output
    assert (module / "p.png").read_bytes().startswith(b"\x89PNG")
    assert "<html" in (module / "p.html").read_text()


class TestTime:
    pytestmark = COMPILES_FOR_H200

    @pytest.mark.parametrize("timed", [False, True])
    def test_is_in_the_text_and_on_the_page_where_it_is_asked_for(self, module, timed):
        result = invoke(
            *("shapes:twice", "--args", '[{"x": "f32[64,64]"}, "f32[64,64]"]', "--target", "h200"),
            *("--html", "p.html", *(["--time"] if timed else [])),
        )
        assert result.exit_code == 0, result.output
        assert ("launches" in result.output) == timed
        page = (module / "p.html").read_text()
        assert ('"time":null' in page, "matrix product" in page) == (not timed, timed)


class TestDevices:
    pytestmark = COMPILES_FOR_H200

    @pytest.mark.slow
    def test_figures_are_those_of_one_of_the_devices(self):
        call = ("--model", "vgg16", "--width", "0.03125", "--image", "256x32", "--target", "h200")
        result = invoke(*call, "--strategy", "stream", "--num-blocks", 1, "--devices", 8)
        assert result.exit_code == 0, result.output
        assert "on each of 8 devices" in result.output
        assert "collective-permute: " in result.output


def test_devices_that_do_not_fit(module):
    for given, message in (
        (("--model", "vgg16", *SMALL, "--devices", 0), "devices: got 0; use 1 or more"),
        (("--model", "vgg16", *SMALL, "--devices", 4096), "wants 4096 devices and there"),
        (("shapes:twice", "--target", "h200", "--devices", 2), "which of its arguments carry rows"),
    ):
        result = invoke(*given)
        assert result.exit_code == 2, result.output
        assert message in result.output.replace("\n", " ")


@pytest.mark.slow
def test_model_by_column():
    result = invoke("--model", "vgg16", *SMALL)
    assert result.exit_code == 0, result.output
    assert "VGG16/features" in result.output
    assert "line buffers" not in result.output


@pytest.mark.slow
def test_model_under_a_strategy():
    result = invoke("--model", "vgg16", *SMALL, "--strategy", "stream", "--num-blocks", 4)
    assert result.exit_code == 0, result.output
    assert "line buffers" in result.output


def test_what_does_not_fit_ends_with_status_3(module, monkeypatch):
    monkeypatch.setattr(memory.CpuTarget, "memory_bytes", property(lambda self: 4 * MIB))
    result = invoke(
        *("shapes:twice", "--target", "cpu"),
        *("--args", '[{"x": "f32[1024,1024]"}, "f32[1024,1024]"]'),
    )
    assert result.exit_code == 3, result.output
    assert "does not fit" in result.output


def test_targets_are_listed():
    result = invoke("--list-targets")
    assert result.exit_code == 0, result.output
    assert all(name in result.output for name in memory.TARGETS)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["shapes:twice", "--target", "h20"], "Did you mean 'h200'"),
        (["shapes"], "MODULE:FUNCTION"),
        (["nowhere:twice"], "no module 'nowhere'"),
        (["shapes:thrice"], "no 'thrice'"),
        (["shapes:twice", "--args", "f32(3)"], "dtype[shape]"),
        (["shapes:twice", "--args", "q32[3]"], "dtype"),
        (["shapes:twice", "--args", "[f32[3]]"], "JSON"),
        (["shapes:twice", "--json", "missing/p.json"], "'missing/p.json' cannot be written"),
        (["shapes:const", "--args", "f32[3]"], "shapes:const is no function but 3"),
        (["shapes:twice"], "args: got 0 for shapes:twice(tree, y): missing a required argument"),
        (["shapes:twice", "--args", "f32[] f32[] f32[]"], "args: got 3 for shapes:twice(tree, y)"),
        (["shapes:named", "--args", "f32[3]"], "shapes:named(x, *, scale) wants scale by name"),
        (["shapes:twice", "--top", "-3"], "top: got -3; use 1 or more"),
        (
            ["shapes:twice", "--num-blocks", "4", "--dtype", "bf16"],
            "dtype: got --dtype, --num-blocks",
        ),
        *(
            (["shapes:twice", option, value], f"got {option}, which only --model takes")
            for option, value in (
                *(("--image", "64"), ("--batch", "1"), ("--width", "1"), ("--head", "gap")),
                *(("--strategy", "column"), ("--cuts", "pool1"), ("--micro-batches", "1")),
            )
        ),
        (["--model", "vgg16", "--args", "f32[3]"], "args: --model has arguments of its own"),
        (["shapes:twice", "--model", "vgg16"], "either"),
        ([], "either"),
        (["--model", "vgg17"], "vgg16"),
        (["--model", "vgg16", "--strategy", "steam"], "strategy"),
        (["--model", "vgg16", "--image", "large"], "image"),
        (["--model", "vgg16", "--batch", "0"], "batch"),
        (["--model", "vgg16", "--image", "64", "--dtype", "f33"], "dtype"),
    ],
)
def test_bad_input_is_answered_before_anything_is_compiled(module, arguments, message, monkeypatch):
    def no_profile(*args, **kwargs):
        raise AssertionError("something was compiled")

    monkeypatch.setattr(memory, "profile", no_profile)
    result = invoke(*arguments)
    assert result.exit_code == 2, result.output
    assert message in result.output
    assert not list(module.glob("*.json"))


def test_a_function_that_gives_no_array_is_bad_input(module):
    result = invoke("shapes:text", "--args", "f32[3]", "--target", "cpu")
    assert result.exit_code == 2, result.output
    assert "function text" in result.output
    assert "is not a valid JAX type" in result.output


def test_a_strategy_that_the_network_does_not_take_is_bad_input():
    result = invoke("--model", "vgg16", *SMALL, "--strategy", "stream", "--num-blocks", 999)
    assert result.exit_code == 2, result.output
    assert "num_blocks=999 is more than" in result.output


@pytest.mark.parametrize(
    ("function", "first", "last"),
    [
        ("shapes:broken", "in broken", "KeyError: 'mine'"),
        ("unwell:f", "in <module>", "ValueError: not today"),
        ("needs_more:f", "in <module>", "No module named 'not_installed_anywhere'"),
        ("no_python:f", "no_python.py", "SyntaxError: invalid syntax"),
    ],
)
def test_errors_of_the_users_code_are_their_own(module, function, first, last):
    result = invoke(function, "--args", "f32[3]", "--target", "cpu")
    assert result.exit_code == 1
    lines = [line for line in result.stderr.splitlines() if line.startswith("  File")]
    assert len(lines) == 1  # no frame of lrjax's, JAX's or the command line's
    assert first in lines[0]
    assert last in result.stderr


def test_arguments():
    assert parse_arguments("f32[8, 128] bf16[1,2];pred[]") == (
        jax.ShapeDtypeStruct((8, 128), jnp.float32),
        jax.ShapeDtypeStruct((1, 2), jnp.bfloat16),
        jax.ShapeDtypeStruct((), jnp.bool_),
    )
    assert parse_arguments("") == ()
