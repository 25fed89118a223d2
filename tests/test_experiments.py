"""The experiments of LR-CNN's evaluation: their arithmetic, and smallest runs of each.

Numbers at full size are in experiments/results/paper; here small programs show that what is
compared is equal, and committed results that tables and figures are drawn from them alone.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import threading
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import report
from experiments.gradcheck import max_error
from experiments.paper import __main__ as evaluation
from experiments.paper import (
    combinations,
    convergence,
    frozen,
    granularity,
    inference,
    limits,
    programs,
    record,
    reversible,
    step_times,
    volumes,
)
from experiments.vgg16_stack import init, loss
from lrjax.planner import inverse
from marks import slow

RESULTS = sorted(record.FOLDER.rglob("*.json"))
QUICK_ON_CPU = record.Settings(quick=True, target="cpu")


def name_of(path):
    return str(path.relative_to(record.FOLDER))


class TestRecord:
    @staticmethod
    def experiment(measured):
        def measure(settings, known, save):
            results = {"values": dict(known.get("values", {}))}
            for name in ("a", "b"):
                if settings.wants(name) and name not in results["values"]:
                    measured.append(name)
                    results["values"][name] = len(measured)
                    save(results)
            return results

        def draw(found, figure):
            figure.add_subplot().plot(list(found["results"]["values"].values()))

        return record.Experiment("limits", measure, lambda r: str(r["results"]["values"]), draw)

    def test_a_run_goes_on_where_it_ended(self, tmp_path):
        measured = []
        experiment = self.experiment(measured)
        only_a = record.Settings(True, "cpu", ("a",))
        record.run(experiment, only_a, tmp_path)
        record.run(experiment, QUICK_ON_CPU, tmp_path, fresh=False)
        assert measured == ["a", "b"]
        path = experiment.path(tmp_path, quick=True)
        stored = json.loads(path.read_text())
        assert (stored["target"], stored["quick"]) == ("cpu", True)
        assert stored["versions"] == report.versions()
        assert re.fullmatch(r"\d{4}-\d\d-\d\d", stored["date"])
        record.run(experiment, QUICK_ON_CPU, tmp_path)
        assert measured == ["a", "b", "a", "b"], "fresh unless told to resume"

    def test_other_targets_and_versions_are_not_mixed(self, tmp_path):
        measured = []
        experiment = self.experiment(measured)
        record.run(experiment, QUICK_ON_CPU, tmp_path)
        other = record.Settings(True, "h200")
        record.run(experiment, other, tmp_path, fresh=False)
        assert measured == ["a", "b", "a", "b"]

    def test_another_experiments_file_is_refused(self, tmp_path):
        path = tmp_path / "limits.json"
        report.write_json(path, {"experiment": "volumes"})
        with pytest.raises(ValueError, match="holds 'volumes', not 'limits'; measure it again"):
            record.render(limits.EXPERIMENT, path)

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["--figures"], "is not there: measure first, without --figures"),
            (["--only", "vgg16/width"], "invalid choice: 'vgg16/width'"),
        ],
    )
    def test_the_command_says_what_is_wrong(
        self, arguments, message, tmp_path, monkeypatch, capsys
    ):
        monkeypatch.setattr(sys, "argv", ["limits", *arguments, "--out", str(tmp_path)])
        with pytest.raises(SystemExit) as stopped:
            record.main(limits.EXPERIMENT, limits.__doc__)
        assert stopped.value.code
        assert message in f"{stopped.value.code} {capsys.readouterr().err}"

    def test_all_experiments_are_told_what_the_command_was(self, tmp_path, monkeypatch, capsys):
        commands = []

        def started(command):
            commands.append(command[2:])
            status = int("experiments.paper.volumes" in command)
            return subprocess.Popen([sys.executable, "-c", f"raise SystemExit({status})"])

        monkeypatch.setattr(evaluation, "subprocess", types.SimpleNamespace(Popen=started))
        (tmp_path / "quick").mkdir()
        for suffix in (".json", ".md", ".png"):
            name = record.FOLDER / "quick" / f"step_times{suffix}"
            (tmp_path / "quick" / name.name).write_bytes(name.read_bytes())
        arguments = ["--quick", "--resume", "--only", "frozen", "volumes", "--out", str(tmp_path)]
        monkeypatch.setattr(sys, "argv", ["paper", *arguments])
        assert evaluation.main() == 1, "one experiment's status was 1"
        options = ["--out", str(tmp_path), "--quick", "--resume"]
        assert sorted(commands) == [
            [f"experiments.paper.{name}", *options] for name in ("frozen", "volumes")
        ]
        printed = capsys.readouterr()
        assert re.search(r"== frozen: status 0, \d+ s, \d+ s of a processor\n", printed.out)
        assert "failed: volumes" in printed.err

    def test_nothing_to_draw_is_a_failure(self, tmp_path, monkeypatch, capsys):
        monkeypatch.setattr(sys, "argv", ["paper", "--figures", "--out", str(tmp_path)])
        assert evaluation.main() == 1
        assert "no results in" in capsys.readouterr().err


class TestCommittedResults:
    @pytest.mark.parametrize("path", RESULTS, ids=name_of)
    def test_tables_and_figures_are_drawn_from_them_alone(self, path, tmp_path):
        experiment = evaluation.experiment(path.stem)
        copy = tmp_path / path.name
        copy.write_text(path.read_text())
        text = record.render(experiment, copy)
        assert text + "\n" == path.with_suffix(".md").read_text()
        assert copy.with_suffix(".png").exists() == (experiment.draw is not None)
        assert path.with_suffix(".png").exists() == (experiment.draw is not None)

    def test_the_planner_is_below_no_method(self):
        compared = 0
        for path in RESULTS:
            if path.stem not in ("limits", "volumes"):
                continue
            results = json.loads(path.read_text())["results"]["largest"]
            sweeps = results.values() if path.stem == "limits" else [{"": results}]
            for own in (own for sweep in sweeps for own in sweep.values()):
                for budget, planned in own.get("planner", {}).items():
                    sizes = [m[budget]["size"] for name, m in own.items() if name != "planner"]
                    assert planned["size"] >= max(sizes), (path, budget)
                    compared += 1
        assert compared

    def test_losses_coincide(self):
        for path in RESULTS:
            if path.stem != "convergence":
                continue
            for network, own in json.loads(path.read_text())["results"]["networks"].items():
                # Later steps amplify a rounding to as much as the loss.
                first = {run: one["losses"][:10] for run, one in own.items()}
                for run in programs.METHODS:
                    assert convergence.apart(first[run], first["column"]) <= 1e-4, (network, run)


class TestPrograms:
    def test_blocks_are_at_most_the_rows_of_the_last_map(self):
        assert programs.Program("vgg16", "2ps", 1, 224).blocks == 1
        assert programs.Program("vgg16", "2ps", 1, 224, num_blocks=64).blocks == 7
        assert programs.Program("vgg16", "stream", 1, 2048).blocks == 32
        assert programs.Program("vgg16", "column", 1, 2048).blocks is None

    def test_an_unknown_method_is_refused(self):
        with pytest.raises(ValueError, match="method: got '3ps'; use one of column, checkpoint"):
            programs.by_method(loss, "3ps", "vgg16", 2)

    def test_limits_are_of_what_was_compiled(self, monkeypatch):
        """Peaks by a formula: what the strategies' search and the bookkeeping make of them."""

        def measured(program, target):
            factor = 1 if program.blocks is None else 0.1
            return {"peak_bytes": int(2**20 * program.batch * (1 + factor * program.side**2 / 1e3))}

        monkeypatch.setattr(limits, "measured_program", measured)
        run = limits.Limits(limits.QUICK, "cpu", {}, lambda results: None)
        sweep = limits.QUICK.sweeps["side"]
        column, stream = (run.by_method(sweep, "vgg16", m) for m in ("column", "stream"))
        (budget,) = limits.QUICK.budgets
        assert column[budget]["size"] == 640
        assert stream[budget]["size"] > 3 * column[budget]["size"]
        for own in (column[budget], stream[budget]):
            assert own["peak_bytes"] <= limits.QUICK.budgets[budget]

    @pytest.mark.parametrize("searched", [512, 4096])
    def test_the_planner_is_asked_at_the_largest_size_that_is_known(self, monkeypatch, searched):
        """Where its own search ends below a method's size, a plan for that size is made."""
        sizes = {"column": {"a": {"size": 256}}, "stream": {"a": {"size": 1024}}}
        asked = []

        def search(question, method, tell):
            assert (question.start, question.memory_bytes, method) == (1024, 7, "lrjax")
            return inverse.Largest("lrjax", searched, 5, 1.5, 1, "stream 8")

        def plan(fun, params, images, *rest, budget, **options):
            asked.append((images.shape, budget))
            choice = types.SimpleNamespace(text="2ps 4")
            return types.SimpleNamespace(verified_peak_bytes=6, operations=2.0, choices=[choice])

        monkeypatch.setattr(limits.inverse, "largest", search)
        monkeypatch.setattr(limits.lrjax, "plan", plan)
        run = limits.Limits(limits.QUICK, "cpu", {}, lambda results: None)
        found = run.by_planner(limits.QUICK.sweeps["side"], "vgg16", 7, "a", sizes)
        assert found["size"] == max(searched, 1024)
        assert found["searched"] == searched
        assert asked == ([((1, 1024, 1024, 3), 7)] if searched < 1024 else [])

    @pytest.mark.slow
    def test_plans_reach_what_a_strategy_does(self, monkeypatch):
        plan = limits.Plan(
            networks=("vgg16",),
            sweeps={"side": limits.Sweep(None, 64, (64, 128, 192))},
            budgets={"12 MiB": 12 * programs.MIB},
            width=1 / 16,
            most_guesses=3,
        )
        few = {name: programs.METHODS[name] for name in ("column", "stream")}
        monkeypatch.setattr(limits, "METHODS", few)
        run = limits.Limits(plan, "cpu", {}, lambda results: None)
        run.methods("side", "vgg16")
        run.planner("side", "vgg16")
        sizes = {
            m: own["12 MiB"]["size"] for m, own in run.results["largest"]["side"]["vgg16"].items()
        }
        assert sizes["planner"] >= max(sizes.values()) > 0
        assert sizes["stream"] >= sizes["column"]


