"""A run that is asked to end, and two that want one directory."""

import contextlib
import json
import os
import pty
import signal
import socket
import subprocess
import sys
import threading
import time

import psutil
import pytest
import tiny_runs
from tiny_runs import assert_same_bits, go_on, train
from typer.testing import CliRunner

from lrjax.app import checkpoints, interruption, lock, logs, report, runs
from lrjax.app.cli import app
from lrjax.app.interruption import StoppedError


@pytest.fixture(autouse=True)
def in_a_terminal():
    """As under ``nohup``, or in the background of a script, what is ignored would stay so."""
    defaults = {signal.SIGINT: signal.default_int_handler, signal.SIGHUP: signal.SIG_DFL}
    before = {number: signal.signal(number, handler) for number, handler in defaults.items()}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


class Asking(runs.Listener):
    """Sends this process a signal within a step: SIGTERM, as a scheduler does, or another."""

    def __init__(self, step, number=signal.SIGTERM):
        self._step, self._number = step, number

    def step(self, progress, steps):
        if progress.step == self._step:
            os.kill(os.getpid(), self._number)


def test_sigterm_ends_a_run_behind_the_step_and_it_goes_on_with_the_same_bits(tmp_path):
    expected = train(tmp_path / "whole", train__steps=5)
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(StoppedError, match=r"after step 3; .*go on with --resume") as caught:
        train(tmp_path / "run", Asking(3), train__steps=5)
    assert caught.value.step == 3
    assert signal.getsignal(signal.SIGTERM) == before
    assert checkpoints.saved_steps(tmp_path / "run")[-1] == 3
    assert not (tmp_path / "run" / report.METRICS_FILE).exists()
    assert_same_bits(go_on(tmp_path / "run"), expected)


def test_without_checkpoints_it_says_so(tmp_path):
    with pytest.raises(StoppedError, match="no checkpoint was written, as --keep is 0"):
        train(tmp_path / "run", Asking(1), run__keep=0)
    assert [line["step"] for line in logs.read(tmp_path / "run")] == [1]


def test_sigterm_in_the_last_step_changes_nothing(tmp_path):
    result = train(tmp_path / "run", Asking(4))
    assert len(result.training.losses) == 4
    assert (tmp_path / "run" / report.METRICS_FILE).exists()


def test_a_second_sigterm_is_what_it_was_before():
    received = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: received.append(number))
    try:
        with interruption.requests() as request:
            os.kill(os.getpid(), signal.SIGTERM)
            assert request.is_made
            assert received == []
            os.kill(os.getpid(), signal.SIGTERM)
            assert received == [signal.SIGTERM]
    finally:
        signal.signal(signal.SIGTERM, before)


@pytest.mark.parametrize(
    ("name", "status", "message"),
    [
        ("SIGINT", 130, r"asked to end by Ctrl-C \(SIGINT\): stopped after step 1; its checkpoint"),
        ("SIGHUP", 129, "asked to end by SIGHUP: stopped after step 1; its checkpoint is written"),
        ("SIGUSR1", 138, "asked to end by SIGUSR1: stopped after step 1; its checkpoint"),
    ],
)
def test_other_signals_end_a_run_alike(tmp_path, capfd, name, status, message):
    number = signal.Signals[name]
    before = signal.getsignal(number)
    with pytest.raises(StoppedError, match=message) as caught:
        train(tmp_path / "run", Asking(1, number))
    assert caught.value.exit_status == status
    assert signal.getsignal(number) == before
    assert checkpoints.saved_steps(tmp_path / "run") == [1]
    assert ("press Ctrl-C again to stop at once" in capfd.readouterr().err) == (name == "SIGINT")


def test_a_second_ctrl_c_stops_at_once():
    with interruption.requests() as request:
        os.kill(os.getpid(), signal.SIGINT)
        assert request.is_made
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def test_a_second_sighup_ends_nothing():
    with interruption.requests() as request:
        os.kill(os.getpid(), signal.SIGHUP)
        os.kill(os.getpid(), signal.SIGHUP)
        assert request.by == signal.SIGHUP


