"""XLA's dumps, as jax 0.10 and 0.12 write them for a CPU, a GPU and a TPU, read and explained."""

import gzip
from pathlib import Path

import pytest

from lrjax import memory
from lrjax.memory.assignment import read_dump, schedule
from lrjax.memory.attribution import layer_of, operation_of
from lrjax.memory.lifetimes import pieces, usage
from lrjax.memory.wire import DecodeError, Message

DATA = Path(__file__).parent / "data"
# XLA's own peaks, as make_dumps.py printed them.
PEAKS = {
    "cpu-jax0.10.2": 59838636,
    "cpu-jax0.12.0.1": 47255724,
    "h200-jax0.10.2": 51974168,
    "h200-jax0.12.0.1": 42536984,
    "tpu-v5e-jax0.10.2": 70187520,
    "tpu-v5e-jax0.12.0.1": 45021696,
}


@pytest.fixture(params=PEAKS)
def sample(request, tmp_path):
    """A name, and the dump it stands for."""
    dump = tmp_path / "module_0000.jit_loss.sm_9.0_gpu_after_optimizations.hlo.pb"
    dump.write_bytes(gzip.decompress((DATA / f"{request.param}.hlo.pb.gz").read_bytes()))
    return request.param, dump


def test_samples_of_every_backend_and_version_are_here():
    assert {p.name.removesuffix(".hlo.pb.gz") for p in DATA.glob("*.gz")} == set(PEAKS)


