"""Random networks by rows against column, as many as wanted.

    python scripts/fuzz.py --graphs 5000 --seed 0 --jobs 2
    python scripts/fuzz.py --graphs 200 --without custom_reducing,debug
    python scripts/fuzz.py --graphs 5000 --seed 0 --out experiments/results/fuzz.json
    python scripts/fuzz.py --graphs 500 --devices 2,3,8 --out experiments/results/fuzz_mesh.json

Network number ``i`` follows from the seed ``i`` alone. Every network runs in a process that is
started again when XLA aborts it or when it takes longer than ``--timeout``, and both are reported
as what that network does. One that fails is compiled again as users compile, then without fusions:
XLA computes an operand of two fusions in both, sometimes with other roundings (its older emitters
for CPUs, which are quicker and which jaxlib has until 0.11, do so often), so that a maximum is
unequal to all that it was taken of and its gradient is 0 / 0, in column as by rows. The summary
counts what was compiled again, by the flags that helped.

With ``--devices`` the rows of every image are shared by as many devices of a mesh, host devices of
a CPU; of several numbers, the networks take turns among those that do not exceed their height.

Results go to ``runs/fuzz_<seed>.jsonl`` as they come (on devices ``fuzz_<seed>_on_2_3_8.jsonl``);
started again, the script goes on behind them, with ``--again`` those that failed included. A
network that fails is made smaller until nothing can be left out, and written to ``runs/found/`` as
a test that can be run.
"""

import argparse
import collections
import dataclasses
import importlib.metadata
import json
import os
import queue
import select
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from random import Random
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

# A worker is started again after this many networks: compiled programs stay in memory.
NETWORKS_PER_WORKER = 150
WITHOUT_FUSIONS = "--xla_disable_hlo_passes=fusion"
FAILURES = ("wrong", "error", "aborted", "hung")


# --- In a worker ---------------------------------------------------------------------------------


def work(requests: Any, answers: Any) -> None:
    """Judge networks, one request a line: a seed, or a description."""
    import jax

    from generated.draw import spec_of
    from generated.spec import L, Spec

    def tell(**answer: Any) -> None:
        answers.write(json.dumps(answer) + "\n")
        answers.flush()

    tell(versions={"jax": jax.__version__, "python": sys.version.split()[0]})
    for line in requests:
        request = json.loads(line)
        begun = time.monotonic()
        tell(phase="draw")
        if "seed" in request:
            drawn = spec_of(Random(request["seed"]), request["without"])
            spec = dataclasses.replace(drawn, devices=devices_of(request, drawn.height))
        else:
            spec = eval(request["spec"], {"L": L, "Spec": Spec})
        tell(spec=repr(spec))
        answer = judged(spec, lambda phase: tell(phase=phase))
        tell(done={**answer, "seconds": round(time.monotonic() - begun, 2)})
        jax.clear_caches()


def devices_of(request: dict[str, Any], height: int) -> int:
    """How many devices share an image of this height: those that may take turns by seeds."""
    listed = request["devices"]
    fitting = [count for count in listed if count <= height] or listed
    return fitting[request["seed"] % len(fitting)]


def judged(spec: Any, phase: Any) -> dict[str, Any]:
    """How a network was judged: its status and details."""
    from generated.judge import Unsuitable, Wrong, check

    try:
        report = check(spec, phase)
    except Unsuitable as reason:
        return {"status": "unsuitable", "detail": str(reason)}
    except Wrong as error:
        return {"status": "wrong", "detail": str(error)[:2000]}
    except Exception as error:
        return {"status": "error", "detail": f"{type(error).__name__}: {error}"[:2000]}
    found: dict[str, Any] = {"status": "same"}
    if report.ill_conditioned:
        found["ill_conditioned"] = report.ill_conditioned
    return found


# --- Around the workers --------------------------------------------------------------------------


