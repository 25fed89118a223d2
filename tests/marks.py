"""Marks that several test modules share."""

import pytest

from lrjax.memory import is_installed

# OverL differs from 2PS in its schedule and in what its forward pass keeps.
STRATEGIES = ["stream", "2ps", pytest.param("overl", marks=pytest.mark.slow)]

# .ci/run installs the plugin, so that these run there; no GPU is wanted.
COMPILES_FOR_H200 = [
    pytest.mark.cuda,
    pytest.mark.skipif(
        not is_installed("h200"), reason='needs XLA\'s CUDA plugin: pip install "lrjax[cuda]"'
    ),
]
