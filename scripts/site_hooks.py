"""What the site shows of files outside docs/, for mkdocs (`hooks` in mkdocs.yml).

Pages link to each other as files of the project do, so that links work where the files are read as
they are. Some of those files lie outside docs/: results, the changelog. They become pages, and
links to what is no page (a script, a folder) become their text.
"""

from __future__ import annotations

import inspect
import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parents[1]
# Pages and pictures from outside docs/, by their place in the project.
OUTSIDE = (
    "CHANGELOG.md",
    "CONTRIBUTING.md",
    *(
        str(path.relative_to(ROOT))
        for path in sorted((ROOT / "experiments/results").rglob("*"))
        if path.suffix in (".md", ".png", ".svg")
    ),
)
COMMANDS = "<!-- command -->"  # where the subcommands are listed
_LINK = re.compile(r"(!?)\[((?:[^\[\]]|\[[^\]]*\])*)\]\(([^)\s]+)\)")
_MATHJAX = re.compile(r"<script data-mkdocs-jupyter-mathjax=.*?</script>", re.DOTALL)
_CODE = re.compile(r"(```.*?```|`[^`\n]*`)", re.DOTALL)


def on_config(config: Any) -> Any:
    """Pages that the navigation does not name stand at the end of the results, by their names."""
    named = set(re.findall(r"[\w/.-]+\.(?:md|ipynb)", str(config.nav)))
    inside = (path.relative_to(ROOT / "docs") for path in (ROOT / "docs").rglob("*.md"))
    pages = {*map(str, inside), *(place for place in OUTSIDE if place.endswith(".md"))}
    (results,) = (section["Results"] for section in config.nav if "Results" in section)
    results += sorted(pages - named)
    return config


def on_files(files: Any, config: Any) -> Any:
    """Add what lies outside docs/."""
    for place in OUTSIDE:
        content = (ROOT / place).read_bytes()
        files.append(File.generated(config, place, content=content))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Point links at pages of the site."""
    own = page.file.src_uri
    if own.startswith("experiments/"):  # tables, which need the room
        page.meta.setdefault("hide", ["toc"])
    if COMMANDS in markdown:
        markdown = markdown.replace(COMMANDS, command_tables())
    return relinked(markdown, own, {file.src_uri for file in files})


def on_post_page(output: str, page: Any, config: Any) -> str:
    """Leave out MathJax, which the plugin for notebooks adds: no page asks another server."""
    del page, config
    return _MATHJAX.sub("", output)


def command_tables() -> str:
    """Every subcommand of `lrjax` with its options, in Markdown."""
    import typer.main

    from lrjax.app.cli import app

    parts = []
    for name, command in sorted(typer.main.get_command(app).commands.items()):  # type: ignore[attr-defined]
        about = re.sub(r"(?<!\n)\n(?!\n)", " ", inspect.cleandoc(command.help or ""))
        parts += [f"## lrjax {name}", about, "| | default | |\n|---|---|---|"]
        for parameter in command.params:
            if parameter.param_type_name == "option":
                names = " ".join(
                    f"`{option}`" for option in [*parameter.opts, *parameter.secondary_opts]
                )
            else:
                names = f"`{parameter.metavar or parameter.name.upper()}`"
            default = "" if parameter.default in (None, "", False) else f"`{parameter.default}`"
            default = "required" if parameter.required else default
            text = getattr(parameter, "help", "") or ""
            for special in "\\|[]<*_":
                text = text.replace(special, "\\" + special)
            parts[-1] += f"\n| {names} | {default} | {text} |"
    return "\n\n".join(parts)


def relinked(markdown: str, own: str, pages: set[str]) -> str:
    """A page's text with its links as the site needs them.

    Args:
      markdown: the text, whose links are relative to the file's place in the project.
      own: its place on the site.
      pages: all places on the site.
    """

    def link(match: re.Match[str]) -> str:
        image, text, target = match.groups()
        path, hash_, anchor = target.partition("#")
        if not path or re.match(r"[a-z]+:", path):
            return match[0]
        place = posixpath.normpath(posixpath.join(posixpath.dirname(in_project(own)), path))
        on_site = place.removeprefix("docs/")
        if on_site == "README.md":
            on_site = "index.md"
        if on_site not in pages:
            if (ROOT / place).exists():
                return text
            return match[0]  # mkdocs complains
        there = posixpath.relpath(on_site, posixpath.dirname(own))
        return f"{image}[{text}]({there}{hash_}{anchor})"

    # Links are outside of code; what is a link's text may be code.
    kept: list[str] = []

    def keep(match: re.Match[str]) -> str:
        kept.append(match[0])
        return f"\0{len(kept) - 1}\0"

    hidden = _CODE.sub(keep, markdown)
    return re.sub(r"\0(\d+)\0", lambda m: kept[int(m[1])], _LINK.sub(link, hidden))


def in_project(place: str) -> str:
    """Where a page's file is in the project."""
    return place if place in OUTSIDE else f"docs/{place}"
