"""LR-CNN's evaluation (arXiv 2401.11471), one module per table or figure.

    python -m experiments.paper.limits --quick       # one experiment, on a CPU, in minutes
    python -m experiments.paper.limits               # full settings
    bash scripts/regenerate.sh --quick               # all of them, then all figures
    bash scripts/regenerate.sh --figures             # tables and figures again, from the JSON

``record`` is what they share: options, the JSON they write, and drawing from it alone.
``programs`` are VGG-16's and ResNet-50's training steps by every method that is compared.
"""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # before JAX is imported: nothing else is wanted