@pytest.mark.parametrize("method", slow("stream", "overl"))
def test_granularity_measures_every_number_of_blocks(method, monkeypatch):
    monkeypatch.setattr(granularity, "QUICK", {"side": 64, "blocks": (1, 2), "width": 1 / 32})
    monkeypatch.setattr(granularity, "BY_ROWS", (method,))
    found = granularity.measure(QUICK_ON_CPU, {}, lambda results: None)
    own = found["networks"]["vgg16"]
    assert set(own) == {"column", "checkpoint", f"{method}/1", f"{method}/2"}
    assert [blocks for blocks, _ in granularity.curve(own, method)] == [1, 2]
    assert all(one["peak_bytes"] > 0 for one in own.values())


@pytest.mark.slow
def test_volumes_take_less_by_slices():
    loss_of_voxels, args = volumes.loss_and_arguments(48, 1 / 8)
    peak = {
        method: programs.measured(
            jax.value_and_grad(volumes.by_method(loss_of_voxels, method, 48)), args, "cpu"
        )["peak_bytes"]
        for method in ("column", "stream")
    }
    assert peak["stream"] < 0.6 * peak["column"]


class TestFineTuning:
    def test_only_the_last_stage_is_trained(self):
        program = programs.Program("resnet50", "column", 1, 64, width=1 / 16)
        params = program.arguments()[0]
        trained, others, together = frozen.separate("resnet50", params)
        assert all("stage4" in name or "classifier" in name for name in trained)
        assert not any("stage4" in name or "classifier" in name for name in others)
        again = together(trained, others)
        assert jax.tree.all(jax.tree.map(lambda a, b: a is b, again, params))

    @pytest.mark.slow
    def test_rows_then_column_gives_columns_gradients(self):
        assert frozen.difference("vgg16", "rows + column", only_last=True) <= 1e-12