@pytest.mark.parametrize("name", ["SIGINT", "SIGHUP", "SIGUSR1"])
def test_signals_that_are_ignored_stay_so(name):
    number = signal.Signals[name]
    before = signal.signal(number, signal.SIG_IGN)
    try:
        with interruption.requests() as request:
            os.kill(os.getpid(), number)
            assert not request.is_made
    finally:
        signal.signal(number, before)


CLOSED = """
import fcntl, sys, termios, time
from lrjax.app import interruption
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
with interruption.requests() as request:
    print("ready", flush=True)
    end = time.monotonic() + 30
    while not request.is_made and time.monotonic() < end:
        time.sleep(0.01)
    print("a terminal that is gone", flush=True)
    open(sys.argv[1], "w").write(request.by.name)
"""


def test_a_closed_terminal_does_not_fail_what_is_still_printed(tmp_path):
    terminal, stream = pty.openpty()
    child = subprocess.Popen(
        [sys.executable, "-c", CLOSED, str(tmp_path / "heard")],
        stdin=stream,
        stdout=stream,
        stderr=stream,
        start_new_session=True,
    )
    os.close(stream)
    output = b""
    while b"ready" not in output:
        output += os.read(terminal, 1000)
    os.close(terminal)
    assert child.wait() == 0
    assert (tmp_path / "heard").read_text() == "SIGHUP"


def test_other_threads_leave_signals_alone():
    found = []

    def enter():
        with interruption.requests() as request:
            found.append(request.is_made)

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert found == [False]


