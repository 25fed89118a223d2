"""Peak memory against batch and image side; the largest that 10, 24 and 80 GB hold.

    python -m experiments.paper.limits --quick
    python -m experiments.paper.limits --only vgg16/side/planner

VGG-16 and ResNet-50 by every method and by the planner: batches of 224x224 and of 1024x1024 images,
and the side of one image. The budgets are the memories of an RTX 3080, an RTX 3090 and an A100; all
programs are compiled for one target, whose peaks are compared with each budget. What is printed as
largest was compiled and fits. Blocks have a fixed number of rows, so that taller images have more.
"""

import dataclasses
from typing import Any

import lrjax
from experiments import report
from experiments.paper import record
from experiments.paper.programs import (
    IN_AXES,
    METHODS,
    MIB,
    Program,
    measured_program,
)
from experiments.paper.search import largest
from lrjax.memory.targets import find
from lrjax.planner import inverse
from lrjax.planner.problem import Problem, problem_of

PLANNER = "planner"


@dataclasses.dataclass(frozen=True)
class Sweep:
    """What grows.

    Attributes:
      side: of the images whose batch grows; None: the side grows, of one image.
      step: sizes are multiples of it.
      samples: sizes that are compiled first, for the curve.
    """

    side: int | None
    step: int
    samples: tuple[int, ...]

    @property
    def degree(self) -> int:
        return 1 if self.side else 2

    def program(self, network: str, method: str, size: int, width: float) -> Program:
        batch, side = (size, self.side) if self.side else (1, size)
        return Program(network, method, batch, side, width=width)


@dataclasses.dataclass(frozen=True)
class Plan:
    """All that a run measures."""

    networks: tuple[str, ...]
    sweeps: dict[str, Sweep]
    budgets: dict[str, int]
    width: float = 1.0
    most_guesses: int = 6


FULL = Plan(
    networks=("vgg16", "resnet50", "resnet50-batch"),
    sweeps={
        "side": Sweep(None, 256, (1024, 2048, 4096)),
        "batch-1024": Sweep(1024, 1, (2, 8)),
        "batch-224": Sweep(224, 1, (16, 64)),
    },
    budgets={name: find(name).memory_bytes for name in ("rtx3080", "rtx3090", "a100-80gb")},
)
QUICK = Plan(
    networks=("vgg16",),
    sweeps={"side": Sweep(None, 128, (256, 512, 768)), "batch-224": Sweep(224, 1, (2, 8))},
    budgets={"512 MiB": 512 * MIB},
    width=0.25,
    most_guesses=3,
)


class Limits:
    """The measurements of a run, kept as they are made."""

    def __init__(self, plan: Plan, target: str, known: record.Results, save: record.Save):
        self.plan, self.target, self.save = plan, target, save
        self.results = {"programs": {}, "largest": {}, **known, "width": plan.width}
        self.results["budgets"] = plan.budgets

    def peak(self, program: Program) -> int:
        programs = self.results["programs"]
        if str(program) not in programs:
            programs[str(program)] = measured_program(program, self.target)
            print(
                f"{program!s:>40} {programs[str(program)]['peak_bytes'] / MIB:>10,.0f} MiB",
                flush=True,
            )
            self.save(self.results)
        return programs[str(program)]["peak_bytes"]

    def methods(self, sweep: str, network: str) -> None:
        """The largest by every method."""
        own = self.results["largest"].setdefault(sweep, {}).setdefault(network, {})
        for method in METHODS:
            if method not in own:
                own[method] = self.by_method(self.plan.sweeps[sweep], network, method)
                self.save(self.results)

    def planner(self, sweep_name: str, network: str) -> None:
        """The largest by plans, which are searched from the methods'."""
        self.methods(sweep_name, network)
        sweep, own = self.plan.sweeps[sweep_name], self.results["largest"][sweep_name][network]
        planned = own.setdefault(PLANNER, {})
        for name, budget in self.plan.budgets.items():
            if name not in planned:
                planned[name] = self.by_planner(sweep, network, budget, name, own)
                print(sweep_name, network, name, planned[name], flush=True)
                self.save(self.results)

    def by_method(self, sweep: Sweep, network: str, method: str) -> dict[str, Any]:
        def peak(size: int) -> int:
            return self.peak(sweep.program(network, method, size, self.plan.width))

        known = {size: peak(size) for size in sweep.samples}
        return {
            name: dataclasses.asdict(
                largest(
                    peak,
                    budget,
                    step=sweep.step,
                    known=known,
                    degree=sweep.degree,
                    most_guesses=self.plan.most_guesses,
                )
            )
            for name, budget in self.plan.budgets.items()
        }

    def by_planner(
        self, sweep: Sweep, network: str, budget: int, name: str, methods: dict[str, Any]
    ) -> dict[str, Any]:
        """The planner's own answer, searched from the largest size that a method reached.

        Where that is smaller, ``lrjax.plan`` is asked for a plan at the method's size.
        """

        def call(size: int) -> tuple[Any, tuple[Any, ...]]:
            program = sweep.program(network, "column", size, self.plan.width)
            return program.loss(), program.arguments()

        def problem(size: int) -> Problem:
            fun, args = call(size)
            return problem_of(fun, args, IN_AXES, self.target, 0)

        best = max((m for m in methods if m != PLANNER), key=lambda m: methods[m][name]["size"])
        reached = methods[best][name]["size"]
        question = inverse.Question(
            problem,
            step=sweep.step,
            start=max(reached, sweep.step),
            memory_bytes=budget,
            grows_rows=sweep.side is None,
        )
        found = inverse.largest(question, "lrjax", lambda progress: None)
        if found.size >= reached:
            return {
                "size": found.size,
                "peak_bytes": found.peak_bytes,
                "operations": round(found.operations, 3),
                "segments": found.strategies,
                "searched": found.size,
            }
        fun, args = call(reached)
        plan = lrjax.plan(fun, *args, in_axes=IN_AXES, budget=budget, target=self.target, wrt=0)
        return {
            "size": reached,
            "peak_bytes": plan.verified_peak_bytes,
            "operations": round(plan.operations, 3),
            "segments": " + ".join(choice.text for choice in plan.choices),
            "searched": found.size,
        }


