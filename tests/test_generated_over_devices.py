"""Generated networks whose rows several devices share are column too.

Devices are counted when JAX starts, so the cases run in a process of their own, with eight.
``scripts/fuzz.py --devices 2,3,8`` draws as many more as wanted.
"""

import dataclasses
from random import Random

import pytest

from generated import L, Spec, Unsuitable, check
from generated.draw import spec_of
from several_devices import is_process_with, run_with

IS_CHILD = is_process_with(8)
in_child = pytest.mark.skipif(not IS_CHILD, reason="runs in the process with eight devices")


@pytest.mark.skipif(IS_CHILD, reason="starts that process")
@pytest.mark.slow
def test_on_eight_devices():
    run_with(8, __file__)


# Each was found by scripts/fuzz.py, and made smaller.
FOUND = {
    # Behind a map made whole, it divided what is made of that in turn.
    "padding behind whole maps": Spec(
        layers=(L("edge_pad", low=2, high=2), L("over_rows", how="cummax")),
        height=8,
        width=1,
        seed=2885,
        num_blocks=1,
        devices=8,
    ),
    # XLA divided what was behind interior padding, and cut its gradient's strided slice wrongly.
    "interior padding": Spec(
        layers=(L("second_image", how="one_hot"), L("pad", interior=1, value="parameter")),
        head=L("head", how="flatten"),
        height=18,
        width=1,
        seed=9346,
        num_blocks=1,
        devices=2,
    ),
    # XLA's partitioner aborted on the scatter that a sort's gradient is, of eleven rows on two.
    "sort": Spec(
        layers=(L("over_rows", how="sort"), L("scale", op="sub", letters="H")),
        head=L("head", how="square"),
        height=11,
        strategy=("overl", "column"),
        num_blocks=5,
        cuts=2,
        devices=2,
    ),
    "sort along the width, under column": Spec(
        layers=(L("conv", kernel=3), L("channels", letter="W"), L("scale")),
        height=11,
        width=3,
        strategy=("overl", "column"),
        cuts=2,
        devices=3,
    ),
    # XLA gave a divided transform of double precision factors of single precision.
    "fft": Spec(
        layers=(L("over_rows", how="fft"), L("dense", features=3, how="width"), L("dense")),
        layout="NCHW",
        height=9,
        seed=2452,
        cuts=3,
        argnums=(1,),
        devices=3,
    ),
    # XLA wrote a row behind the last one of two, where it belongs into the last.
    "updated slice": Spec(
        layers=(L("conv", kernel=5, padding="VALID"), L("updated_slice", letter="H", start=2)),
        strategy="2ps",
        num_blocks=1,
        devices=2,
    ),
    # XLA cut a convolution wrongly whose halo is higher than a device's share.
    "conv": Spec(
        layers=(L("position"), L("conv", kernel=7, stride=2)),
        head=L("head", how="pool"),
        height=2,
        width=1,
        seed=9193,
        num_blocks=1,
        devices=2,
    ),
    # A call with a derivative of its own, of rows and a constant.
    "softplus": Spec(
        layers=(L("act", name="softplus"),), height=2, strategy="overl", num_blocks=1, devices=2
    ),
    # One branch's result is that of parameters alone.
    "cond": Spec(
        layers=(
            L("conv", kernel=3),
            L(
                "cond",
                predicate="image",
                bodies=((L("scale", op="sub", letters=""),), (L("custom_nonlinear"),)),
            ),
        ),
        height=11,
        width=4,
        devices=3,
    ),
}


@in_child
@pytest.mark.parametrize("name", FOUND)
def test_what_was_once_wrong(name):
    assert check(FOUND[name]).num_blocks >= 1


@in_child
def test_callbacks_in_order_are_refused():
    spec = Spec(layers=(L("conv", kernel=3), L("debug", how="ordered")), height=8, devices=2)
    with pytest.raises(Unsuitable, match="ordered callbacks"):
        check(spec)


@in_child
@pytest.mark.parametrize("devices", [2, 8])
def test_networks_over_devices_are_column(devices):
    compared = 0
    for seed in range(devices * 1000, devices * 1000 + 40):
        drawn = spec_of(Random(seed), most_layers=4, heights=[(8, 30)])
        try:
            check(dataclasses.replace(drawn, devices=devices))
        except Unsuitable:
            continue
        compared += 1
        if compared == 4:
            break
    assert compared == 4