class TestReversible:
    @pytest.mark.slow
    def test_all_ways_have_columns_gradients(self):
        differences = reversible.differences()
        assert set(differences) == set(reversible.WAYS)
        assert max(differences.values()) <= 1e-5

    def test_the_inverse_is_what_the_gradient_is_taken_at(self):
        """With another output than the forward pass had, the gradient is another."""
        params = reversible.init(jax.random.key(0), 4, 1)["stages"][0]
        pair = tuple(jax.random.normal(jax.random.key(i), (1, 8, 8, 2)) for i in (1, 2))
        out = reversible.stage(params, pair)
        (right, _), (wrong, _) = (
            reversible._backward((params, kept), out) for kept in (out, (out[0] + 1, out[1]))
        )
        truth = jax.vjp(reversible.stage, params, pair)[1](out)[0]
        assert max_error(right, truth) <= 1e-5
        assert max_error(wrong, truth) > 1e-2


class TestInference:
    @pytest.mark.slow
    def test_patches_and_rows_give_columns_maps(self):
        differences = inference.differences()
        assert set(differences) == {"mcunetv2", "mafat", "stream"}
        assert max(differences.values()) <= 1e-6

    def test_what_lies_outside_the_image_is_zero_in_every_layer(self, monkeypatch):
        """Else a patch at the border would read its halo where column reads padding."""
        params = init(jax.random.key(0))
        images = jax.random.normal(jax.random.key(1), (1, 16, 16, 3))
        group = inference.Group((0, 1), 2)
        whole = inference.by_patches(params, images, (inference.Group((0, 1), 1),))
        assert max_error(inference.by_patches(params, images, (group,)), whole) <= 1e-6
        monkeypatch.setattr(inference, "inside", lambda y, *place: y)
        assert max_error(inference.by_patches(params, images, (group,)), whole) > 1e-2

    def test_halos_are_those_of_the_layers(self):
        """Two convolutions and a pool: two rows on each side of twice the patch."""
        group = inference.Group((0, 1), 2)
        assert group.ranges(8) == [(-2, 18), (-1, 17), (0, 16), (0, 8)]

    def test_operations_of_one_patch_are_columns_and_its_halo(self):
        whole = inference.Group((0, 5), 1)
        assert inference.operations(256, (whole,)) == 1
        few, many = (inference.operations(256, (inference.Group((0, 5), n),)) for n in (2, 4))
        assert 1 < few < many
        assert 1 < inference.stream_operations(1024) < 1.2

    def test_sides_that_do_not_divide_are_refused(self):
        images = jnp.zeros((1, 100, 100, 3))
        with pytest.raises(ValueError, match=r"a side of 100 at stages \(0, 3\); use a multiple"):
            inference.by_patches(init(jax.random.key(0)), images, inference.WAYS["mcunetv2"])


