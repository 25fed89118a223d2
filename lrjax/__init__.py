"""Row-centric CNN training for JAX: whole images in a few percent of the memory."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from lrjax import strategies as strategies
from lrjax.explain import explain
from lrjax.explanation import Explanation
from lrjax.plan import Plan, PlanMismatchError
from lrjax.planner.api import plan
from lrjax.planner.frontier import Frontier, frontier
from lrjax.planner.proof import BudgetTooSmallError
from lrjax.transform import rowwise

if TYPE_CHECKING:
    from lrjax import linen as linen
    from lrjax import memory as memory
    from lrjax import models as models
    from lrjax import nnx as nnx
    from lrjax import roofline as roofline
    from lrjax import testing as testing

__version__ = "0.1.0"

__all__ = [
    "BudgetTooSmallError",
    "Explanation",
    "Frontier",
    "Plan",
    "PlanMismatchError",
    "__version__",
    "explain",
    "frontier",
    "plan",
    "rowwise",
]

# Imported when they are first asked for: Flax takes longer to import than all the rest.
_SUBMODULES = ("linen", "memory", "models", "nnx", "roofline", "testing")


def __getattr__(name: str) -> Any:
    if name in _SUBMODULES:
        return importlib.import_module(f"lrjax.{name}")
    raise AttributeError(f"module 'lrjax' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_SUBMODULES})
