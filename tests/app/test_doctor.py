"""``lrjax doctor``: what it finds, and that a wrong gradient or a missing package is a failure."""

import importlib.metadata

import jax
import pytest
from typer.testing import CliRunner

from lrjax import strategies
from lrjax.app import doctor
from lrjax.app.cli import app
from lrjax.strategies import base


def invoke(*arguments):
    return CliRunner().invoke(app, ["doctor", *arguments])


class WrongGradient(strategies.Column):
    """Its gradient is a thousandth too large."""

    name = "wrong"

    def function(self, segment, num_blocks, given=base.NOTHING_HOSTED, taken=base.NOTHING_HOSTED):
        right = super().function(segment, num_blocks, given, taken)

        @jax.custom_vjp
        def scaled(x):
            return x

        scaled.defvjp(lambda x: (x, None), lambda _, g: (g * 1.001,))
        return lambda *inputs: [scaled(x) for x in right(*inputs)]


def test_a_healthy_installation(monkeypatch):
    ways = doctor._ways()
    few = {name: ways[name] for name in ("stream", "stream in 2 parts")}
    monkeypatch.setattr(doctor, "_ways", lambda: few)
    result = invoke()
    assert result.exit_code == 0, result.output
    assert "all is well" in result.output
    assert result.output.count("the same") == 2
    for name in ("jaxlib", importlib.metadata.version("jax"), "compiles for: cpu"):
        assert name in result.output


def test_the_self_test_runs_every_strategy_but_column():
    names = {s.name for s in strategies.registered()} - {"column"}
    assert names < set(doctor._ways())


def test_a_strategy_whose_gradients_differ_is_named(monkeypatch):
    monkeypatch.setattr(
        doctor, "_ways", lambda: {"wrong": (doctor._network, {"strategy": WrongGradient()})}
    )
    result = invoke()
    assert result.exit_code == 1, result.output
    assert "differs" in result.output
    assert "row by row is not column" in result.output
    assert "not well: self-test of wrong" in result.output


def test_an_error_of_the_self_test_is_a_result(monkeypatch):
    monkeypatch.setattr(
        doctor, "_ways", lambda: {"stream": (doctor._network, {"num_blocks": 10**6})}
    )
    result = invoke()
    assert result.exit_code == 1, result.output
    assert "ValueError" in result.output


@pytest.mark.parametrize(
    ("version", "verdict"), [("0.9.2", "jax 0.9.2"), (None, "jax missing"), ("0.11.0.dev1", None)]
)
def test_packages_that_are_old_or_missing(monkeypatch, version, verdict):
    installed = importlib.metadata.version

    def version_of(name):
        if name != "jax":
            return installed(name)
        if version is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return version

    monkeypatch.setattr(importlib.metadata, "requires", lambda name: ["jax>=0.10"])
    monkeypatch.setattr(importlib.metadata, "version", version_of)
    result = invoke("--no-self-test")
    assert result.exit_code == (1 if verdict else 0), result.output
    assert (f"not well: {verdict}" if verdict else "as far as was looked at") in result.output


def test_extras_list_what_is_missing(monkeypatch):
    monkeypatch.setattr(
        importlib.metadata,
        "requires",
        lambda name: ["jax>=0.10", 'absent>=2; extra == "tpu"', 'numpy; extra == "cuda"', "?!"],
    )
    assert doctor.extras() == [doctor.Extra("cuda", ()), doctor.Extra("tpu", ("absent>=2",))]
    assert 'pip install "lrjax[tpu]"' in invoke("--no-self-test").output


def test_an_extra_of_another_package_is_looked_into(monkeypatch):
    asked = {
        "lrjax": ['numpy[gpu]; extra == "cuda"'],
        "numpy": ["jax", 'absent-plugin[all]<9; extra == "gpu"', 'jax>=99; extra == "tpu"'],
    }
    monkeypatch.setattr(importlib.metadata, "requires", lambda name: asked.get(name, []))
    assert doctor.extras() == [doctor.Extra("cuda", ("absent-plugin<9",))]


def test_run_from_its_folder(monkeypatch):
    def absent(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "requires", absent)
    monkeypatch.setattr(importlib.metadata, "metadata", absent)
    result = invoke("--no-self-test")
    assert result.exit_code == 0, result.output
    assert "not installed" in result.output
    assert doctor.extras() == []


@pytest.mark.parametrize("error", [RuntimeError("backend 'tpu' is absent"), AssertionError()])
def test_no_device(monkeypatch, error):
    def devices():
        raise error

    monkeypatch.setattr(jax, "devices", devices)
    monkeypatch.setenv("JAX_PLATFORMS", "tpu")
    result = invoke()
    assert result.exit_code == 1, result.output
    assert f"no device (JAX_PLATFORMS=tpu): {type(error).__name__} {error}".strip() in result.output
    assert "self-test" not in result.output


def test_a_gpu_that_is_not_used_is_named(monkeypatch):
    monkeypatch.setattr(doctor.glob, "glob", lambda pattern: ["/dev/nvidia0"])
    assert "JAX_PLATFORMS=cpu" in invoke("--no-self-test").output
