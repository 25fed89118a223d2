"""What CPython does by itself while programs are traced and planned, where it costs a lot of time.

Nothing here changes what is computed.
"""

from __future__ import annotations

import contextlib
import functools
import gc
from collections.abc import Callable, Iterator
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")


@contextlib.contextmanager
def collection_paused() -> Iterator[None]:
    """No collection of cyclic garbage within; it waits until later. Also a decorator.

    Tracing makes hundreds of thousands of objects that live on, and as their number grows the
    collector walks all objects of the process again and again: a fifth of the time that a
    ResNet-50's gradient takes to trace. Reference counts free what is in no cycle all the same.

    For code that makes types of arrays and few arrays: those of a cycle would keep their memory. A
    collector that is off already stays off.
    """
    if not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


# New objects after which the youngest are looked through, and how often the older ones are.
_SELDOM = (100_000, 50, 100)


@contextlib.contextmanager
def collected_seldom() -> Iterator[None]:
    """Cyclic garbage is collected less often within. Also a decorator.

    For long work of which most lives until its end, such as a search for plans, and which compiles
    programs meanwhile, so that collection cannot wait until then. A collector that is off stays
    off.
    """
    before = gc.get_threshold()
    if before[0]:
        gc.set_threshold(*map(max, before, _SELDOM))
    try:
        yield
    finally:
        gc.set_threshold(*before)


# Words of a frame: CPython then takes a piece of twice as many at least.
_ROOM = 2**14


def with_room_for_calls(function: Callable[P, T]) -> Callable[P, T]:
    """The function, within which calls find their frames' memory in one piece.

    From 3.11 on CPython keeps frames in pieces of 16 KiB. Where a loop happens to run at the end
    of one, every call in it takes a new piece from the system and gives it back: a fifth of the
    time that a ResNet-50's gradient takes to trace, twice the time of the minimum cuts, and nothing
    at another depth of the stack. A piece for a frame that says it is large has room behind it.
    """

    def roomy(*args: P.args, **kwargs: P.kwargs) -> T:
        return function(*args, **kwargs)

    roomy.__code__ = roomy.__code__.replace(co_stacksize=_ROOM)
    return functools.wraps(function)(roomy)
