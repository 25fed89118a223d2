"""The benchmarks' own arithmetic and bookkeeping; what they measure is theirs to say."""

import importlib.util
import json
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import device_profile, report
from experiments.gradcheck import excess_error, max_error
from experiments.vgg16_stack import COLUMN, Method, parse_method
from lrjax.models import UNet

pytestmark = pytest.mark.usefixtures("quick_processes")

SCRIPTS = Path(__file__).resolve().parents[1] / "scripts"


def _script(name):
    spec = importlib.util.spec_from_file_location(name, SCRIPTS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


device_check = _script("device_check")


@pytest.mark.parametrize("method", [COLUMN, Method("stream", 128), Method("checkpoint-block")])
def test_methods_are_written_as_they_are_read(method):
    assert parse_method(str(method)) == method


class TestErrors:
    def test_max_error_is_relative_to_each_leafs_largest_value(self):
        assert max_error([jnp.array([1.0, 3.0]), jnp.array([100.0])], [[1.0, 4.0], [100.0]]) == 0.25

    def test_max_error_of_zeros_is_absolute(self):
        assert max_error([jnp.array([0.5])], [jnp.array([0.0])]) == 0.5

    @pytest.mark.parametrize("values", [[jnp.nan], [jnp.inf]])
    def test_values_not_finite_are_no_match(self, values):
        assert not max_error(jnp.array(values), jnp.array([1.0])) <= 1e30

    def test_nan_in_one_leaf_is_not_lost_among_others(self):
        good = jnp.array([1.0])
        for values in ([good, good * jnp.nan], [good * jnp.nan, good]):
            assert np.isnan(max_error(values, [good, good]))
            assert np.isnan(excess_error(values, [good, good], [good, good]))

    def test_excess_error_compares_with_columns_own(self):
        truth = [jnp.array([1.0, 0.0])]
        assert excess_error([jnp.array([1.2, 0.0])], [jnp.array([1.1, 0.0])], truth) == (
            pytest.approx(2.0)
        )


class TestDeviceCheck:
    COMMAND = ("bash", SCRIPTS / "device_check.sh")

    @pytest.fixture(autouse=True)
    def on_cpu(self, monkeypatch):
        monkeypatch.setenv("JAX_PLATFORMS", "cpu")
        monkeypatch.setenv("PYTHON", sys.executable)

    def test_cheap_parts_on_tiny_sizes(self, tmp_path):
        command = [*self.COMMAND, tmp_path, "--quick", "--only", "pools"]
        process = subprocess.run(command, capture_output=True, text=True)
        assert process.returncode == 0, process.stdout + process.stderr
        assert process.stdout.endswith("no GPU: times and peaks were not judged\n")
        found = report.json_lines(tmp_path / "results.jsonl")
        pools = [record for record in found if record["part"] == "pools"]
        assert [record["pool"]["size"] for record in pools] == [2, 3]
        assert pools[0]["norm_error"] == 0
        jobs = [record["job"] for record in found if record["part"] == "outcome"]
        assert jobs == ["environment", "pools"]

    @pytest.mark.slow
    def test_a_run_that_is_killed_keeps_what_it_found(self, tmp_path):
        command = [*self.COMMAND, tmp_path, "--quick", "--only", "checks:vgg:float32"]
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        path = tmp_path / "results.jsonl"
        while not any(r["part"] == "checks" for r in report.json_lines(path)):
            assert process.poll() is None
            time.sleep(0.1)
        process.terminate()
        process.wait()
        command = [sys.executable, SCRIPTS / "device_check.py", tmp_path, "--summary"]
        printed = subprocess.run(command, capture_output=True, text=True).stdout
        assert "checks passed" in printed
        assert "0 of 0" not in printed

    @pytest.mark.slow
    def test_a_job_over_its_time_is_recorded(self, tmp_path):
        command = [*self.COMMAND, tmp_path, "--quick", "--only", "steps", "--limit", "6"]
        assert subprocess.run(command, stdout=subprocess.DEVNULL).returncode == 1
        found = report.json_lines(tmp_path / "results.jsonl")
        assert found[-1]["job"] == "steps"
        assert found[-1]["status"] == "timed out"

    def test_every_part_has_its_time(self):
        for seconds in ("budget_s", "quick_s"):
            assert (
                sum(getattr(part, seconds) for part in device_check.PARTS) <= device_check.LIMIT_S
            )

    def test_a_record_cut_short_is_left_out(self, tmp_path):
        path = tmp_path / "results.jsonl"
        assert report.json_lines(path) == []
        path.write_text('{"a": 1}\n{"b": {"c": 2}')
        assert report.json_lines(path) == [{"a": 1}]

    @pytest.mark.parametrize(("step_s", "is_right"), [(1.2, True), (1.3, False), (0.7, False)])
    def test_predictions_are_judged_on_gpus(self, step_s, is_right):
        step = {"part": "steps", "program": "vgg16-2048/column", "step_s": step_s}
        found = [{**step, "roofline_s": 1.0, "peak_bytes": 8, "xla_peak_bytes": 8}]
        for platform in ("gpu", "cpu"):
            text, right = device_check.summary(
                [{"part": "environment", "platform": platform}, *found]
            )
            assert right == (is_right or platform == "cpu")
            assert ("time is" in text) != right

    @pytest.mark.parametrize(
        "record",
        [
            {"part": "outcome", "job": "graphs", "status": "failed (-6)"},
            {"part": "steps", "program": "vgg16-2048/column", "error": "out of memory"},
            {"part": "plan", "plan": "vgg16-4096/half", "error": "no plan"},
            {"part": "checks", "passed": False, "error": "differs"}
            | {"network": "vgg", "dtype": "float32", "way": "stream"},
        ],
    )
    def test_what_went_wrong_is_told(self, record):
        text, right = device_check.summary([{"part": "environment", "platform": "cpu"}, record])
        assert not right
        assert "1 things are not right" in text

    def test_kernels_are_grouped_by_name(self):
        events = [
            ("cudnn-conv-bw-filter.3", "sm90_xmma_wgrad_implicit_gemm", 0.0, 3e6),
            ("cudnn-conv.1", "sm90_xmma_fprop_implicit_gemm", 4e6, 3e6),
            ("input_scatter_fusion", "input_scatter_fusion", 7e6, 3e6),
            ("loop_convert_fusion", "loop_convert_fusion", 8e6, 3e6),
        ]
        found = device_profile.by_kernel(events, steps=1)
        groups = {name: own["ms"] for name, own in found["groups"].items()}
        names = ("weight gradients", "convolution", "scatter", "elementwise")
        assert groups == dict.fromkeys(names, 3.0)
        assert found["gaps_ms"] == 1.0


class TestOnePass:
    def test_next_to_nothing_is_done_again(self, monkeypatch):
        monkeypatch.syspath_prepend(str(SCRIPTS))
        bench = _script("bench_one_pass")
        model = UNet(norm="none", num_classes=bench.CLASSES, width=1 / 4)
        loss = bench.loss_of(model)
        args = jax.eval_shape(lambda: bench.arguments(model, 512))
        columns = bench.operations("column", loss, args)
        for method in ("loss/16", "gradient/32"):
            again = bench.operations(method, loss, args) / columns
            assert 1 < again <= bench.LIMITS["operations"], method

    @pytest.mark.slow
    def test_script(self, tmp_path):
        out = tmp_path / "one_pass.json"
        command = [SCRIPTS / "bench_one_pass.py", "--size", "32", "--width", "0.04"]
        command += ["--blocks", "2", "--repeats", "1", "--out", out]
        process = subprocess.run([sys.executable, *command], capture_output=True, text=True)
        assert process.returncode == 0, process.stderr
        programs = json.loads(out.read_text())["programs"]
        assert [p["method"] for p in programs] == ["column", "loss/2", "gradient/2"]
        assert all(p["gradient_error"] <= 1e-5 for p in programs)


@pytest.mark.slow
def test_cpu_benchmark_writes_what_it_prints(tmp_path):
    out = tmp_path / "bench.json"
    command = [SCRIPTS / "bench_cpu.py", "--size", "64", "--repeats", "1", "--out", out]
    command += ["--methods", "checkpoint-block"]
    process = subprocess.run([sys.executable, *command], capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    result = json.loads(out.read_text())
    assert [m["method"] for m in result["methods"]] == ["column", "checkpoint-block"]
    assert result["methods"][0]["time_ratio"] == result["methods"][0]["temp_ratio"] == 1.0
    assert result["methods"][1]["gradient_error"] <= 1e-5
    assert all(m["method"] in process.stdout for m in result["methods"])


def test_a_trace_keeps_the_compile_times_of_the_same_program(tmp_path):
    bench = _script("bench_compile")

    def record(equations, trace, **compiled):
        times = {"trace_s": trace, "lower_s": 0.0, "equations": equations, **compiled}
        own = {"network": "unet", "target": "cpu", "label": ""}
        ratios = {"trace_ratio": trace} | ({"total_ratio": 9.0} if compiled else {})
        return {**own, "column": dict(times), "stream": dict(times), **ratios}

    path = tmp_path / "times.json"
    path.write_text(json.dumps({"records": [record(10, 3.0, compile_s=7.0, peak_bytes=5)]}))
    (same,) = bench.merged(path, [record(10, 2.0)])
    assert same["stream"] == record(10, 2.0, compile_s=7.0, peak_bytes=5)["stream"]
    assert (same["trace_ratio"], same["total_ratio"]) == (2.0, 9.0)
    (other,) = bench.merged(path, [record(11, 2.0)])
    assert "compile_s" not in other["stream"]
    assert "total_ratio" not in other