class Worker:
    """A process that judges networks, started when one is asked for."""

    def __init__(
        self,
        timeout: float,
        command: Sequence[str] = (sys.executable, __file__, "--worker"),
        flags: str = "",
    ):
        self.timeout, self.command, self.flags = timeout, command, flags
        self.process: subprocess.Popen[bytes] | None = None
        self.served = 0
        self.buffer = b""
        self.errors: Any = None

    def ask(self, **request: Any) -> dict[str, Any]:
        """The answer for a network, also where the process did not live to give it."""
        if self.process is None or self.served >= NETWORKS_PER_WORKER:
            self.restart()
        assert self.process is not None
        assert self.process.stdin is not None
        self.served += 1
        self.process.stdin.write(json.dumps(request).encode() + b"\n")
        self.process.stdin.flush()
        answer: dict[str, Any] = {"spec": request.get("spec"), "phase": "draw"}
        end = time.monotonic() + self.timeout
        while True:
            line = self.line(end)
            if line is None:
                hung = self.process.poll() is None
                code = self.stop()
                status = "hung" if hung else "aborted"
                detail = f"in {answer['phase']}"
                detail += "" if hung else f", exit status {code}: {self.last_words()}"
                if answer["phase"] in ("draw", "build", "column"):
                    status, detail = "unsuitable", f"{status} without rows"
                return {**answer, "status": status, "detail": detail, "seconds": self.timeout}
            told = json.loads(line)
            if "done" in told:
                return {**answer, **told["done"]}
            answer.update(told)

    def line(self, end: float) -> bytes | None:
        """The next line, None where the process ends or the time does."""
        assert self.process is not None
        assert self.process.stdout is not None
        while b"\n" not in self.buffer:
            left = end - time.monotonic()
            if left <= 0 or not select.select([self.process.stdout], [], [], left)[0]:
                return None
            read = os.read(self.process.stdout.fileno(), 65536)
            if not read:
                self.process.wait()
                return None
            self.buffer += read
        line, _, self.buffer = self.buffer.partition(b"\n")
        return line

    def restart(self) -> None:
        self.stop()
        self.errors = tempfile.TemporaryFile()  # noqa: SIM115
        self.process = subprocess.Popen(
            self.command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.errors,
            env={
                **os.environ,
                "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} {self.flags}".strip(),
            },
        )
        self.served, self.buffer = 0, b""

    def last_words(self) -> str:
        """The line in which XLA says which of its checks failed."""
        self.errors.seek(0)
        lines = self.errors.read().decode(errors="replace").splitlines()
        failed = [line for line in lines if "Check failed" in line or line.startswith("F")]
        return failed[-1].partition("] ")[2] if failed else ""

    def stop(self) -> int | None:
        if self.process is None:
            return None
        self.process.kill()
        code = self.process.wait()
        self.process = None
        return code


def quick_flags() -> str:
    """Flags with which small programs compile three times as fast, where jaxlib knows them."""
    major, minor = map(int, importlib.metadata.version("jaxlib").split(".")[:2])
    return "--xla_cpu_use_fusion_emitters=false" if (major, minor) < (0, 11) else ""


def device_flags(count: int) -> str:
    """Flags with which a CPU is so many devices."""
    return f"--xla_force_host_platform_device_count={count}" if count > 1 else ""


def failing_class(answer: dict[str, Any]) -> str | None:
    """What two failures have in common when they are taken for one."""
    if answer["status"] not in FAILURES:
        return None
    words = answer["detail"].split(":")[0] if answer["status"] == "error" else ""
    return f"{answer['status']} {words}"


def shrunk(worker: Worker, answer: dict[str, Any], seconds: float) -> tuple[str, dict[str, Any]]:
    """A smaller description that fails alike, and its answer."""
    from generated.shrink import shrink
    from generated.spec import L, Spec

    wanted, best = failing_class(answer), answer

    def fails(spec: Any) -> bool:
        nonlocal best
        found = worker.ask(spec=repr(spec))
        if failing_class(found) == wanted:
            best = found
            return True
        return False

    spec = shrink(eval(answer["spec"], {"L": L, "Spec": Spec}), fails, seconds=seconds)
    return repr(spec), best


def write_test(path: Path, seed: int, spec: str, answer: dict[str, Any]) -> None:
    """A failure as a test."""
    comment = "\n".join(f"# {line}"[:99] for line in answer["detail"].splitlines()[:12])
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(
        f'"""Found by scripts/fuzz.py at seed {seed}: {answer["status"]}."""\n\n'
        "from generated import L, Spec, check\n\n"
        f"{comment}\n\n\n"
        f"def test_found_{seed}():\n"
        f"    check({spec})\n"
    )


