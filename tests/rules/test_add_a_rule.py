"""docs/add-a-rule.md: its code is a primitive with its rule in one file, and runs by rows."""

import dataclasses
import re
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lrjax
from graphs import graphs_of
from lrjax.program.inline import flatten
from lrjax.rules import register, registered
from lrjax.rules.dependence import output_dependences
from lrjax.rules.linearity import ADDITIVE

PAGE = Path(__file__).parents[2] / "docs" / "add-a-rule.md"

pytestmark = pytest.mark.usefixtures("x64")


@pytest.fixture(scope="module")
def page():
    """What the code on the page defines."""
    code = "\n".join(re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL))
    names = {}
    exec(compile(code, str(PAGE), "exec"), names)
    return SimpleNamespace(**names)


@pytest.mark.parametrize("strategy", ["stream", "2ps", "overl"])
def test_is_the_same_as_column(page, strategy):
    page.check_blur(strategy)


def test_runs_by_rows(page):
    args = jnp.zeros((3, 3, 2, 4)), jnp.zeros((2, 19, 8, 2))
    graphs = graphs_of(page.network, args, (None, 1))
    found = [n for graph in graphs for n in graph.nodes if n.equation.primitive is page.blur_p]
    assert len(found) == 2 + 4  # forward; again for the gradient, and transposed
    assert all(node.op is not None for node in found)


def test_traits_are_used(page):
    program = flatten(jax.make_jaxpr(lambda x, y: page.blur(x, 1) + 0 * y)(*[np.ones((2, 9))] * 2))
    assert output_dependences(program, program.inputs[:1]) == [ADDITIVE]


def test_a_wrong_row_map_shows(page, monkeypatch):
    def shifted(equation):
        op = page.blur_by_rows(equation)
        (read,) = op.reads
        row_map = dataclasses.replace(read.row_map, pad=0)
        return dataclasses.replace(op, reads=(dataclasses.replace(read, row_map=row_map),))

    rule = dataclasses.replace(registered()[page.blur_p], on_rows=shifted)
    monkeypatch.setitem(lrjax.rules.base._REGISTRY, page.blur_p, rule)
    with pytest.raises(AssertionError, match="row by row is not column"):
        page.check_blur("stream")


def test_without_a_rule_it_runs_column_wise(page, monkeypatch):
    monkeypatch.delitem(lrjax.rules.base._REGISTRY, page.blur_p)
    (graph, *_) = graphs_of(lambda x: page.blur(jnp.sin(x), 1), (jnp.zeros((2, 19, 3)),), 1)
    reasons = [n.reason for n in graph.nodes if n.equation.primitive is page.blur_p]
    assert reasons == ["no rule for blur"]
    page.assert_same_as_column(
        lambda x: page.blur(jnp.sin(x), 1), (np.ones((2, 19, 3)),), 1, num_blocks=4, strategy="2ps"
    )


def test_a_second_rule_is_refused(page):
    rule = registered()[page.blur_p]
    with pytest.raises(ValueError, match="blur has a rule already"):
        register(rule)
