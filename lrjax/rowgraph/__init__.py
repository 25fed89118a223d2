"""Functions as row graphs: which values carry rows, and the stages and segments that make them.

The rules of branches and of custom derivatives, whose bodies are row graphs of their own, are
registered here with those of ``lrjax.rules``.
"""

from lrjax.rowgraph import branches, calls
from lrjax.rules import register

register(*branches.RULES, *calls.RULES)
