"""What a person may have meant by a name that does not exist."""

import difflib
from collections.abc import Iterable


def did_you_mean(name: str, names: Iterable[str]) -> str:
    """`"; did you mean 'x'?"`, or the names there are where none is near."""
    known = sorted(names)
    near = difflib.get_close_matches(name, known, n=1)
    # What is near by its last part alone: `optimizer.lr` for `lr`.
    near = near or [one for one in known if one.rpartition(".")[2] == name][:1]
    if near:
        return f"did you mean {near[0]!r}?"
    return f"there are {', '.join(known)}"