class Run:
    """All networks of a run, by several workers."""

    def __init__(self, args: argparse.Namespace):
        self.args = args
        self.state = args.state or ROOT / "runs" / f"fuzz_{run_name(args)}.jsonl"
        self.answers: dict[int, dict[str, Any]] = {}
        self.versions: dict[str, str] = {}
        self.lock = threading.Lock()
        self.started = time.monotonic()
        if self.state.exists():
            for line in self.state.read_text().splitlines():
                answer = json.loads(line)
                if not (self.args.again and failing_class(answer)):
                    self.answers[answer["seed"]] = answer
        wanted = range(args.seed, args.seed + args.graphs)
        self.todo: queue.Queue[int] = queue.Queue()
        for seed in wanted:
            if seed not in self.answers:
                self.todo.put(seed)
        self.answers = {seed: self.answers[seed] for seed in wanted if seed in self.answers}

    def go(self) -> None:
        self.state.parent.mkdir(parents=True, exist_ok=True)
        threads = [threading.Thread(target=self.work) for _ in range(self.args.jobs)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    def work(self) -> None:
        flags = dict.fromkeys((quick_flags(), "", WITHOUT_FUSIONS))
        devices = device_flags(max(self.args.devices))
        workers = {own: Worker(self.args.timeout, flags=f"{devices} {own}") for own in flags}
        worker = workers.pop(quick_flags())
        asked = {"without": self.args.without, "devices": self.args.devices}
        try:
            while True:
                try:
                    seed = self.todo.get_nowait()
                except queue.Empty:
                    return
                answer = worker.ask(seed=seed, **asked)
                if answer["status"] == "hung":  # or the machine was busy
                    answer = worker.ask(seed=seed, **asked)
                for own, other in workers.items():
                    if failing_class(answer) is not None:
                        answer = other.ask(seed=seed, **asked)
                        answer["compiled_again"] = own or "as users do"
                answer = {"seed": seed, **answer}
                if failing_class(answer) is not None and self.args.shrink_seconds > 0:
                    spec, best = shrunk(workers[WITHOUT_FUSIONS], answer, self.args.shrink_seconds)
                    answer["shrunk"], answer["detail"] = spec, best["detail"]
                    write_test(self.args.found / f"test_found_{seed}.py", seed, spec, answer)
                self.add(answer)
        finally:
            for one in (worker, *workers.values()):
                one.stop()

    def add(self, answer: dict[str, Any]) -> None:
        with self.lock:
            self.versions = answer.pop("versions", self.versions)
            self.answers[answer["seed"]] = answer
            with self.state.open("a") as file:
                file.write(json.dumps(answer) + "\n")
            if failing_class(answer) is not None:
                print(f"seed {answer['seed']}: {answer['status']}: {answer['detail']}")
                print(f"  {answer.get('shrunk', answer['spec'])}", flush=True)
            if len(self.answers) % 100 == 0:
                print(f"{len(self.answers)} networks: {dict(self.statuses())}", flush=True)

    def statuses(self) -> collections.Counter[str]:
        return collections.Counter(answer["status"] for answer in self.answers.values())

    def summary(self) -> dict[str, Any]:
        answers = [self.answers[seed] for seed in sorted(self.answers)]
        compared = [a for a in answers if a["status"] != "unsuitable"]
        unsuitable = [a for a in answers if a["status"] == "unsuitable"]
        strategies = collections.Counter(strategy_of(a["spec"]) for a in compared)
        seconds = sum(a["seconds"] for a in answers)
        return {
            "seed": self.args.seed,
            "networks": len(answers),
            "compared": len(compared),
            "mismatches": sum(failing_class(a) is not None for a in answers),
            "failures": {
                a["seed"]: a.get("shrunk", a["spec"]) for a in answers if failing_class(a)
            },
            "compiled_again": collections.Counter(
                str(a["compiled_again"]) for a in compared if "compiled_again" in a
            ),
            "ill_conditioned": sum("ill_conditioned" in a for a in answers),
            "unsuitable": dict(collections.Counter(a["detail"] for a in unsuitable).most_common()),
            "strategies": dict(strategies.most_common()),
            "without": list(self.args.without),
            "devices": dict(sorted(collections.Counter(map(devices_in, compared)).items())),
            "seconds_per_network": round(seconds / max(len(answers), 1), 2),
            "versions": self.versions,
        }


def strategy_of(spec: str) -> str:
    """The strategy of a described network, "mixed" for several."""
    _, _, behind = spec.rpartition("strategy=")
    if behind == spec:
        return "stream"
    return "mixed" if behind.startswith("(") else behind.split("'")[1]


def devices_in(answer: dict[str, Any]) -> int:
    """How many devices shared the rows of a network."""
    _, _, behind = answer["spec"].rpartition("devices=")
    return int(behind.rstrip(")")) if behind != answer["spec"] else 1


def run_name(args: argparse.Namespace) -> str:
    """The seed, and on how many devices where that is more than one."""
    on = "_on_" + "_".join(map(str, args.devices)) if args.devices != [1] else ""
    return f"{args.seed}{on}"


def counts(text: str) -> list[int]:
    """Numbers of devices, by commas."""
    found = [int(part) for part in text.split(",")]
    if min(found) < 1:
        raise argparse.ArgumentTypeError("use numbers of devices, 1 or more, such as 2,3,8")
    return found


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--graphs", type=int, default=100, help="number of networks")
    parser.add_argument("--seed", type=int, default=0, help="of the first network")
    parser.add_argument("--jobs", type=int, default=1, help="processes at a time")
    parser.add_argument("--timeout", type=float, default=120.0, help="seconds for one network")
    parser.add_argument("--again", action="store_true", help="also those that failed before")
    parser.add_argument(
        "--devices", type=counts, default=[1], help="that share rows; several, by commas: in turn"
    )
    parser.add_argument("--without", default="", help="kinds or families to leave out, by commas")
    parser.add_argument(
        "--shrink-seconds", type=float, default=300.0, help="0: failures stay as is"
    )
    parser.add_argument("--state", type=Path, help="file of results; runs/fuzz_<seed>.jsonl")
    parser.add_argument(
        "--found", type=Path, default=ROOT / "runs" / "found", help="folder of tests"
    )
    parser.add_argument("--out", type=Path, help="file of the summary")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    if args.worker:
        # What networks print must not come between the answers.
        answers = os.fdopen(os.dup(1), "w")
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        work(sys.stdin, answers)
        return 0
    args.without = [name for name in args.without.split(",") if name]
    run = Run(args)
    run.go()
    summary = run.summary()
    print(json.dumps(summary, indent=2))
    if args.out:
        args.out.write_text(json.dumps(summary, indent=2) + "\n")
    return 1 if summary["mismatches"] else 0


if __name__ == "__main__":
    sys.exit(main())
