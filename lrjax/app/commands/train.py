"""`lrjax train`."""

from contextlib import nullcontext
from pathlib import Path
from typing import Annotated, Any

import typer

from lrjax.app.commands import options
from lrjax.app.commands.console import DOES_NOT_FIT, FAILED, app, console, escaped, stop

# Options and the keys of a configuration that they stand for. An option that is not given has its
# key's value, from the configuration file or the default.
KEYS = {
    "data": "data.path",
    "validation": "data.validation",
    "image_size": "data.image_size",
    "fit": "data.fit",
    "digits": "data.digits",
    "num_images": "data.num_images",
    "balanced": "data.balanced",
    "model": "model.name",
    "width": "model.width",
    "head": "model.head",
    "norm": "model.norm",
    "dtype": "model.dtype",
    "strategy": "strategy.name",
    "num_blocks": "strategy.num_blocks",
    "cuts": "strategy.cuts",
    "micro_batches": "strategy.micro_batches",
    "budget": "strategy.budget",
    "plan": "strategy.plan",
    "batch": "train.batch",
    "steps": "train.steps",
    "epochs": "train.epochs",
    "seed": "train.seed",
    "optimizer": "optimizer.name",
    "lr": "optimizer.lr",
    "schedule": "schedule.name",
    "checkpoint_every": "run.checkpoint_every",
    "keep": "run.keep",
    "tensorboard": "run.tensorboard",
    "devices": "mesh.rows",
    "data_devices": "mesh.data",
    "processes": "processes.count",
    "coordinator": "processes.coordinator",
    "process_id": "processes.id",
}


