"""Property: a network by rows is column, whatever its layers, its image and its options are.

Every network follows from its seed; one that fails is made smaller and printed as ``Spec(...)``,
which ``check`` runs again. Not by hypothesis, which draws constants that it finds in whatever is
imported: the networks of a chunk depended on the tests beside it. ``scripts/fuzz.py`` draws as many
more as wanted.
"""

import contextlib
import dataclasses
import itertools
import subprocess
import sys
from pathlib import Path
from random import Random

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import generated.judge
from generated import L, Spec, Unsuitable, Wrong, check, pointwise
from generated.draw import spec_of
from generated.shrink import shrink
from generated.spec import KINDS, MAP, case_of
from graphs import fallbacks, graphs_of
from lrjax.strategies import MicroBatches
from marks import slow

ROOT = Path(__file__).resolve().parents[1]
CHUNKS, NETWORKS = 8, 16
FAST = 2

# Layers that are local in rows whatever their parameters are.
LOCAL = {"conv", "pool", "act", "function", "norm", "dense", "position", "random"}


def only(families):
    return {kind.family for kind in KINDS.values()} - set(families)


@pytest.mark.parametrize(
    "chunk",
    [*range(FAST), *slow(*range(FAST, CHUNKS))],
)
def test_networks_by_rows_are_column(chunk, users_compiler):
    compared = ill_conditioned = unsuitable = compiled_again = 0
    seeds = itertools.count(chunk, CHUNKS)
    while compared < NETWORKS:
        spec = spec_of(Random(next(seeds)))
        try:
            report = check(spec)
        except Unsuitable:
            unsuitable += 1
            continue
        except Exception:
            compiled_again += 1
            report = compiled_as_users_do(spec, users_compiler)
        compared += 1
        ill_conditioned += bool(report.ill_conditioned)
    assert ill_conditioned <= 1
    assert compiled_again <= 1
    assert unsuitable <= NETWORKS


@pytest.mark.parametrize("strategy", slow("selective", "selective-narrow"))
def test_networks_of_which_a_part_is_computed_again_are_column(strategy, users_compiler):
    """Strategies of whole maps, which are not drawn: one segment, or those that were drawn."""

    def changed(spec):
        own = (strategy,) * len(spec.strategy) if isinstance(spec.strategy, tuple) else strategy
        return dataclasses.replace(spec, strategy=own)

    compare(map(changed, specs_from(40_000)), users_compiler)


@pytest.mark.slow
def test_networks_by_micro_batches_are_column(users_compiler):
    """Where the images of a batch are independent, one after the other; activations have rules of
    their own, some at points where these differ from their functions' derivatives."""
    drawn = (s for s in specs_from(60_000) if s.batch > 1 and not isinstance(s.strategy, tuple))
    divided = (
        dataclasses.replace(spec, strategy=MicroBatches(spec.strategy, spec.batch), head=MAP)
        for spec in drawn
    )
    compare(divided, users_compiler)


def specs_from(seed):
    return (spec_of(Random(own)) for own in itertools.count(seed))


def compare(specs, users_compiler):
    """``NETWORKS`` of them that can be compared."""
    compared = 0
    while compared < NETWORKS:
        spec = next(specs)
        try:
            check(spec)
        except Unsuitable:
            continue
        except Exception:
            compiled_as_users_do(spec, users_compiler)
        compared += 1


def compiled_as_users_do(spec, users_compiler):
    """XLA computes an operand of two fusions in both, sometimes with other roundings (its older
    emitters for CPUs often): a maximum is then unequal to all that it was taken of, and its
    gradient 0 / 0."""
    with contextlib.suppress(Exception), users_compiler():
        return check(spec)
    with users_compiler(without_fusions=True):
        try:
            return check(spec)
        except Exception as error:
            smaller = shrink(spec, fails, seconds=60)
            raise AssertionError(f"by rows is not column: check({smaller!r})") from error


def fails(spec):
    try:
        check(spec)
    except Unsuitable:
        return False
    except Exception:
        return True
    return False


@pytest.mark.parametrize("dtype", ["float32", *slow("bfloat16")])
def test_networks_in_other_precisions(dtype):
    compared = 0
    for seed in range(12):
        left_out = only({"conv", "pool", "act", "branch"})
        spec = spec_of(Random(seed), left_out, most_layers=3, dtype=dtype)
        try:
            check(spec)
        except Unsuitable:
            continue
        compared += 1
    assert compared >= 8


def test_layers_that_are_local_in_rows_run_by_rows():
    seen = 0
    for seed in range(40):
        left_out = only(LOCAL) | {"head=max", "head=several"}
        spec = spec_of(Random(seed), left_out, most_layers=6, heights=[(8, 30)])
        with jax.enable_x64(True):
            case = case_of(spec)
            graphs = graphs_of(case.fun, case.args, case.in_axes)
        # A flattened head may need the whole map.
        left = {name for graph in graphs for name in fallbacks(graph)} - {"reshape"}
        assert not left, (left, spec)
        seen += len(spec.layers)
    assert seen > 60