class TestSample:
    def test_peak_is_xlas(self, sample):
        name, dump = sample
        profile = memory.profile_dump(dump)
        # A CPU's block of temporaries is a whole number of cache lines.
        assert profile.peak_bytes == pytest.approx(PEAKS[name], abs=512)
        assert max(profile.timeline()) == profile.peak_bytes
        assert profile.timeline()[profile.peak_step] == profile.peak_bytes
        assert sum(b.bytes for b in profile.at_peak()) == profile.peak_bytes

    def test_layers_and_kinds_explain_the_peak(self, sample):
        profile = memory.profile_dump(sample[1])
        assert sum(profile.by_layer().values()) == profile.peak_bytes
        assert sum(profile.by_kind().values()) == profile.peak_bytes
        named = {k: v for k, v in profile.by_layer().items() if not k.startswith("(")}
        assert set(named) <= {"conv", "rounds", "loss"}
        assert sum(named.values()) >= 0.9 * profile.peak_bytes
        assert profile.by_kind()["saved maps"] > 0
        assert set(profile.by_kind()) <= set(memory.KINDS)

    def test_arguments_and_gradients_are_there_throughout(self, sample):
        profile = memory.profile_dump(sample[1])
        last = len(profile.instructions) - 1
        arguments = [b for b in profile.buffers if b.kind == "arguments"]
        assert {"params['kernel']", "params['dense']", "images"} == {
            b.operation.replace('"', "'").replace("\\", "") for b in arguments
        }
        gradients = [b for b in profile.buffers if b.kind == "parameter gradients"]
        assert {(64, 64), (3, 3, 8, 64)} <= {tuple(sorted(b.shape)) for b in gradients} | {
            b.shape for b in gradients
        }
        for b in arguments:
            assert (b.start, b.end) == (0, last)

    def test_operations_and_lines_are_named(self, sample):
        profile = memory.profile_dump(sample[1])
        lines = {b.source for b in profile.at_peak() if b.layer in ("conv", "rounds")}
        assert lines
        assert all(line.startswith("make_dumps.py:") for line in lines if line)
        assert any(b.operation == "conv_general_dilated" for b in profile.buffers)

    def test_memory_is_never_given_twice(self, sample):
        assignment = read_dump(sample[1])
        steps = schedule(assignment)
        found = pieces(assignment, steps)
        values = [v for piece in found for v in piece.values]
        assert len(values) == len(set(values))
        assert all(0 <= p.start <= p.end < len(steps) for p in found)
        assert min(usage(found, len(steps))) >= 0

    def test_cut_off_file_is_refused(self, sample):
        _, dump = sample
        content = dump.read_bytes()
        for size in (len(content) // 3, len(content) - 7):
            dump.write_bytes(content[:size])
            with pytest.raises(ValueError, match="not an XLA dump lrjax can read"):
                memory.profile_dump(dump)


def test_directory_gives_its_largest_program(tmp_path):
    sample = gzip.decompress((DATA / "h200-jax0.12.0.1.hlo.pb.gz").read_bytes())
    inner = tmp_path / "module_0001"
    inner.mkdir()
    (inner / "module_0001.jit_loss.after_optimizations.hlo.pb").write_bytes(sample)
    (tmp_path / "module_0000.jit_f.after_optimizations.hlo.pb").write_bytes(b"")
    profile = memory.profile_dump(tmp_path, target="rtx3080")
    assert profile.peak_bytes == PEAKS["h200-jax0.12.0.1"]
    assert profile.capacity_bytes == 10 * 2**30
    assert profile.fits
    assert len(repr(read_dump(tmp_path))) < 100


@pytest.mark.parametrize("content", [b"", b"not a dump at all", bytes(range(256))])
def test_other_files_are_refused(tmp_path, content):
    file = tmp_path / "x.hlo.pb"
    file.write_bytes(content)
    with pytest.raises(ValueError, match="xla_dump_hlo_as_proto"):
        memory.profile_dump(file)


def test_directory_without_dump_says_how_to_make_one(tmp_path):
    with pytest.raises(FileNotFoundError, match="--xla_dump_to"):
        memory.profile_dump(tmp_path)


class TestWire:
    """Messages written by hand, after protobuf's description of its encoding."""

    def test_unknown_fields_are_skipped(self):
        # 1: 150; 2: "hi"; 99: fixed64; 98: fixed32
        message = Message(b"\x08\x96\x01\x12\x02hi\x99\x06" + bytes(8) + b"\x95\x06" + bytes(4))
        assert message.integer(1) == 150
        assert message.text(2) == "hi"
        assert message.integer(3) == 0

    def test_repeated_integers_packed_or_not(self):
        assert Message(b"\x08\x01\x08\x02").integers(1) == [1, 2]
        assert Message(b"\x0a\x02\x01\x02").integers(1) == [1, 2]

    def test_negative_integers(self):
        assert Message(b"\x08" + b"\xff" * 9 + b"\x01").integer(1) == -1

    @pytest.mark.parametrize("content", [b"\x08", b"\x12\x05ab", b"\x0b", b"\x00\x00"])
    def test_broken_messages_are_refused(self, content):
        with pytest.raises(DecodeError):
            Message(content)


@pytest.mark.parametrize(
    ("op_name", "layer", "operation"),
    [
        ("jit(f)/jvp(Net)/conv1/conv_general_dilated", "Net/conv1", "conv_general_dilated"),
        ("jit(f)/transpose(jvp(Net))/conv1/add", "Net/conv1", "add"),
        ("jit(f)/jvp()/while/body/closed_call/cond/branch_1_fun/Net/pool/max", "Net/pool", "max"),
        ("jit(f)/jvp(Net)/conv1/jit(relu)/max", "Net/conv1", "max"),
        ("jit(f)/a/checkpoint/rematted_computation/a/b/sin", "a/b", "sin"),
        ("jit(f)/a/a/sin", "a/a", "sin"),
        ("jit(f)/transpose(jvp(jvp(rematted_computation)))/Net/line_buffers/slice", "Net", "slice"),
        ("jit(f)/transpose(jvp())/mul;jit(f)/jvp(loss)/reduce_sum", "loss", "mul"),
        ("jit(f)/jvp(a/b)/mul", "a/b", "mul"),
        ("params['kernel']", "", "params['kernel']"),
        ("", "", ""),
    ],
)
def test_name_stacks(op_name, layer, operation):
    assert layer_of(op_name) == layer
    assert operation_of(op_name) == operation
