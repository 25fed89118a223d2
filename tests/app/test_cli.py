"""The command trains, leaves whole files behind, and answers bad input with what to do."""

import json

import flax.serialization
import pytest
import typer
from PIL import Image
from typer.testing import CliRunner

from lrjax import files
from lrjax.app import checkpoints, logs, report, saved
from lrjax.app.cli import app

pytestmark = pytest.mark.usefixtures("quick_processes")

SMALL = [
    *("--image-size", "32", "--width", "0.03125", "--digits", "0,1"),
    *("--batch", "1", "--steps", "2", "--lr", "1e-4"),
]


def invoke(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_train_writes_metrics_plot_and_parameters(tmp_path):
    result = invoke("train", "--out", tmp_path / "run", "--strategy", "column", *SMALL)
    assert result.exit_code == 0, result.output
    assert {path.name for path in (tmp_path / "run").iterdir()} == {
        checkpoints.DIRECTORY,
        logs.LOG_FILE,
        logs.SAMPLES_FILE,
        report.METRICS_FILE,
        report.PARAMETERS_FILE,
        report.PLOT_FILE,
        saved.CONFIG_FILE,
    }
    metrics = json.loads((tmp_path / "run" / report.METRICS_FILE).read_text())
    assert len(metrics["losses"]) == len(metrics["step_seconds"]) == 2
    assert metrics["xla_peak_bytes"] > metrics["xla_temp_bytes"] > 0
    assert metrics["options"]["image_size"] == "32"
    parameters = flax.serialization.msgpack_restore(
        (tmp_path / "run" / report.PARAMETERS_FILE).read_bytes()
    )
    assert parameters["features"]["conv1_1"]["kernel"].shape == (3, 3, 3, 2)
    with Image.open(tmp_path / "run" / report.PLOT_FILE) as plot:
        assert plot.width > 500


@pytest.mark.parametrize("command", typer.main.get_command(app).commands.values(), ids=str)
def test_help_names_every_option(command):
    result = CliRunner().invoke(app, [command.name, "--help"], env={"COLUMNS": "200"})
    assert result.exit_code == 0, result.exception
    for parameter in command.params:
        if parameter.param_type_name == "option":
            assert parameter.opts[0] in result.output
            assert parameter.help.split()[0] in result.output  # [brackets] are no markup


@pytest.mark.parametrize(
    ("option", "message"),
    [("--num-blocks", "give these within --strategy"), ("--processes", "one process after the")],
)
def test_comparisons_refuse_what_is_each_runs_own(option, message, tmp_path):
    found = invoke(
        "compare-strategies", "--out", tmp_path / "out", "--strategy", "column", option, 2
    )
    assert found.exit_code == 2
    assert message in found.output


@pytest.mark.slow
def test_train_reads_a_folder_and_names_what_it_leaves_out(tmp_path):
    for name in ("ant", "bee"):
        (tmp_path / "images" / name).mkdir(parents=True)
        Image.new("RGB", (40, 32)).save(tmp_path / "images" / name / "0.png")
    (tmp_path / "images" / "ant" / "broken.png").write_text("no image")
    result = invoke(
        *("train", "--out", tmp_path / "run", "--data", tmp_path / "images"),
        *("--strategy", "column", "--width", 0.03125, "--batch", 2, "--steps", 1),
    )
    assert result.exit_code == 0, result.output
    assert "2 images of 32x40, 2 classes" in result.output
    assert "1 unreadable files left out" in result.output
    metrics = json.loads((tmp_path / "run" / report.METRICS_FILE).read_text())
    assert [file.split(":")[0] for file in metrics["skipped_files"]] == [
        str(tmp_path / "images" / "ant" / "broken.png")
    ]


@pytest.mark.slow
def test_unet_learns_every_pixel_and_leaves_its_running_statistics(tmp_path):
    arguments = ["--strategy", "column", *SMALL, "--model", "unet"]
    result = invoke("train", "--out", tmp_path / "run", *arguments)
    assert result.exit_code == 0, result.output
    assert "3 classes" in result.output
    statistics = flax.serialization.msgpack_restore(
        (tmp_path / "run" / report.STATISTICS_FILE).read_bytes()
    )
    running = statistics["batch_stats"]["down1"]["norm1"]["mean"]
    assert running.shape == (2,)
    assert (running != 0).all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data", "nowhere"], "nowhere is not a directory"),
        (["--strategy", "rows"], "strategy: got 'rows'"),
        (["--num-blocks", "few"], "num_blocks: got 'few'"),
        (["--image-size", "big"], "image-size: got 'big'"),
        (["--image-size", "16"], "at least 32"),
        (["--digits", "0"], "two or more different digits"),
        (["--digits", "one,two"], "digits: got 'one,two'"),
        (["--model", "alexnet"], "model: got 'alexnet'; use vgg16"),
        (["--head", "mlp"], "head: got 'mlp'; use gap or dense"),
        (["--norm", "batch"], "norm: got 'batch'; vgg16 has no such choice"),
        (["--model", "resnet50", "--head", "gap"], "head: got 'gap'; resnet50 has no such choice"),
        (["--model", "unet", "--data", "."], "unet needs a label for every pixel"),
        (["--dtype", "float8"], "dtype: got 'float8'"),
        (["--width", "0"], "width: got 0"),
        (["--optimizer", "lions"], "optimizer: got 'lions'; did you mean 'lion'?"),
        (["--lr", "-1"], "lr: got -1"),
        (["--steps", "0"], "steps: got 0"),
        (["--batch", "0"], "batch: got 0"),
        (["--num-blocks", "33"], "num_blocks"),
        (["--cuts", "pool9"], "pool9"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_input_stops_before_training_and_writes_nothing(tmp_path, arguments, message):
    result = invoke("train", "--out", tmp_path / "run", *SMALL, *arguments)
    assert result.exit_code == 2
    assert message in result.output
    assert "Traceback" not in result.output
    assert not (tmp_path / "run").exists()


def test_output_that_cannot_be_written_is_refused_before_training(tmp_path):
    (tmp_path / "file").write_text("in the way")
    result = invoke("train", "--out", tmp_path / "file", *SMALL)
    assert result.exit_code == 2
    assert "out: cannot write to" in result.output
    assert (tmp_path / "file").read_text() == "in the way"


def test_divergence_ends_with_a_message_and_no_results(tmp_path):
    arguments = ["--strategy", "column", *SMALL, "--lr", "1e30", "--steps", "9"]
    result = invoke("train", "--out", tmp_path / "run", *arguments)
    assert result.exit_code == 1
    assert "use a smaller learning rate" in result.output
    assert "images: image" in result.output
    assert "parameters that are not finite before the step: " in result.output
    assert not (tmp_path / "run" / report.METRICS_FILE).exists()
    assert not (tmp_path / "run" / report.PARAMETERS_FILE).exists()


@pytest.mark.slow
def test_comparison_runs_each_strategy_and_passes_the_other_options_on(tmp_path):
    strategies = ["--strategy", "column", "--strategy", "stream:4"]
    result = invoke("compare-strategies", "--out", tmp_path, *strategies, *SMALL)
    assert result.exit_code == 0, result.output
    comparison = json.loads((tmp_path / report.COMPARISON_FILE).read_text())
    assert [run["label"] for run in comparison] == ["column", "stream"]
    assert comparison[1]["strategy"]["num_blocks"] == 4
    assert comparison[1]["options"]["digits"] == "0,1"
    assert comparison[0]["largest_loss_difference"] == 0
    assert (tmp_path / report.COMPARISON_PLOT_FILE).exists()
    for text in ("column", "stream", "RSS", f"{comparison[0]['losses'][-1]:.6f}"):
        assert text in result.output


def test_comparison_fails_where_losses_differ(tmp_path, monkeypatch):
    curves = iter([[1.0, 2.0], [1.0, 2.001]])
    monkeypatch.setattr("subprocess.run", lambda *_, **__: type("Done", (), {"returncode": 0}))
    monkeypatch.setattr(report, "read_metrics", lambda _: fake_metrics(next(curves)))
    strategies = ["--strategy", "column", "--strategy", "stream:4"]
    result = invoke("compare-strategies", "--out", tmp_path, *strategies)
    assert result.exit_code == 1
    assert "losses differ by 5.0e-04" in result.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--strategy", "column", "--strategy", "rows"], "strategy: got 'rows'"),
        (["--strategy", "stream", "--num-blocks", "4"], "within --strategy"),
        (["--strategy", "column", "--steps", "0"], "the run column failed with status 2"),
        (["--strategy", "column", "--strategy", "stream:33", *SMALL], "the run stream:33 failed"),
    ],
)
def test_bad_comparison_is_refused(tmp_path, arguments, message):
    result = invoke("compare-strategies", "--out", tmp_path / "out", *arguments)
    assert result.exit_code == 2
    assert message in result.output
    assert not (tmp_path / "out").exists()  # no run has trained


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path, monkeypatch):
    target = tmp_path / "metrics.json"
    files.write_whole(target, b"old")

    def broken(*_):
        raise OSError("disk full")

    monkeypatch.setattr("os.replace", broken)
    with pytest.raises(OSError, match="disk full"):
        files.write_whole(target, b"new")
    assert target.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [target]


def fake_metrics(losses):
    return {
        "label": "fake",
        "strategy": {"name": "stream", "num_blocks": None, "cuts": [], "micro_batches": 1},
        "losses": losses,
        "median_step_seconds": 1.0,
        "xla_peak_bytes": 1,
        "rss_peak_bytes": 1,
    }
