"""Marks that several test modules share."""

import pytest

from lrjax.memory import is_installed


def slow(*values):
    """Parameters that are not needed at every change."""
    return [pytest.param(value, marks=pytest.mark.slow) for value in values]


# OverL differs from 2PS in its schedule and in what its forward pass keeps.
STRATEGIES = ["stream", "2ps", *slow("overl")]

# .ci/run installs the plugin, so that these run there; no GPU is wanted.
COMPILES_FOR_H200 = [
    pytest.mark.cuda,
    pytest.mark.skipif(
        not is_installed("h200"), reason='needs XLA\'s CUDA plugin: pip install "lrjax[cuda]"'
    ),
]
