"""Training in several processes: the losses of one, one log, checkpoints that anyone goes on with.

Two processes of two CPU devices each meet on this host, and exchange arrays by gloo.
"""

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tiny_runs
from tiny_runs import go_on, train
from typer.testing import CliRunner

import quick
from lrjax.app import checkpoints, config, interruption, lock, logs, processes, report, saved
from lrjax.app.cli import app

PROGRAM = Path(tiny_runs.__file__)
SETTINGS = {"strategy.name": "stream", "strategy.num_blocks": "2", "data.validation": 0.25}


class Together:
    """The processes of a run, with their output."""

    def __init__(self, out, *, count=2, devices=2, **settings):
        with socket.socket() as free:
            free.bind(("localhost", 0))
            port = free.getsockname()[1]
        environment = {
            **os.environ,
            "JAX_PLATFORMS": "cpu",
            "XLA_FLAGS": f"{quick.FLAGS} --xla_force_host_platform_device_count={devices}",
            "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
        }
        joined = [f"processes.count={count}", f"processes.coordinator=localhost:{port}"]
        texts = [f"{key.replace('__', '.')}={value}" for key, value in settings.items()]
        self.processes = [
            subprocess.Popen(
                [sys.executable, PROGRAM, out, *joined, f"processes.id={number}", *texts],
                env=environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            for number in range(count)
        ]

    def ended(self):
        """Outputs and statuses; nothing is left behind."""
        try:
            found = [one.communicate(timeout=300) for one in self.processes]
        finally:
            for one in self.processes:
                one.kill()
        return found, [one.returncode for one in self.processes]


def losses(run):
    return [line["loss"] for line in logs.read(run) if "loss" in line]


def lines_of(text):
    return [line for line in text.splitlines() if line.isdecimal()]


@pytest.mark.slow
def test_losses_logs_and_checkpoints_are_those_of_one_process(tmp_path):
    flat = {key.replace(".", "__"): value for key, value in SETTINGS.items()}
    expected = train(tmp_path / "one", train__steps=8, **flat)
    out = tmp_path / "run"
    # Rows over all devices; then images and rows; then one device of one process.
    found, statuses = Together(out, **SETTINGS, train__steps=3).ended()
    assert statuses == [0, 0], found
    assert lines_of(found[0][0]) == ["1", "2", "3"]
    assert lines_of(found[1][0]) == []
    assert checkpoints.saved_steps(out) == [2, 3]
    metrics = report.read_metrics(out)
    assert len(metrics["losses"]) == 3
    assert not (out / lock.FILE).exists()
    assert "processes" not in json.loads((out / saved.CONFIG_FILE).read_text())

    settings = {"mesh.rows": 2, "mesh.data": 2, "train.steps": 6}
    found, statuses = Together(out, **settings).ended()
    assert statuses == [0, 0], found
    last = go_on(out, train__steps=8, mesh__rows=1, mesh__data=1)
    np.testing.assert_allclose(losses(out), expected.training.losses, rtol=2e-6)
    assert last.evaluation.loss == pytest.approx(expected.evaluation.loss, rel=2e-6)


@pytest.mark.slow
def test_a_signal_to_one_process_ends_all_behind_one_step(tmp_path):
    out = tmp_path / "run"
    together = Together(out, **SETTINGS, train__steps=100_000)
    first = together.processes[0]
    while not first.stdout.readline().strip().isdecimal():  # the first step is done
        assert first.poll() is None
    together.processes[1].send_signal(signal.SIGTERM)
    found, statuses = together.ended()
    assert all("StoppedError" in errors for _, errors in found), found
    assert statuses == [1, 1]
    assert checkpoints.saved_steps(out)[-1] == logs.read(out)[-1]["step"]


@pytest.mark.slow
def test_a_directory_in_use_is_refused_in_every_process(tmp_path):
    with lock.locked(tmp_path / "run"):
        found, statuses = Together(tmp_path / "run", **SETTINGS).ended()
    assert statuses == [1, 1]
    assert all("is in use by process" in errors for _, errors in found), found


# --- How they meet --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((None, "host:1", None), "processes: missing"),
        ((None, None, 0), "processes: missing"),
        (("auto", "host:1", None), "processes: auto finds"),
        ((2, None, 0), "coordinator: got None; give HOST:PORT"),
        ((2, "host", 0), "coordinator: got 'host'; give HOST:PORT"),
        ((2, "host:1", None), "process_id: got None; .* 0 to 1"),
        ((2, "host:1", 2), "process_id: got 2; .* 0 to 1"),
        ((0, "host:1", 0), "processes: got 0; use a number, 1 or more, or auto"),
        (("some", "host:1", 0), "processes: got 'some'; use a number, 1 or more, or auto"),
    ],
)
def test_what_is_missing_is_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        processes.start(*arguments)


def test_the_command_refuses_it_before_anything_is_done(tmp_path):
    out = tmp_path / "run"
    result = CliRunner().invoke(app, ["train", "--out", str(out), "--processes", "2"])
    assert result.exit_code == 2
    assert "coordinator: got None" in result.output
    result = CliRunner().invoke(app, ["train", "--out", str(out), "--processes", "two"])
    assert result.exit_code == 2
    assert "processes.count: got 'two'" in result.output
    assert not out.exists()


def test_others_that_do_not_answer_are_named(monkeypatch):
    def initialize(*args):
        raise RuntimeError("DEADLINE_EXCEEDED: Barrier timed out\nmore")

    monkeypatch.setattr(processes.jax.distributed, "initialize", initialize)
    with pytest.raises(ValueError, match=r"did not find each other .DEADLINE_EXCEEDED: Barrier"):
        processes.start(2, "localhost:1", 1)


def test_where_processes_met_is_not_kept():
    asked = config.Config.of({"processes.count": 2, "processes.coordinator": "a:1"})
    assert "processes" not in asked.kept()
    assert config.differences(config.Config(), asked) == {}
    assert saved.config_of(asked.kept()).processes.count is None


def test_alone_a_process_asks_nobody():
    done = []
    processes.first_does(lambda: done.append(1))
    processes.wait_for_all("here")
    assert (done, processes.any_says(False), processes.any_says(True)) == ([1], False, True)
    assert processes.is_first()
    assert interruption.StoppedError(1, is_saved=True).exit_status == 143
