"""Random networks from one seed: descriptions, how they run, how they are judged and shrunk."""

from generated import custom, joins, pointwise, windows  # noqa: F401  registers the kinds
from generated.judge import Report, Unsuitable, Wrong, check
from generated.spec import L, Layer, Spec

__all__ = ["L", "Layer", "Report", "Spec", "Unsuitable", "Wrong", "check"]
