"""Values with names (``jax.ad_checkpoint.checkpoint_name``): cuts go by them, row loops do not."""

from __future__ import annotations

import dataclasses

from jax.extend.core import primitives as public

from lrjax.program.inline import Atom, FlatProgram


def without_names(program: FlatProgram) -> FlatProgram:
    """Drop ``checkpoint_name`` equations: what they give is what they take.

    In a row loop a named value would be a second one, with rows of its own to keep, and the rows
    outside the image of one but not the other set to what readers need.
    """
    replaced: dict[int, Atom] = {}
    equations = []
    for equation in program.equations:
        equation = equation.reading(replaced)
        if equation.primitive is public.name_p:
            replaced[equation.outputs[0]] = equation.inputs[0]
        else:
            equations.append(equation)
    outputs = program.outputs_as(replaced)
    return dataclasses.replace(program, equations=tuple(equations), outputs=outputs)
