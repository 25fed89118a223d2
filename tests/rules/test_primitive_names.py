"""Rules hold all that is known of a primitive: no other module tells primitives apart by name."""

import ast
from pathlib import Path

import pytest

from lrjax.program.compatibility import _primitives_by_name, primitive, primitives

ROOT = Path(__file__).parents[2] / "lrjax"
# Rules; names of primitives without a public object; the operations of XLA's programs.
HOME = ("rules/", "program/compatibility.py", "memory/", "roofline/")
# Names of primitives that are words for other things here: kinds of reductions, keys, options.
WORDS = {"and", "check", "max", "min", "name", "or", "transpose"}


def modules():
    for path in sorted(ROOT.rglob("*.py")):
        where = path.relative_to(ROOT).as_posix()
        if not where.startswith(HOME):
            yield where, ast.parse(path.read_text())


def is_name_of_primitive(node):
    """``equation.primitive.name`` and the like."""
    if not isinstance(node, ast.Attribute) or node.attr != "name":
        return False
    return "primitive" in (getattr(node.value, "attr", ""), getattr(node.value, "id", ""))


def strings_of(node):
    """Strings that a value is compared with, or one of which it may be."""
    if isinstance(node, ast.Compare):
        return [node.left, *node.comparators]
    if isinstance(node, ast.Tuple | ast.List | ast.Set):
        return node.elts
    if isinstance(node, ast.Dict):
        return [key for key in node.keys if key is not None]
    if isinstance(node, ast.Call) and getattr(node.func, "attr", "") in ("startswith", "endswith"):
        return [*node.args]
    if isinstance(node, ast.MatchValue):
        return [node.value]
    return []


def found_in(tree, names):
    """Lines that tell primitives apart by name, with what they say; ``__all__`` is no such list."""
    assigned = [node for node in ast.walk(tree) if isinstance(node, ast.Assign)]
    exported = [node.value for node in assigned if ast.unparse(node.targets[0]) == "__all__"]
    for node in ast.walk(tree):
        if node in exported:
            continue
        for value in strings_of(node):
            if isinstance(value, ast.Constant) and value.value in names:
                yield value.lineno, value.value
            if isinstance(node, ast.Compare) and is_name_of_primitive(value):
                yield value.lineno, "a comparison of a primitive's name"
        is_method = isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)
        if is_method and is_name_of_primitive(node.func.value):
            yield node.lineno, f"{node.func.attr} of a primitive's name"


def test_no_other_module_lists_primitives():
    names = _primitives_by_name().keys() - WORDS
    found = [
        f"lrjax/{where}:{line}: {what}"
        for where, tree in modules()
        for line, what in found_in(tree, names)
    ]
    assert not found, "state it in the rule of the primitive instead:\n" + "\n".join(found)


@pytest.mark.parametrize(
    "source",
    [
        "_LINEAR = ('add', 'neg')",
        "_LINEAR = frozenset({'add_any'})",
        "_OPERANDS = {'mul': 2}",
        "is_sum = name == 'reduce_sum'",
        "is_tag = equation.primitive.name == other",
        "is_window = equation.primitive.name.startswith(prefix)",
        "is_window = kind.startswith('reduce_window')",
    ],
)
def test_lists_are_found(source):
    assert list(found_in(ast.parse(source), _primitives_by_name().keys() - WORDS))


def test_a_misspelt_primitive_is_refused():
    with pytest.raises(LookupError, match="no primitive 'pvari'"):
        primitive("pvari")


def test_versions_may_lack_some():
    assert set(primitives("log2", "pvary")) == {primitive("log2"), primitive("pvary")} - {None}
