"""Row-centric CNN training for JAX: whole images in a few percent of the memory."""

from lrjax.explain import Explanation, explain
from lrjax.transform import rowwise

__version__ = "0.1.0"

__all__ = ["Explanation", "__version__", "explain", "rowwise"]