Out = Annotated[Path, typer.Option(help="Directory of the run.")]
Config = Annotated[
    Path | None, typer.Option(help="A .toml or .yaml file; other options override it.")
]
Set = Annotated[
    list[str] | None,
    typer.Option("--set", help="key=value, such as optimizer.weight_decay=1e-4; repeat."),
]
Data = Annotated[
    str | None,
    typer.Option(
        help="Folder with one directory of images per class (for unet: images/ and masks/), or "
        '"digits" (built in). Default: digits.'
    ),
]
Validation = Annotated[
    str | None, typer.Option(help="Held out: a part of the images, such as 0.1, or a folder.")
]
ImageSize = Annotated[
    str | None,
    typer.Option(help="N or HEIGHTxWIDTH. Default: 512 for digits, else the images' own."),
]
Fit = Annotated[
    str | None,
    typer.Option(
        help="Folder images of another size: native (crop and pad) or resize. Default: native."
    ),
]
Digits = Annotated[
    str | None, typer.Option(help="Which digits are the classes of the built-in data.")
]
NumImages = Annotated[
    int | None, typer.Option(help="Canvases of the built-in data. Default: 1024.")
]
Model = Annotated[
    str | None,
    typer.Option(
        help="Network: vgg16, resnet18, resnet34, resnet50, resnet101, convnext_tiny, "
        "mobilenet_v2, efficientnet_b0, densenet121, or unet, which labels every pixel.  "
        "[default: vgg16]"
    ),
]
Width = Annotated[
    float | None, typer.Option(help="Multiplier of the network's channels. Default: 1.0.")
]
Head = Annotated[str | None, typer.Option(help="Of vgg16: gap or dense. Default: gap.")]
Norm = Annotated[
    str | None, typer.Option(help="Normalisation of the others: batch, frozen, group or none.")
]
Dtype = Annotated[
    str | None,
    typer.Option(
        help="Of the computation: float32 or bfloat16; parameters are float32. Default: float32."
    ),
]
Strategy = Annotated[
    str | None,
    typer.Option(help="A strategy of lrjax's; an unknown name lists them all. Default: stream."),
]
MicroBatches = Annotated[
    int | None, typer.Option(help="Parts of the batch that run one after the other.")
]
Budget = Annotated[
    str | None, typer.Option(help="Plan for this much memory instead, such as 8GiB or 0.5.")
]
Plan = Annotated[
    str | None, typer.Option(help="Run a saved plan instead, such as an earlier run's.")
]
Batch = Annotated[int | None, typer.Option(help="Images per step. Default: 2.")]
Balanced = Annotated[
    bool | None, typer.Option("--balanced", help="Let the classes take turns within a batch.")
]
Steps = Annotated[int | None, typer.Option(help="Training steps. Default: 20.")]
Epochs = Annotated[float | None, typer.Option(help="Instead of steps: rounds through the images.")]
Optimizer = Annotated[
    str | None,
    typer.Option(help="Any of optax's, such as adamw, lion or sgd (momentum 0.9). Default: sgd."),
]
Lr = Annotated[float | None, typer.Option(help="Learning rate. Default: 0.001.")]
Schedule = Annotated[
    str | None,
    typer.Option(
        help="Of the learning rate: constant, cosine, warmup, step or exponential.  "
        "[default: constant]"
    ),
]
Seed = Annotated[int | None, typer.Option(help="Of parameters, data and dropout. Default: 0.")]
CheckpointEvery = Annotated[
    int | None, typer.Option(help="Steps between checkpoints. Default: 500.")
]
Keep = Annotated[
    int | None, typer.Option(help="Newest checkpoints that stay; 0: none. Default: 2.")
]
Tensorboard = Annotated[
    bool | None, typer.Option("--tensorboard", help="Write events for TensorBoard.")
]
DataDevices = Annotated[
    int | None, typer.Option(help="Groups of devices that share a batch. Default: 1.")
]
Processes = Annotated[
    str | None,
    typer.Option(
        help="How many processes train together, each started with these options; auto where "
        "Slurm, Open MPI, GKE or a Cloud TPU started them."
    ),
]
Coordinator = Annotated[str | None, typer.Option(help="HOST:PORT of the first process.")]
ProcessId = Annotated[int | None, typer.Option(help="The number of this process, from 0.")]
Resume = Annotated[
    bool, typer.Option("--resume", help="Go on after the newest checkpoint in --out.")
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace what a run left in --out.")]
Check = Annotated[
    bool,
    typer.Option("--check", help="Only look whether everything fits, and say what; train nothing."),
]


@app.command()
def train(
    out: Out,
    config: Config = None,
    set_: Set = None,
    data: Data = None,
    validation: Validation = None,
    image_size: ImageSize = None,
    fit: Fit = None,
    digits: Digits = None,
    num_images: NumImages = None,
    model: Model = None,
    width: Width = None,
    head: Head = None,
    norm: Norm = None,
    dtype: Dtype = None,
    strategy: Strategy = None,
    num_blocks: options.NumBlocks = None,
    cuts: options.Cuts = None,
    micro_batches: MicroBatches = None,
    budget: Budget = None,
    plan: Plan = None,
    batch: Batch = None,
    balanced: Balanced = None,
    steps: Steps = None,
    epochs: Epochs = None,
    optimizer: Optimizer = None,
    lr: Lr = None,
    schedule: Schedule = None,
    seed: Seed = None,
    checkpoint_every: CheckpointEvery = None,
    keep: Keep = None,
    tensorboard: Tensorboard = None,
    devices: options.Devices = None,
    data_devices: DataDevices = None,
    processes: Processes = None,
    coordinator: Coordinator = None,
    process_id: ProcessId = None,
    resume: Resume = False,
    overwrite: Overwrite = False,
    check: Check = False,
) -> None:
    """Train a network: a log, checkpoints, and in the end metrics, a plot and the parameters.

    Memory is measured two ways: what XLA plans for the compiled step, and how much the process
    grows while it trains. --resume alone goes on with the run's own settings.
    """
    values = locals()
    given = {KEYS[name]: values[name] for name in KEYS if values[name] is not None}
    _train(out, config, set_ or [], given, resume=resume, overwrite=overwrite, check=check)


def _train(
    out: Path,
    file: Path | None,
    settings: list[str],
    given: dict[str, Any],
    *,
    resume: bool,
    overwrite: bool,
    check: bool,
) -> None:
    """Trains, and turns what goes wrong into a message and a status."""
    # Imported here so that `--help` and a mistyped option do not wait for JAX.
    from lrjax.app import config as configs
    from lrjax.app import processes, runs
    from lrjax.app.commands.progress import TerminalListener
    from lrjax.app.data import UnreadableImageError
    from lrjax.app.diagnosis import OutOfMemoryError
    from lrjax.app.interruption import StoppedError
    from lrjax.app.training import DivergedError
    from lrjax.memory import DoesNotFitError

    try:
        asked = {
            **(configs.read(file) if file else {}),
            **configs.assignments(settings),
            **given,
        }
        if resume and overwrite:
            raise ValueError("overwrite: --resume goes on with the run; give one of them")
        chosen = runs.config_to_resume(out, asked) if resume else configs.Config.of(asked)
        joined = chosen.processes
        processes.start(joined.count, joined.coordinator, joined.id)
        if check:
            told = TerminalListener() if processes.is_first() else None
            checked = runs.check(chosen, out, resume=resume, overwrite=overwrite, listener=told)
            if told is not None:
                told.checked(checked)
            return
        with TerminalListener() if processes.is_first() else nullcontext() as listener:
            result = runs.run(
                chosen,
                out,
                resume=resume,
                overwrite=overwrite,
                options=_options(chosen),
                listener=listener,
            )
    except DoesNotFitError as error:
        stop(error, DOES_NOT_FIT)
    except StoppedError as error:
        stop(error, error.exit_status)
    except (DivergedError, OutOfMemoryError, UnreadableImageError, OSError) as error:
        stop(error, FAILED)
    except (ValueError, TypeError, ImportError) as error:
        stop(error)
    if processes.is_first():
        _print_result(result, out)


def _options(config: Any) -> dict[str, Any]:
    """What `metrics.json` has as options: by the names of the command line, then by all keys."""
    flat = config.flat()
    by_key = {key: value for key, value in flat.items() if key not in KEYS.values()}
    return {**{name: flat[key] for name, key in KEYS.items()}, **by_key}


def _print_result(result: Any, out: Path) -> None:
    from lrjax.text import MIB

    training = result.training
    held_out = ""
    if result.evaluation is not None:
        held_out = f"held-out accuracy {result.evaluation.accuracy:.4f}, "
    losses = ""
    if training.losses:  # none where the log of a finished run is gone
        losses = f"loss {training.losses[0]:.4f} -> {training.losses[-1]:.4f}, "
    console.print(
        f"{result.execution.label}: {losses}{held_out}"
        f"{training.seconds_per_step:.3f} s/step, compiled in {training.compile_seconds:.1f} s; "
        f"peak memory: XLA {training.memory.xla_peak / MIB:.0f} MiB, "
        f"RSS {training.memory.rss / MIB:.0f} MiB; written to {escaped(out)}",
        soft_wrap=True,
        highlight=False,
    )