@pytest.mark.parametrize(("by", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_the_command_ends_with_the_status_that_is_expected(tmp_path, monkeypatch, by, status):
    @contextlib.contextmanager
    def asked_at_once():
        request = interruption.Request()
        request.is_made, request.by = True, by
        yield request

    monkeypatch.setattr(interruption, "requests", asked_at_once)
    arguments = [f"{key}={value}" for key, value in tiny_runs.SMALL.items()]
    settings = [part for text in arguments for part in ("--set", text)]
    result = CliRunner().invoke(app, ["train", "--out", str(tmp_path / "run"), *settings])
    assert result.exit_code == status
    assert "stopped after step 1" in result.output
    assert "--resume" in result.output


# --- The lock -------------------------------------------------------------------------------------


OWN_HOST = json.dumps({"host": socket.gethostname(), "pid": os.getpid(), "started": "x"})


def write_lock(run, **holder):
    run.mkdir(exist_ok=True)
    (run / lock.FILE).write_text(json.dumps(holder))


class Intruder(runs.Listener):
    """Wants the directory of a run that is under way."""

    def __init__(self, out):
        self._out = out
        self.errors = []

    def step(self, progress, steps):
        with pytest.raises(ValueError, match="in use by process") as caught:
            go_on(self._out)
        self.errors.append(str(caught.value))


def test_two_trainers_do_not_share_a_directory(tmp_path):
    out = tmp_path / "run"
    intruder = Intruder(out)
    train(out, intruder, train__steps=2)
    assert len(intruder.errors) == 2
    assert f"process {os.getpid()} on {socket.gethostname()}" in intruder.errors[0]
    assert not (out / lock.FILE).exists()


def test_a_lock_of_a_process_that_is_gone_is_taken_over(tmp_path):
    gone = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"],
                          capture_output=True, text=True, check=True)  # fmt: skip
    write_lock(tmp_path, host=socket.gethostname(), pid=int(gone.stdout), started=1.0)
    with lock.locked(tmp_path):
        assert json.loads((tmp_path / lock.FILE).read_text())["pid"] == os.getpid()
    assert [*tmp_path.iterdir()] == []


def test_a_process_that_ended_and_that_nobody_waited_for_is_gone(tmp_path):
    ended = subprocess.Popen([sys.executable, "-c", ""])
    process = psutil.Process(ended.pid)
    write_lock(tmp_path, host=socket.gethostname(), pid=ended.pid, started=process.create_time())
    while process.status() != psutil.STATUS_ZOMBIE:
        time.sleep(0.01)
    with lock.locked(tmp_path):
        pass
    ended.wait()


def test_a_number_that_another_process_has_now_is_no_holder(tmp_path):
    write_lock(tmp_path, host=socket.gethostname(), pid=os.getpid(), started=1.0)
    with lock.locked(tmp_path):
        pass


def test_a_file_system_without_links_has_locks_too(tmp_path, monkeypatch):
    def link(*names):
        raise PermissionError("no links here")

    monkeypatch.setattr(lock.os, "link", link)
    with lock.locked(tmp_path):
        with pytest.raises(ValueError, match="in use by process"), lock.locked(tmp_path):
            pass
        assert [path.name for path in tmp_path.iterdir()] == [lock.FILE]
    assert [*tmp_path.iterdir()] == []


@pytest.mark.parametrize(
    "content",
    ["", "no json", "[]", '{"host": 3}', '{"pid": "x"}', pytest.param(OWN_HOST, id="own host")],
)
def test_a_lock_that_cannot_be_read_is_left_alone_for_a_while(tmp_path, monkeypatch, content):
    monkeypatch.setattr(lock, "STALE_AFTER", 0.1)
    (tmp_path / lock.FILE).write_text(content)
    with lock.locked(tmp_path):
        pass


def test_a_lock_of_another_host_holds_while_it_is_touched(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "STALE_AFTER", 0.4)
    write_lock(tmp_path, host="elsewhere", pid=1, started=1.0)
    done = threading.Event()

    def touch():
        while not done.wait(0.02):
            os.utime(tmp_path / lock.FILE)

    thread = threading.Thread(target=touch)
    thread.start()
    try:
        with pytest.raises(ValueError, match="process 1 on elsewhere"), lock.locked(tmp_path):
            pass
    finally:
        done.set()
        thread.join()
    notes = []
    with lock.locked(tmp_path, notes.append):  # nobody touches it any more
        assert "elsewhere" in notes[0]


def test_the_holder_touches_its_lock(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "TOUCHED_EVERY", 0.01)
    with lock.locked(tmp_path):
        os.utime(tmp_path / lock.FILE, (1.0, 1.0))
        end = time.monotonic() + 10
        while (tmp_path / lock.FILE).stat().st_mtime == 1.0 and time.monotonic() < end:
            time.sleep(0.01)
        assert (tmp_path / lock.FILE).stat().st_mtime > 1.0


def test_a_directory_that_was_made_for_nothing_is_removed(tmp_path):
    with lock.locked(tmp_path / "a" / "b"):
        assert (tmp_path / "a" / "b" / lock.FILE).exists()
    assert [*tmp_path.iterdir()] == []


def test_a_takeover_that_was_killed_is_taken_over(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "STALE_AFTER", 0.1)
    write_lock(tmp_path, host=socket.gethostname(), pid=os.getpid(), started=1.0)
    (tmp_path / f"{lock.FILE}.taking").write_text("")
    with lock.locked(tmp_path):
        assert [path.name for path in tmp_path.iterdir()] == [lock.FILE]


def test_of_many_one_takes_over(tmp_path):
    write_lock(tmp_path, host=socket.gethostname(), pid=os.getpid(), started=1.0)
    results, start = [], threading.Barrier(8)

    def enter():
        start.wait()
        try:
            with lock.locked(tmp_path):
                results.append("held")
                finish.wait()
        except ValueError:
            results.append("refused")

    finish = threading.Event()
    threads = [threading.Thread(target=enter) for _ in range(8)]
    for thread in threads:
        thread.start()
    end = time.monotonic() + 30
    while len(results) < 8 and time.monotonic() < end:
        time.sleep(0.01)
    finish.set()
    for thread in threads:
        thread.join()
    assert results.count("held") == 1
    assert results.count("refused") == 7
