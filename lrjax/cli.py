"""The `lrjax` command: train a network, compare strategies, profile memory, plan."""

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Annotated, Any, NoReturn

try:
    import typer
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
except ModuleNotFoundError as error:
    raise SystemExit(
        f"lrjax: {error.name} is not installed; the command needs the experiments extra: "
        "pip install 'lrjax[experiments]'"
    ) from error

app = typer.Typer(
    help="Row-centric CNN training for JAX: the same gradients in less memory.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)
console = Console()
BAD_INPUT = 2
FAILED = 1
DOES_NOT_FIT = 3


def main() -> None:
    """The console script."""
    app()


def _stop(message: object, code: int = BAD_INPUT) -> NoReturn:
    Console(stderr=True).print(f"[bold red]error:[/] {_escaped(message)}", soft_wrap=True)
    raise typer.Exit(code)


def _escaped(message: object) -> str:
    return str(message).replace("[", r"\[")


@app.callback()
def lrjax_command() -> None:
    """Row-centric CNN training for JAX: the same gradients in less memory."""


@app.command()
def train(
    out: Annotated[Path, typer.Option(help="Directory for metrics, plot and parameters.")],
    data: Annotated[
        str,
        typer.Option(help='Folder with one directory of images per class, or "digits" (built in).'),
    ] = "digits",
    image_size: Annotated[
        str | None,
        typer.Option(help="N or HEIGHTxWIDTH. Default: 512 for digits, else the images' own."),
    ] = None,
    fit: Annotated[
        str,
        typer.Option(help="Folder images of another size: native (crop and pad) or resize."),
    ] = "native",
    digits: Annotated[
        str, typer.Option(help="Which digits are the classes of the built-in data.")
    ] = "0,1,2,3,4,5,6,7,8,9",
    num_images: Annotated[int, typer.Option(help="Canvases of the built-in data.")] = 1024,
    model: Annotated[
        str,
        typer.Option(
            help="Network: vgg16, resnet18, resnet34, resnet50, resnet101, convnext_tiny, "
            "mobilenet_v2, efficientnet_b0, densenet121, or unet, which labels every pixel."
        ),
    ] = "vgg16",
    width: Annotated[float, typer.Option(help="Multiplier of the network's channels.")] = 1.0,
    head: Annotated[str | None, typer.Option(help="Of vgg16: gap or dense. Default: gap.")] = None,
    norm: Annotated[
        str | None,
        typer.Option(help="Normalisation of the others: batch, frozen, group or none."),
    ] = None,
    dtype: Annotated[
        str, typer.Option(help="Of the computation: float32 or bfloat16.")
    ] = "float32",
    strategy: Annotated[str, typer.Option(help="column, stream, 2ps or overl.")] = "stream",
    num_blocks: Annotated[
        str | None, typer.Option(help="Row blocks: a number, or one per segment, such as 8,4.")
    ] = None,
    cuts: Annotated[
        str | None, typer.Option(help="Cut into segments at these values, such as pool2,pool4.")
    ] = None,
    batch: Annotated[int, typer.Option(help="Images per step.")] = 2,
    balanced: Annotated[
        bool, typer.Option("--balanced", help="Let the classes take turns within a batch.")
    ] = False,
    steps: Annotated[int, typer.Option(help="Training steps.")] = 20,
    optimizer: Annotated[str, typer.Option(help="sgd (momentum 0.9) or adam.")] = "sgd",
    lr: Annotated[float, typer.Option(help="Learning rate.")] = 1e-3,
    seed: Annotated[int, typer.Option(help="Of parameters, data and dropout.")] = 0,
    check: Annotated[
        bool, typer.Option("--check", help="Only look whether everything fits; train nothing.")
    ] = False,
) -> None:
    """Train a network, and write losses, step times, peak memory, a plot and the parameters.

    Memory is measured two ways: what XLA plans for the compiled step, and how much the process
    grows while it trains.
    """
    options = {name: value for name, value in locals().items() if name not in ("out", "check")}
    # Imported here so that `--help` and a mistyped option do not wait for JAX.
    from lrjax import report, training

    try:
        report.check_writable(out)
        chosen = _strategy(strategy, num_blocks, cuts)
        source = _source(model, data, image_size, fit, digits, num_images, seed)
        network = _network(model, len(source.class_names), width, dtype, head=head, norm=norm)
        update = _optimizer(optimizer, lr)
        if steps < 1:
            raise ValueError(f"steps: got {steps}; use 1 or more")
        if batch < 1:
            raise ValueError(f"batch: got {batch}; use 1 or more")
        if check:
            training.check_step(network, source, chosen, batch_size=batch)
            return
        skipped = [str(file) for file in getattr(source, "skipped", ())]
        _announce(source, skipped)
        with console.status(f"{chosen.label}: compiling"):
            compiled = training.compile_step(
                network, source, update, chosen, batch_size=batch, seed=seed
            )
    except (ValueError, TypeError) as error:
        _stop(error)

    try:
        with _progress() as progress:
            task = progress.add_task(chosen.label, total=steps, loss="", seconds="")

            def on_step(step: int, loss: float, seconds: float) -> None:
                progress.update(
                    task, completed=step, loss=f"loss {loss:.4f}", seconds=f"{seconds:.2f} s/step"
                )

            result = training.train(
                compiled,
                source,
                batch_size=batch,
                steps=steps,
                seed=seed,
                balanced=balanced,
                on_step=on_step,
            )
    except training.DivergedError as error:
        _stop(error, FAILED)
    metrics = report.metrics_of(result, chosen, options, skipped)
    report.write_run(out, result, metrics)
    console.print(
        f"{chosen.label}: loss {result.losses[0]:.4f} -> {result.losses[-1]:.4f}, "
        f"{result.seconds_per_step:.3f} s/step, compiled in {result.compile_seconds:.1f} s; "
        f"peak memory: XLA {result.memory.xla_peak / report.MIB:.0f} MiB, "
        f"RSS {result.memory.rss / report.MIB:.0f} MiB; written to {out}",
        soft_wrap=True,
        highlight=False,
    )


@app.command(
    "compare-strategies",
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
)
def compare_strategies(
    context: typer.Context,
    out: Annotated[Path, typer.Option(help="Directory for the runs, the comparison and its plot.")],
    strategy: Annotated[
        list[str],
        typer.Option(help="name[:blocks][@cuts], such as 2ps:8,4@pool2; repeat for each run."),
    ],
    tolerance: Annotated[
        float,
        typer.Option(help="Largest relative difference of the losses from the first strategy's."),
    ] = 1e-4,
) -> None:
    """Train the same network under several strategies and compare them with the first.

    Every other option of `lrjax train` may be given too and holds for every run. Each run is a
    process of its own, one after another, so that its memory is its own. Ends with status 1 where
    losses differ by more than the tolerance.
    """
    from lrjax import report, training

    try:
        report.check_writable(out)
        chosen = [training.Strategy.parse(spec) for spec in strategy]
    except ValueError as error:
        _stop(error)
    if any(option.split("=")[0] in ("--num-blocks", "--cuts") for option in context.args):
        _stop("give blocks and cuts within --strategy, as name[:blocks][@cuts]")

    arguments = {
        spec: [*context.args, "--out", str(_directory(out, spec)), *_strategy_options(parsed)]
        for spec, parsed in zip(strategy, chosen, strict=True)
    }
    # The last run's bad option is known before the first run has trained.
    for spec, own in arguments.items():
        _succeeded(spec, app(["train", *own, "--check"], standalone_mode=False) or 0)
    for spec, own in arguments.items():
        command = [sys.executable, "-m", "lrjax.cli", "train", *own]
        run = subprocess.run(command, env=os.environ, stdin=subprocess.DEVNULL)
        _succeeded(spec, run.returncode)
    runs = [report.read_metrics(_directory(out, spec)) for spec in strategy]

    report.write_plot(out / report.COMPARISON_PLOT_FILE, runs)
    differences = [
        report.largest_relative_difference(run["losses"], runs[0]["losses"]) for run in runs
    ]
    report.write_json(
        out / report.COMPARISON_FILE,
        [
            {"largest_loss_difference": difference, **run}
            for difference, run in zip(differences, runs, strict=True)
        ],
    )
    # Files and pipes count as 80 columns, too few for the table.
    Console(width=max(console.width, 110)).print(report.comparison_table(runs))
    console.print(f"plot: {out / report.COMPARISON_PLOT_FILE}", soft_wrap=True, highlight=False)
    if max(differences) > tolerance:
        _stop(
            f"losses differ by {max(differences):.1e} from {runs[0]['label']}, "
            f"more than {tolerance:.0e}",
            FAILED,
        )


def _directory(out: Path, spec: str) -> Path:
    """Where the run of a strategy leaves its files."""
    return out / re.sub("[^a-z0-9]+", "-", spec)


def _succeeded(spec: str, code: int) -> None:
    if code:
        _stop(f"the run {spec} failed with status {code}", code if code > 0 else FAILED)


@app.command()
def memory(
    function: Annotated[
        str | None, typer.Argument(metavar="[MODULE:FUNCTION]", help="What to profile.")
    ] = None,
    args: Annotated[
        str,
        typer.Option(help='Its arguments, "f32[8,128] bf16[3]", or JSON for pytrees of such.'),
    ] = "",
    model: Annotated[
        str | None, typer.Option(help="Instead: loss and gradient of a network, such as vgg16.")
    ] = None,
    image: Annotated[str, typer.Option(help="N or HEIGHTxWIDTH.")] = "1024",
    batch: Annotated[int, typer.Option(help="Images at a time.")] = 1,
    dtype: Annotated[str, typer.Option(help="Of images and computation.")] = "f32",
    width: Annotated[float, typer.Option(help="Multiplier of the network's channels.")] = 1.0,
    head: Annotated[str | None, typer.Option(help="VGG-16's: gap or dense.")] = None,
    norm: Annotated[
        str | None, typer.Option(help="Normalisation: batch, block, frozen, group or none.")
    ] = None,
    strategy: Annotated[str, typer.Option(help="column, stream, 2ps or overl.")] = "column",
    num_blocks: Annotated[
        str | None, typer.Option(help="Row blocks: a number, or one per segment, such as 8,4.")
    ] = None,
    cuts: Annotated[
        str | None, typer.Option(help="Cut into segments at these values, such as pool2,pool4.")
    ] = None,
    target: Annotated[
        str | None, typer.Option(help="The device, present or not; default: the one at hand.")
    ] = None,
    list_targets: Annotated[
        bool, typer.Option("--list-targets", help="List the devices and what they need.")
    ] = False,
    png: Annotated[Path | None, typer.Option(help="Draw the timeline.")] = None,
    html: Annotated[Path | None, typer.Option(help="Write the timeline as a page.")] = None,
    json: Annotated[Path | None, typer.Option(help="Write the whole profile.")] = None,
    top: Annotated[int, typer.Option(help="Rows of each table.")] = 12,
) -> None:
    """What a program needs of a device's memory, and what for; nothing runs.

    Ends with status 3 where it does not fit.
    """
    from lrjax import files, memory
    from lrjax.memory import command, text
    from lrjax.models import registry

    wide = Console(width=max(console.width, 150))
    if list_targets:
        table = text.new_table("target", "GiB", "device", "to install")
        for row in memory.targets():
            needed = "" if row.is_installed else row.install.replace("[", r"\[")
            table.add_row(row.name, f"{row.memory_bytes / 2**30:,.1f}", row.description, needed)
        wide.print(table)
        return
    try:
        command.check_target(target)
    except (ValueError, ImportError) as error:
        _stop(error)
    try:
        for path in filter(None, (png, html, json)):
            files.check_writable(path)
        if (function is None) == (model is None):
            raise ValueError("give either MODULE:FUNCTION or --model")
        if function is not None:
            program = command.function_program(function, args)
        else:
            numbers = command.dtype_of(dtype)
            network = _network(str(model), 1000, width, numbers.name, head=head, norm=norm)
            chosen = _strategy(strategy, num_blocks, cuts)
            size = _size(image, "image")
            if batch < 1:
                raise ValueError(f"batch: got {batch}; use 1 or more")
            pixels = registry.network(str(model)).labels_pixels
            program = command.gradient_program(
                network, chosen, size, batch, numbers, labels_pixels=pixels
            )
    except (ValueError, OSError) as error:
        _stop(error)
    try:
        profile = memory.profile(program.fun, *program.args, target=target)
    except memory.DoesNotFitError as error:
        _stop(error, DOES_NOT_FIT)
    wide.print(*text.profile_tables(profile, top), sep="\n")
    wide.print(command.verdict(profile), soft_wrap=True, highlight=False)
    if png is not None:
        profile.save_png(png)
    if html is not None:
        profile.save_html(html)
    if json is not None:
        files.write_whole(json, profile.to_json())
    if profile.fits is False:
        raise typer.Exit(DOES_NOT_FIT)


@app.command()
def plan(
    model: Annotated[str, typer.Option(help="The network, such as vgg16; see `lrjax train`.")],
    target: Annotated[
        str | None, typer.Option(help="The device, present or not; default: the one at hand.")
    ] = None,
    budget: Annotated[
        str | None,
        typer.Option(help="Such as 8GiB, or 0.5 of the device's memory. Default: all of it."),
    ] = None,
    image: Annotated[str, typer.Option(help="N or HEIGHTxWIDTH.")] = "1024",
    batch: Annotated[int, typer.Option(help="Images at a time.")] = 1,
    dtype: Annotated[str, typer.Option(help="Of images and computation.")] = "f32",
    width: Annotated[float, typer.Option(help="Multiplier of the network's channels.")] = 1.0,
    head: Annotated[str | None, typer.Option(help="VGG-16's: gap or dense.")] = None,
    norm: Annotated[
        str | None, typer.Option(help="Normalisation: batch, block, frozen, group or none.")
    ] = None,
    maximise: Annotated[
        str | None, typer.Option(help="Ask for the largest image (its side) or batch that fits.")
    ] = None,
    save: Annotated[Path | None, typer.Option(help="Write the plan as JSON.")] = None,
    frontier: Annotated[
        Path | None, typer.Option(help="Draw memory against operations, from column to the least.")
    ] = None,
    steps: Annotated[int, typer.Option(help="Points of the frontier.")] = 8,
) -> None:
    """The fastest plan of a training step within a memory budget, proved by XLA.

    With --maximise, the largest square image or batch that fits by column, the best checkpoints and
    lrjax. Ends with status 3 where nothing fits.
    """
    import lrjax
    from lrjax import files
    from lrjax.memory import DoesNotFitError, command
    from lrjax.models import registry
    from lrjax.planner import command as planning

    wide = Console(width=max(console.width, 150))
    try:
        command.check_target(target)
        for path in filter(None, (save, frontier)):
            files.check_writable(path)
        numbers = command.dtype_of(dtype)
        network = _network(model, 1000, width, numbers.name, head=head, norm=norm)
        size = _size(image, "image")
        if batch < 1:
            raise ValueError(f"batch: got {batch}; use 1 or more")
        amount = 1.0 if budget is None else _budget(budget)
        pixels = registry.network(model).labels_pixels
        with console.status("planning") as status:

            def tell(progress: Any) -> None:
                status.update(f"compiling {progress.compilations}: {_told(progress)}")
                if progress.verified_bytes is not None:
                    console.print(_told(progress), highlight=False)

            if maximise is not None:
                _print_largest(
                    planning.largest_by_method(
                        network,
                        maximise,
                        size[0],
                        batch,
                        numbers,
                        amount,
                        target,
                        labels_pixels=pixels,
                        on_progress=tell,
                        on_answer=lambda answer: None,
                    ),
                    maximise,
                    wide,
                )
                return
            fun, args, in_axes = planning.training_call(
                network, size, batch, numbers, labels_pixels=pixels
            )
            call: dict[str, Any] = {
                "in_axes": in_axes, "target": target, "wrt": 0, "on_progress": tell
            }  # fmt: skip
            if frontier is not None:
                curve = lrjax.frontier(fun, *args, steps=steps, **call)
                curve.save_png(frontier, f"{model}, {image}, batch {batch}, {dtype}")
                wide.print(str(curve), highlight=False)
            made = lrjax.plan(fun, *args, budget=amount, **call)
    except DoesNotFitError as error:
        _stop(error, DOES_NOT_FIT)
    except (ValueError, ImportError, OSError) as error:
        _stop(error)
    wide.print(str(made), highlight=False)
    if save is not None:
        made.save(save)


def _told(progress: Any) -> str:
    peaks = f"predicted {progress.predicted_bytes / 2**20:,.0f} MiB"
    if progress.verified_bytes is not None:
        peaks += f", XLA {progress.verified_bytes / 2**20:,.0f} MiB"
    strategies = " + ".join(progress.strategies)
    return f"{strategies}: {progress.operations:.3f} x column's operations, {peaks}"


def _budget(text: str) -> str | float:
    """A fraction where the text is a number without a unit."""
    try:
        return float(text)
    except ValueError:
        return text


def _print_largest(answers: Any, maximise: str, wide: Console) -> None:
    from lrjax.memory import text

    name = "side" if maximise == "image" else "batch"
    table = text.new_table("method", name, "peak MiB", "operations", "compilations", "segments")
    for a in answers:
        table.add_row(
            a.method, f"{a.size:,}", a.peak_mib, f"{a.operations:.3f}", str(a.compilations),
            a.strategies,
        )  # fmt: skip
    wide.print(table)


def _strategy_options(strategy: Any) -> list[str]:
    options = ["--strategy", strategy.name]
    if strategy.num_blocks is not None:
        blocks = strategy.num_blocks
        listed = blocks if isinstance(blocks, tuple) else (blocks,)
        options += ["--num-blocks", ",".join(map(str, listed))]
    if strategy.cuts:
        options += ["--cuts", ",".join(strategy.cuts)]
    return options


def _strategy(name: str, num_blocks: str | None, cuts: str | None) -> Any:
    from lrjax import training

    return training.Strategy(
        name,  # type: ignore[arg-type]  # checked when built
        training.parse_num_blocks(num_blocks) if num_blocks else None,
        tuple(cuts.split(",")) if cuts else (),
    )


def _source(
    model: str,
    data: str,
    image_size: str | None,
    fit: str,
    digits: str,
    num_images: int,
    seed: int,
) -> Any:
    """The images, with labels of the kind that the model learns from."""
    from lrjax.data import DigitPixels, ImageFolder, ScatteredDigits
    from lrjax.models import registry

    labels_pixels = registry.network(model).labels_pixels
    size = _size(image_size) if image_size else None
    if data == "digits":
        canvases = ScatteredDigits(
            size or (512, 512), num_images=num_images, seed=seed, classes=_digit_classes(digits)
        )
        return DigitPixels(canvases) if labels_pixels else canvases
    if labels_pixels:
        raise ValueError(
            f"data: {model} needs a label for every pixel and a folder has one per image; use "
            "--data digits, or another model"
        )
    with console.status(f"checking the images in {data}"):
        return ImageFolder(data, image_size=size, fit=fit)  # type: ignore[arg-type]  # checked there


def _size(text: str, name: str = "image-size") -> tuple[int, int]:
    try:
        numbers = [int(part) for part in text.lower().split("x")]
    except ValueError:
        numbers = []
    if len(numbers) not in (1, 2) or min(numbers) < 1:
        raise ValueError(f"{name}: got {text!r}; use N or HEIGHTxWIDTH, such as 512 or 512x768")
    return numbers[0], numbers[-1]


def _digit_classes(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(f"digits: got {text!r}; use digits with commas, such as 0,1,7") from None


def _network(model: str, num_classes: int, width: float, dtype: str, **settings: Any) -> Any:
    import jax.numpy as jnp

    from lrjax.models import registry

    dtypes = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}
    if dtype not in dtypes:
        raise ValueError(f"dtype: got {dtype!r}; use {' or '.join(dtypes)}")
    return registry.build(
        model, num_classes=num_classes, width=width, dtype=dtypes[dtype], **settings
    )


def _optimizer(name: str, learning_rate: float) -> Any:
    import optax

    if not learning_rate > 0:
        raise ValueError(f"lr: got {learning_rate}; use a positive number")
    if name == "sgd":
        return optax.sgd(learning_rate, momentum=0.9)
    if name == "adam":
        return optax.adam(learning_rate)
    raise ValueError(f"optimizer: got {name!r}; use sgd or adam")


def _announce(source: Any, skipped: list[str]) -> None:
    height, width, _ = source.image_shape
    console.print(
        f"{len(source)} images of {height}x{width}, {len(source.class_names)} classes",
        highlight=False,
    )
    if skipped:
        console.print(f"[yellow]{len(skipped)} unreadable files left out:[/]")
        for file in skipped:
            console.print(f"  {_escaped(file)}", soft_wrap=True, highlight=False)


def _progress() -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[loss]}"),
        TextColumn("{task.fields[seconds]}"),
        TimeElapsedColumn(),
        console=console,
    )


if __name__ == "__main__":
    main()