@pytest.mark.parametrize(
    "name",
    [
        "adafactor",
        *slow(f"{combinations.PARTS} micro-batches", "checkpoints at the pools", "lion"),
    ],
)
def test_combinations_are_exact(name, monkeypatch):
    monkeypatch.setattr(
        combinations, "CHECKED", {"side": 64, "batch": 4, "rows": 32, "width": 1 / 32}
    )
    assert combinations.difference(combinations.COMBINATIONS[name]) <= 1e-9


TINY = {"side": 32, "batch": 2, "images": 4, "held_out": 4, "steps": 3, "classes": 2}


class TestConvergence:
    def losses(self, network, run):
        return convergence.train(network, run, TINY)["losses"]

    @pytest.mark.slow
    def test_losses_by_rows_are_columns(self, monkeypatch):
        monkeypatch.setitem(
            convergence.NETWORKS,
            "vgg16",
            lambda **options: programs.models.VGG16(head="gap", width=1 / 32, **options),
        )
        monkeypatch.setattr(convergence, "NUM_BLOCKS", 1)
        column = self.losses("vgg16", "column")
        assert len(column) == 3
        assert np.isfinite(column).all()
        assert convergence.apart(self.losses("vgg16", "stream"), column) <= 1e-5

    @pytest.mark.slow
    def test_statistics_by_block_train_another_network(self):
        """Two losses: statistics of maps this small amplify rounding a thousandfold in a step."""
        column = self.losses("resnet18", "column")[:2]
        assert convergence.apart(self.losses("resnet18", "stream")[:2], column) <= 1e-3
        assert convergence.apart(self.losses("resnet18", convergence.BY_BLOCK)[:2], column) > 1e-2

    def test_canvases_that_are_held_out_are_others(self):
        train_on, (images, labels) = convergence.sources(TINY)
        assert images.shape == (4, 32, 32, 3)
        assert labels.tolist() == [0, 1, 0, 1]
        assert not any((train_on[i]["image"] == images[i]).all() for i in range(4))


