"""The benchmarks' own arithmetic and bookkeeping; what they measure is theirs to say."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.device_jobs import Job
from experiments.gradcheck import excess_error, max_error
from experiments.vgg16_stack import COLUMN, Method, parse_method
from lrjax.models import UNet

SCRIPTS = Path(__file__).resolve().parents[1] / "scripts"


def _script(name):
    spec = importlib.util.spec_from_file_location(name, SCRIPTS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


bench_device = _script("bench_device")


@pytest.mark.parametrize("method", [COLUMN, Method("stream", 128), Method("checkpoint-block")])
def test_methods_are_written_as_they_are_read(method):
    assert parse_method(str(method)) == method


def test_jobs_survive_json():
    job = Job("measure", 256, "float32", ("column", "2ps/4"))
    assert Job.from_json(job.to_json()) == job


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


class TestDeviceBenchmark:
    def test_ratios_are_to_column_of_the_same_size(self):
        with_ratios = bench_device.with_ratios(
            [
                {"size": 1, "method": "column", "step_s": 2.0, "xla_peak_bytes": 8},
                {"size": 1, "method": "stream/2", "step_s": 3.0, "xla_peak_bytes": 2},
                {"size": 2, "method": "column", "out_of_memory": True, "xla_peak_bytes": 8},
                {"size": 2, "method": "stream/2", "step_s": 3.0, "xla_peak_bytes": 4},
            ]
        )
        assert [m.get("step_s_ratio") for m in with_ratios] == [1.0, 1.5, None, None]
        assert [m["xla_peak_bytes_ratio"] for m in with_ratios] == [1.0, 0.25, 1.0, 0.5]

    def test_a_record_cut_short_is_dropped(self):
        assert bench_device._complete_records('noise\n{"a": 1}\n{"b": {"c": 2}') == [{"a": 1}]

    def test_every_size_has_its_baselines_and_at_least_two_blocks(self):
        *jobs, last = bench_device.planned_jobs("gpu", (1024, 4096), "bfloat16")
        assert last.kind == "predict"
        assert len(last.methods) >= 8
        assert [job.size for job in jobs] == [1024, 1024, 4096, 4096]
        assert [job.methods for job in jobs][::2] == [bench_device.BASELINES] * 2
        blocks = [parse_method(method).num_blocks for job in jobs[1::2] for method in job.methods]
        assert min(blocks) >= 2

    @pytest.mark.parametrize(("source", "ratio"), [("memory_stats", 1.5), ("RSS growth", 3.0)])
    def test_growth_of_a_process_is_compared_without_arguments(self, source, ratio):
        prediction = {"predicted_bytes": 100, "argument_bytes": 50, "peak_bytes": 150}
        assert bench_device.predicted_ratio({**prediction, "peak_source": source}) == ratio

    def test_spent_budget_skips_and_starts_nothing(self, monkeypatch):
        monkeypatch.setattr(bench_device, "run_job", lambda *_: pytest.fail("started a job"))
        benchmark = bench_device.Benchmark(budget_s=0, out=None)
        benchmark.run(Job("check"), jobs_left=1)
        assert [outcome["status"] for outcome in benchmark.outcomes] == ["skipped"]

    @pytest.mark.slow
    def test_a_job_over_its_time_is_ended_and_keeps_what_it_found(self, monkeypatch):
        monkeypatch.setenv("JAX_PLATFORMS", "cpu")
        job = Job("measure", 1024, "float32", ("column",))
        records, outcome = bench_device.run_job(job, timeout_s=25)
        assert outcome["status"] == "timed out"
        assert outcome["seconds"] < 40
        assert [set(record) for record in records] == [{"environment"}]

    @pytest.mark.slow
    def test_a_measuring_job_on_cpu(self, monkeypatch):
        monkeypatch.setenv("JAX_PLATFORMS", "cpu")
        job = Job("measure", 64, "float32", ("column", "checkpoint-block"))
        records, outcome = bench_device.run_job(job, timeout_s=300)
        assert outcome["status"] == "done", outcome["stderr"]
        measurements = [record for record in records if "method" in record]
        assert {m["method"] for m in measurements} == set(job.methods)
        assert all(m["step_s"] > 0 and m["peak_source"] == "RSS growth" for m in measurements)


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