class TestDescriptions:
    def test_a_seed_is_a_network_and_its_source(self):
        for seed in range(6):
            spec = spec_of(Random(seed))
            assert repr(spec_of(Random(seed))) == repr(spec)
            assert repr(eval(repr(spec))) == repr(spec)

    @pytest.mark.slow
    def test_every_kind_is_drawn(self):
        drawn = " ".join(repr(spec_of(Random(seed))) for seed in range(150))
        assert [name for name in KINDS if f"L({name!r}" not in drawn] == []

    def test_what_is_left_out_is_not_drawn(self):
        for seed in range(20):
            text = repr(spec_of(Random(seed), ["conv", "branch", "head=max"]))
            assert "'conv'" not in text
            assert "'residual'" not in text
            assert "L('head', how='max')" not in text

    def test_shrinking_leaves_what_fails(self):
        def has_strided_convolution(layers):
            return any(
                (layer.kind == "conv" and layer.params.get("stride", 1) >= 2)
                or any(
                    has_strided_convolution(body)
                    for body in [layer.params.get("body", ()), *layer.params.get("bodies", ())]
                )
                for layer in layers
            )

        found = 0
        for seed in range(40):
            spec = spec_of(Random(seed))
            if has_strided_convolution(spec.layers) and spec.height > 4:
                small = shrink(spec, lambda s: has_strided_convolution(s.layers) and s.height >= 5)
                wanted = Spec(
                    layers=(L("conv", stride=2),),
                    height=5,
                    width=1,
                    seed=spec.seed,
                    num_blocks=1,
                    strategy=small.strategy,
                )
                assert repr(small) == repr(wanted)
                found += 1
        assert found > 3


class TestTheJudge:
    """It tells errors from rounding."""

    SPEC = Spec(layers=(L("conv", kernel=3), L("act", name="tanh")))
    # A unit in the last place of what this sine takes moves it by 1e-10.
    STEEP = Spec(layers=(L("conv", kernel=3), L("function", name="steep")))

    @pytest.fixture(autouse=True)
    def further_functions(self, monkeypatch):
        monkeypatch.setitem(pointwise.FUNCTIONS, "steep", lambda x: jnp.sin(1e6 * x))
        monkeypatch.setitem(pointwise.FUNCTIONS, "flat", jnp.floor)

    def instead_of_rows(self, monkeypatch, change):
        def rowwise(fun, **options):
            return change(fun)

        monkeypatch.setattr(generated.judge.lrjax, "rowwise", rowwise)

    def test_a_small_error_is_wrong(self, monkeypatch):
        self.instead_of_rows(monkeypatch, lambda fun: lambda *args: fun(*args) * (1 + 1e-9))
        with pytest.raises(Wrong, match="column itself moves by"):
            check(self.SPEC)

    def test_values_that_are_not_finite_are_wrong(self, monkeypatch):
        self.instead_of_rows(monkeypatch, lambda fun: lambda *args: fun(*args) * np.nan)
        with pytest.raises(Wrong, match="not finite"):
            check(self.SPEC)

    def test_rounding_is_judged_against_columns_own(self, monkeypatch):
        def moved(fun):
            return lambda params, images: fun(
                {name: p * (1 + 2e-16) for name, p in params.items()}, images
            )

        self.instead_of_rows(monkeypatch, moved)
        assert check(self.STEEP).ill_conditioned
        assert not check(self.SPEC).ill_conditioned

    def test_an_error_beyond_columns_own_rounding_is_wrong(self, monkeypatch):
        self.instead_of_rows(monkeypatch, lambda fun: lambda *args: fun(*args) * (1 + 1e-6))
        with pytest.raises(Wrong):
            check(self.STEEP)

    def test_networks_that_say_nothing(self):
        with pytest.raises(Unsuitable, match="zero"):
            check(Spec(layers=(L("function", name="flat"),)))
        with pytest.raises(Unsuitable, match="nothing to differentiate"):
            check(Spec(layers=(L("act"),), argnums=(0,)))


class TestTheScript:
    @pytest.fixture
    def fuzz(self):
        sys.path.insert(0, str(ROOT / "scripts"))
        try:
            import fuzz
        finally:
            sys.path.pop(0)
        return fuzz

    def worker(self, fuzz, program):
        program = "import sys, os, time, json; sys.stdin.readline()\n" + program
        return fuzz.Worker(5.0, [sys.executable, "-c", program])

    def test_what_ends_a_process_is_told(self, fuzz):
        worker = self.worker(fuzz, 'print(\'{"phase": "rows"}\', flush=True); os.abort()')
        answer = worker.ask(spec="x")
        assert answer["status"] == "aborted"
        assert "rows" in answer["detail"]
        assert fuzz.failing_class(answer) is not None

    def test_what_column_does_not_survive_is_no_failure(self, fuzz):
        worker = self.worker(fuzz, 'print(\'{"phase": "column"}\', flush=True); os.abort()')
        answer = worker.ask(spec="x")
        assert answer["status"] == "unsuitable"

    def test_what_takes_too_long_is_ended(self, fuzz):
        worker = self.worker(fuzz, 'print(\'{"phase": "rows"}\', flush=True); time.sleep(60)')
        worker.timeout = 1.0
        assert worker.ask(spec="x")["status"] == "hung"
        assert worker.process is None

    @pytest.mark.slow
    def test_a_run_goes_on_where_it_was(self, tmp_path):
        def run(graphs):
            command = ["scripts/fuzz.py", "--graphs", str(graphs), "--state", "state.jsonl"]
            options = ["--without", "branch", "--out", "summary.json"]
            return subprocess.run(
                [sys.executable, str(ROOT / command[0]), *command[1:], *options],
                cwd=tmp_path,
                capture_output=True,
                text=True,
                check=True,
            )

        run(1)
        first = (tmp_path / "state.jsonl").read_text()
        run(2)
        assert (tmp_path / "state.jsonl").read_text().startswith(first)
        assert '"networks": 2' in (tmp_path / "summary.json").read_text()
