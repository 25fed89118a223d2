"""Peak memory and step time against the number of row blocks, with and without cuts (-H).

    python -m experiments.paper.granularity --quick
    python -m experiments.paper.granularity --only vgg16 --resume

More blocks, less memory, until what blocks share outweighs what they hold (2PS keeps the boundary
rows of all blocks); and more kernels, each with less to do. Column and the checkpoint at every cut
stand beside. Times are a roofline's of what XLA compiles for the target; without a GPU as target
there are none.
"""

from typing import Any

from experiments import report
from experiments.paper import record
from experiments.paper.programs import METHODS, MIB, NETWORKS, Program, measured_program

# From coarse to fine, so that a run that was cut short has whole curves.
FULL = {"side": 2048, "blocks": (4, 16, 64, 1, 2, 8, 32), "width": 1.0}
QUICK = {"side": 512, "blocks": (1, 4, 16), "width": 0.25}
BY_ROWS = tuple(name for name, method in METHODS.items() if method.rows is not None)
WHOLE = ("column", "checkpoint")


def measure(settings: record.Settings, known: record.Results, save: record.Save) -> record.Results:
    chosen = QUICK if settings.quick else FULL
    results = {"networks": {}, **known, "side": chosen["side"], "width": chosen["width"]}
    for network in ("vgg16",) if settings.quick else ("vgg16", "resnet50"):
        if not settings.wants(network):
            continue
        own = results["networks"].setdefault(network, {})
        for method, blocks in _programs(chosen["blocks"]):
            program = Program(network, method, 1, chosen["side"], blocks, chosen["width"])
            key = method if program.blocks is None else f"{method}/{program.blocks}"
            if key not in own:
                own[key] = measured_program(program, settings.target)
                print(f"{network} {key}: {own[key]['peak_bytes'] / MIB:,.0f} MiB", flush=True)
                save(results)
    return results


def _programs(blocks: tuple[int, ...]) -> list[tuple[str, int | None]]:
    return [(m, None) for m in WHOLE] + [(m, n) for n in blocks for m in BY_ROWS]


def curve(own: dict[str, Any], method: str) -> list[tuple[int, dict[str, Any]]]:
    """A method's measurements by its number of blocks, ascending."""
    found = [(m["blocks"], m) for name, m in own.items() if name.split("/")[0] == method]
    return sorted((blocks, m) for blocks, m in found if blocks is not None)


def table(found: record.Record) -> str:
    results = found["results"]
    lines = [
        "# Peak and step time against the number of row blocks",
        f"Training step in float32, one image of {results['side']}x{results['side']}, channels "
        f"times {results['width']:g}. Peak in MiB, and time over column's by the roofline of the "
        "compiled program, where the target is a GPU. At most as many blocks as the last map has "
        "rows. Hybrids (-H) are cut at "
        + "; ".join(f"{n}: {', '.join(NETWORKS[n].cuts)}" for n in results["networks"])
        + ".",
    ]
    for network, own in results["networks"].items():
        blocks = sorted({m["blocks"] for m in own.values() if m["blocks"] is not None})
        rows = [[METHODS[m].label, _cell(own.get(m), own)] + [""] * len(blocks) for m in WHOLE]
        for method in BY_ROWS:
            cells = dict(curve(own, method))
            rows.append([METHODS[method].label, "", *(_cell(cells.get(n), own) for n in blocks)])
        header = ["method", "whole maps", *(f"{n} blocks" for n in blocks)]
        lines += [f"{network}:", report.markdown_table(header, rows)]
    return "\n\n".join(lines)


def _cell(measured: dict[str, Any] | None, own: dict[str, Any]) -> str:
    if measured is None:
        return ""
    text = report.mib(measured["peak_bytes"])
    if "seconds" in measured and "column" in own:
        text += f" : {measured['seconds'] / own['column']['seconds']:.2f}"
    return text


def draw(found: record.Record, figure: Any) -> None:
    """Peak and time against blocks, a row of panels for each network."""
    networks = found["results"]["networks"]
    figure.set_size_inches(10, 4 * len(networks))
    panels = figure.subplots(len(networks), 2, squeeze=False)
    for axes, (network, own) in zip(panels, networks.items(), strict=True):
        for method in BY_ROWS:
            points = curve(own, method)
            blocks = [n for n, _ in points]
            axes[0].loglog(
                blocks,
                [m["peak_bytes"] / MIB for _, m in points],
                marker=".",
                label=METHODS[method].label,
            )
            timed = [(n, m["seconds"] * 1e3) for n, m in points if "seconds" in m]
            if timed:
                axes[1].loglog(*zip(*timed, strict=True), marker=".", label=METHODS[method].label)
        for method in WHOLE:
            if method not in own:
                continue
            style = {"linestyle": ":", "color": "black" if method == "column" else "grey"}
            axes[0].axhline(own[method]["peak_bytes"] / MIB, label=METHODS[method].label, **style)
            if "seconds" in own[method]:
                axes[1].axhline(own[method]["seconds"] * 1e3, label=METHODS[method].label, **style)
        axes[0].set(title=network, xlabel="row blocks", ylabel="peak, MiB")
        axes[1].set(
            title=f"{network}, {found['target']}", xlabel="row blocks", ylabel="step, ms (roofline)"
        )
        axes[0].legend(fontsize=7)


EXPERIMENT = record.Experiment("granularity", measure, table, draw, ("vgg16", "resnet50"))

if __name__ == "__main__":
    record.main(EXPERIMENT, __doc__)
