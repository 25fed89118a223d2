"""Every model in training mode, by rows and whole: outputs, running statistics, all gradients."""

import pytest

from experiments.small_models import MODELS, training_call
from lrjax.testing import assert_same_as_column

STREAM, TWO_PHASE, OVERLAP = ("stream", 5), ("2ps", 3), ("overl", 2)

# Every model under stream; each of the paper's orders on batch statistics, and where they differ:
# many scales (U-Net), wide windows (ConvNeXt), no statistics.
RUNS = {name: [STREAM] for name in MODELS} | {
    "resnet": [STREAM, TWO_PHASE],
    "resnet_frozen": [STREAM, OVERLAP],
    "unet": [STREAM, OVERLAP],
    "unet_none": [STREAM, TWO_PHASE],
}
QUICK = ("resnet_basic", "unet_none")


def check(name, runs):
    call = training_call(name)
    arguments = call.arguments()
    expected = None
    for strategy, num_blocks in runs:
        expected = assert_same_as_column(
            call,
            arguments,
            (None, 1, None),
            num_blocks=num_blocks,
            strategy=strategy,
            expected=expected,
        )


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in MODELS],
)
def test_model_trains_by_rows_as_column(name):
    check(name, RUNS[name])
