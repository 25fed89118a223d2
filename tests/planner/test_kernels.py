"""Seconds of operations: kernels as a compiler that fuses would have them."""

import jax
import jax.numpy as jnp
import pytest
from networks import logits, structs

from lrjax import memory
from lrjax.plan import Choice
from lrjax.planner.compilers import WINDOW
from lrjax.planner.kernels import kernels, seconds
from lrjax.planner.liveness import Kind, Liveness, Operation
from lrjax.planner.problem import problem_of
from lrjax.planner.proof import Prover, planned
from lrjax.planner.search import Step
from lrjax.roofline import Rates, rates_of, roofline_of
from marks import COMPILES_FOR_H200

# A byte and an operation take a second each; launches nothing.
RATES = Rates("toy", {"half": 1.0, "float32": 1.0, "float64": 1.0}, 1.0, 1.0, 0.0, 0.0)
LIKE = jax.ShapeDtypeStruct((), jnp.float32)


def spent(*operations, size=10.0, after=()):
    sizes = {v: size for o in operations for v in (*o.inputs, *o.outputs)}
    lives = Liveness(operations, sizes, before=frozenset({0}), after=frozenset(after))
    return [s for _, s in kernels(lives, RATES)]


def test_what_is_fused_is_no_kernel():
    fused = Operation("", (0,), (1,), Kind.FUSED, LIKE)
    assert spent(fused, Operation("", (1,), (2,), Kind.ROOT, LIKE)) == [20]
    assert spent(fused, Operation("", (1,), (2,), Kind.LIBRARY, LIKE)) == [20, 20]


def test_a_library_call_takes_the_longer_of_operations_and_bytes():
    assert spent(Operation("", (0,), (1,), Kind.LIBRARY, LIKE, flops=50.0)) == [50]
    assert spent(Operation("", (0,), (1,), Kind.LIBRARY, LIKE, flops=5.0)) == [20]


def test_sums_of_one_map_are_one_kernel():
    sums = [Operation("", (0,), (v,), Kind.ROOT, LIKE) for v in (1, 2)]
    assert spent(*sums) == [30]  # the map once, two results


def test_sums_that_share_a_map_are_one_kernel():
    """Gradients of a scale and of a bias: one reads the normalised map too."""
    sums = [Operation("", read, (v,), Kind.ROOT, LIKE) for read, v in (((0,), 2), ((0, 1), 3))]
    assert spent(*sums) == [40]  # both maps once, two results
    library = Operation("", (0,), (2,), Kind.LIBRARY, LIKE)
    assert sorted(spent(library, sums[1])) == [20, 30]
    others = [Operation("", (v,), (v + 2,), Kind.ROOT, LIKE) for v in (0, 1)]
    assert spent(*others) == [20, 20]


def test_a_map_is_not_normalised_while_it_is_summed():
    operations = (
        Operation("", (0,), (1,), Kind.ROOT, LIKE),
        Operation("", (0, 1), (2,), Kind.FUSED, LIKE),
        Operation("", (0,), (3,), Kind.ROOT, LIKE),
    )
    sizes = {0: 100.0, 1: 1.0, 2: 100.0, 3: 1.0}
    lives = Liveness(operations, sizes, before=frozenset({0}), after=frozenset({2}))
    found = [s for _, s in kernels(lives, RATES)]
    assert sorted(found) == [102, 201]  # both sums; the map and its mean to another map


def test_a_window_is_read_as_far_as_it_goes():
    operations = (
        Operation(WINDOW, (0,), (1,), Kind.FUSED, LIKE),
        Operation("", (1,), (2,), Kind.ROOT, LIKE),
    )
    lives = Liveness(operations, {0: 100.0, 1: 4.0, 2: 1.0}, before=frozenset({0}))
    assert seconds(lives, RATES) == 5


@pytest.mark.parametrize(
    "choice", [Choice("column"), Choice("stream", 16), Choice("2ps", 8), Choice("overl", 4)]
)
class TestCompiled:
    pytestmark = COMPILES_FOR_H200

    def test_prediction_is_near_the_roofline(self, choice):
        args = structs(1024, 1024, dtype=jnp.bfloat16)
        problem = problem_of(logits, args, (None, 1), "h200", None)
        prover = Prover(problem)
        steps = (Step(0, prover.model.candidates.last, choice),)
        by_rows = planned(problem, prover.plan(steps, 0))
        compiled = memory.compile_for(problem.gradient(by_rows), *args, target="h200")
        found = roofline_of(str(compiled.as_text()), rates_of("h200"))
        assert prover.model.seconds(*steps) == pytest.approx(found.seconds, rel=0.3)