class TestTimes:
    def test_ratios_are_taken_within_a_turn(self):
        """A machine that is busy for a turn is so for both."""
        seconds = {"column": [1.0, 10.0, 1.0], "stream": [2.0, 20.0, 2.0]}
        assert step_times.ratio(seconds, "stream", "column") == 2.0

    def test_a_target_without_a_roofline_is_refused(self):
        settings = record.Settings(quick=False, target="cpu", only=("gpu",))
        with pytest.raises(ValueError, match="target: got 'cpu'; use a GPU, or --only cpu"):
            step_times.measure(settings, {}, lambda results: None)


def test_every_experiment_is_in_the_documentation():
    page = (Path(__file__).parents[1] / "docs/experiments.md").read_text()
    for name in evaluation.NAMES:
        assert evaluation.experiment(name).name == name
        assert f"experiments.paper.{name}" in page, name


def test_experiments_that_time_steps_run_by_themselves(monkeypatch, tmp_path):
    running, beside = set(), {}
    meeting = threading.Barrier(2)

    def measured(name, options):
        running.add(name)
        if name in ("limits", "volumes"):
            meeting.wait(timeout=10)  # fails unless both run at once
        beside[name] = running - {name}
        running.discard(name)
        return int(name == "volumes")

    monkeypatch.setattr(evaluation, "measured", measured)
    names = ("peers", "limits", "volumes", "step_times")
    assert evaluation.all_measured(names, argparse.Namespace(jobs=2)) == ["volumes"]
    assert set(beside) == set(names)
    assert beside["peers"] == beside["step_times"] == set()


@pytest.mark.slow
@pytest.mark.usefixtures("quick_processes")
def test_all_experiments_run_with_small_settings(tmp_path):
    """As scripts/regenerate.sh --quick does, minutes of it."""
    command = [sys.executable, "-m", "experiments.paper", "--quick", "--out", tmp_path]
    command += ["--only", "reversible", "frozen"]
    process = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[1])
    assert process.returncode == 0, process.stderr[-2000:]
    assert {path.name for path in (tmp_path / "quick").glob("*.json")} == {
        "reversible.json",
        "frozen.json",
    }


@pytest.mark.slow
def test_figures_are_drawn_again_by_one_command(tmp_path):
    for path in RESULTS:
        copy = tmp_path / path.relative_to(record.FOLDER)
        copy.parent.mkdir(exist_ok=True)
        copy.write_text(path.read_text())
    root = Path(__file__).parents[1]
    process = subprocess.run(
        ["bash", root / "scripts/regenerate.sh", "--figures", "--out", tmp_path],
        env={**os.environ, "PYTHON": sys.executable},
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert process.returncode == 0, process.stderr
    assert {path.with_suffix("") for path in tmp_path.rglob("*.json")} == {
        path.with_suffix("") for path in tmp_path.rglob("*.md")
    }


def test_numbers_in_the_documentation_are_in_the_results():
    page = (Path(__file__).parents[1] / "docs/experiments.md").read_text()
    bullets = page.partition("## Measured")[2].split("\n* ")[1:]
    assert bullets
    for bullet in bullets:
        path = re.search(r"\((\.\./experiments/results/paper/[a-z_/]+\.md)\)", bullet)[1]
        table = (Path(__file__).parents[1] / "docs" / path).read_text()
        for number in re.findall(r"\b\d{1,3}(?:,\d{3})+\b|\b\d+\.\d+\b", bullet):
            assert number in table, (number, path)
