"""A profile as a page for a browser: one file, no network.

``viewer/`` holds its markup, style and script; the profile is written into it as JSON.
"""

from __future__ import annotations

import importlib.resources
import json
from typing import TYPE_CHECKING, Any

from lrjax.memory import palette, step_time

if TYPE_CHECKING:
    from lrjax.memory.profile import MemoryProfile
    from lrjax.memory.step_time import StepTime


def page(profile: MemoryProfile, time: StepTime | None = None) -> str:
    """The page as HTML."""
    viewer = importlib.resources.files("lrjax.memory") / "viewer"
    text = (viewer / "viewer.html").read_text(encoding="utf-8")
    # The profile comes last: nothing in it can be taken for a place to fill in.
    for place, content in (
        ("/*{{style}}*/", (viewer / "viewer.css").read_text(encoding="utf-8")),
        ("/*{{model}}*/", (viewer / "model.js").read_text(encoding="utf-8")),
        ("/*{{picture}}*/", (viewer / "picture.js").read_text(encoding="utf-8")),
        ("/*{{interaction}}*/", (viewer / "interaction.js").read_text(encoding="utf-8")),
        ("/*{{time}}*/", (viewer / "time.js").read_text(encoding="utf-8")),
        ("{{profile}}", _script_safe(_page_data(profile, time))),
    ):
        text = text.replace(place, content)
    return text


def _page_data(profile: MemoryProfile, time: StepTime | None) -> dict[str, Any]:
    """The profile as the page reads it: texts that many buffers share are written once."""
    places: dict[str, int] = {}

    def place(text: str) -> int:
        return places.setdefault(text, len(places))

    rows = [
        [
            b.name,
            b.bytes,
            *map(place, (palette.array_text(b), b.operation, b.layer, b.kind, b.source)),
            b.start,
            b.end,
        ]
        for b in profile.buffers
    ]
    return {
        **vars(profile),
        "fits": profile.fits,
        "kinds": [[kind, palette.colour(kind)] for kind in palette.kinds([profile])],
        "palette": palette.LAYER_COLOURS,
        "rest_colour": palette.OTHER,
        "none_colour": palette.COLOURS["unattributed"],
        "strings": list(places),
        "buffers": rows,
        "time": None if time is None else step_time.page_data(time),
    }


def _script_safe(data: Any) -> str:
    """JSON that nothing in it can end the script element around it, or begin a comment."""
    text = json.dumps(data, separators=(",", ":"))  # ASCII: no line separators to worry about
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")