def measure(settings: record.Settings, known: record.Results, save: record.Save) -> record.Results:
    plan = QUICK if settings.quick else FULL
    limits = Limits(plan, settings.target, known, save)
    for network in plan.networks:
        for sweep in plan.sweeps:
            if settings.wants(f"{network}/{sweep}"):
                limits.methods(sweep, network)
            if settings.wants(f"{network}/{sweep}/{PLANNER}"):
                limits.planner(sweep, network)
    return limits.results


TITLES = {
    "side": "largest side, one image",
    "batch-1024": "largest batch of 1024x1024 images",
    "batch-224": "largest batch of 224x224 images",
}


def label(method: str) -> str:
    return METHODS[method].label if method in METHODS else method


def table(found: record.Record) -> str:
    results = found["results"]
    budgets = list(results["budgets"])
    lines = ["# The largest batch and image that fit"]
    lines.append(
        "Training step in float32; every size was compiled and fits. Peaks of the one target are "
        "compared with all budgets: "
        + ", ".join(f"{name} {report.mib(size)} MiB" for name, size in results["budgets"].items())
        + f". Channels times {results['width']:g}."
    )
    for sweep, networks in results["largest"].items():
        for network, methods in networks.items():
            if not methods:
                continue  # a run that ended before the first was known
            rows = [
                [label(method), *(_cell(methods[method].get(budget)) for budget in budgets)]
                for method in (*METHODS, PLANNER)
                if method in methods
            ]
            lines += [
                f"{network}, {TITLES[sweep]} (peak MiB):",
                report.markdown_table(["method", *budgets], rows),
            ]
    return "\n\n".join(lines)


def _cell(own: dict[str, Any] | None) -> str:
    return "" if own is None else f"{own['size']:,} ({report.mib(own['peak_bytes'])})"


def draw(found: record.Record, figure: Any) -> None:
    """Peaks against size, a panel for every sweep and network; budgets as lines."""
    results = found["results"]
    panels = [(s, n) for s, networks in results["largest"].items() for n in networks]
    columns = max(1, min(3, len(panels)))
    figure.set_size_inches(5 * columns, 4 * -(-len(panels) // columns))
    for position, (sweep, network) in enumerate(panels, start=1):
        axes = figure.add_subplot(-(-len(panels) // columns), columns, position)
        for method in METHODS:
            points = sorted(_points(results["programs"], sweep, network, method))
            if points:
                axes.loglog(*zip(*points, strict=True), marker=".", label=label(method))
        for name, budget in results["budgets"].items():
            axes.axhline(budget / 2**30, color="grey", linewidth=0.7, linestyle=":")
            place = {"transform": axes.get_yaxis_transform(), "va": "bottom", "ha": "right"}
            axes.text(0.99, budget / 2**30, name, fontsize=7, color="grey", **place)
        axes.set(title=f"{network}: {TITLES[sweep]}", ylabel="peak, GiB")
        axes.set_xlabel("side, pixels" if sweep == "side" else "images of a batch")
        axes.legend(fontsize=7, loc="lower right")


def _points(
    programs: dict[str, Any], sweep: str, network: str, method: str
) -> list[tuple[int, float]]:
    points = []
    for name, own in programs.items():
        its_network, shape, its_method = name.split("/")[:3]
        batch, side = map(int, shape.split("x"))
        is_of_sweep = batch == 1 if sweep == "side" else side == int(sweep.split("-")[1])
        if (its_network, its_method) == (network, method) and is_of_sweep:
            points.append((side if sweep == "side" else batch, own["peak_bytes"] / 2**30))
    return points


PARTS = tuple(
    f"{network}/{sweep}{suffix}"
    for network in FULL.networks
    for sweep in FULL.sweeps
    for suffix in ("", f"/{PLANNER}")
)
EXPERIMENT = record.Experiment("limits", measure, table, draw, PARTS)

if __name__ == "__main__":
    record.main(EXPERIMENT, __doc__)
