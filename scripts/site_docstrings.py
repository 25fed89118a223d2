"""Docstrings as the site shows them: examples as code, Sphinx's roles as their text.

An extension of griffe, which reads them for mkdocstrings (`extensions` in mkdocs.yml).
"""

import re
import textwrap
from typing import Any

import griffe

# "Example::" or "Example:", and a block that is indented.
_EXAMPLE = re.compile(r"^Example::?\n\n?(?P<code>(?: +\S.*\n|\s*\n)+)", re.MULTILINE)
# What is returned, up to the colon that griffe would take for the end of its type.
_RETURNS = re.compile(r"^(Returns:\n +[^\n:]*``[^\n:]*):", re.MULTILINE)
_ROLE = re.compile(r":(?:func|class|meth|mod|attr|data):(?=`)")


def readable(docstring: str) -> str:
    """The docstring in Markdown.

    Args:
      docstring: without its indentation.
    """

    def example(match: re.Match[str]) -> str:
        code = textwrap.dedent(match["code"]).strip()
        language = "pycon" if code.startswith(">>>") else "python"
        return f"**Example**\n\n```{language}\n{code}\n```\n\n"

    docstring = _EXAMPLE.sub(example, docstring + "\n")
    return _ROLE.sub("", _RETURNS.sub(r"\1;", docstring)).rstrip("\n")


class Docstrings(griffe.Extension):
    """Rewrites every docstring that is shown."""

    def on_object(self, *, obj: griffe.Object, **others: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = readable(obj.docstring.value)
