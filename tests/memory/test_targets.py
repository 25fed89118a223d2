"""The table of devices, and what is said when a name is not in it."""

import pytest

from lrjax.memory import TARGETS
from lrjax.memory.targets import find, row_of, target_config


@pytest.mark.parametrize("name", TARGETS)
def test_every_row_is_found_under_its_name(name):
    assert find(name).name == name


@pytest.mark.parametrize(
    ("given", "nearest"), [("h20", "h200"), ("H100", "h100"), ("gh200", "h200"), ("v5e", "tpu-v5e")]
)
def test_unknown_target_lists_the_table_and_names_the_nearest(given, nearest):
    with pytest.raises(ValueError, match=f"Did you mean '{nearest}'") as raised:
        find(given)
    assert repr(given) in str(raised.value)
    assert all(name in str(raised.value) for name in TARGETS)


@pytest.mark.parametrize(
    ("platform", "kind", "name"),
    [
        ("cpu", "cpu", "cpu"),
        ("gpu", "NVIDIA H100 80GB HBM3", "h100"),
        ("gpu", "NVIDIA H200", "h200"),
        ("gpu", "NVIDIA Quadro 9000", "h200"),
        ("tpu", "TPU v4", "tpu-v4"),
        ("tpu", "TPU v99", "tpu-v4"),
    ],
)
def test_a_device_has_a_row_of_its_platform(platform, kind, name):
    assert row_of(platform, kind) == name


def test_names_are_unique_and_memory_is_known():
    assert len({t.description for t in TARGETS.values()}) == len(TARGETS)
    assert all(t.memory_bytes >= 8 * 2**30 for name, t in TARGETS.items() if name != "cpu")


def test_target_config_carries_the_row():
    text = target_config(find("h200"))
    assert "core_count: 132" in text
    assert f"device_memory_size: {144_384 * 2**20}" in text
    assert 'platform_name: "CUDA"' in text
