"""Row-centric CNN training for JAX: whole images in a few percent of the memory."""

from lrjax.explain import Explanation, explain
from lrjax.planner.api import plan
from lrjax.planner.frontier import Frontier, frontier
from lrjax.planner.plan import Plan, PlanMismatchError
from lrjax.planner.proof import BudgetTooSmallError
from lrjax.transform import rowwise

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
