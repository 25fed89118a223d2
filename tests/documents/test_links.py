"""Links between the project's documents lead somewhere, and addresses elsewhere are well formed."""

import re
import urllib.parse
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGES = [
    *ROOT.glob("*.md"),
    *(ROOT / "docs").rglob("*.md"),
    *(ROOT / "experiments/results").glob("*.md"),
]
LINK = re.compile(r"\[(?:[^\[\]]|\[[^\]]*\])*\]\(([^)\s]+)\)")
HEADING = re.compile(r"^#+ (.*)$", re.MULTILINE)


def links(page):
    # A link's text may be code, and code may look like a link.
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    return LINK.findall(re.sub(r"`[^`\n]*`", "code", text))


def anchors(page):
    """As GitHub and the site make them of headings."""
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    titles = [title.lower() for title in HEADING.findall(text)]
    return {re.sub(r"[^\w\- ]", "", title).strip().replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    for link in links(page):
        address = urllib.parse.urlparse(link)
        if address.scheme:
            assert address.scheme in ("https", "mailto"), link
            assert re.fullmatch(r"[a-z0-9.-]+\.[a-z]+", address.netloc), link
            continue
        target = (page.parent / address.path).resolve() if address.path else page
        assert target.exists(), f"{page.name}: {link}"
        assert target.is_relative_to(ROOT), f"{page.name}: {link} leaves the project"
        if address.fragment:
            assert address.fragment in anchors(target), f"{page.name}: {link}"


def test_anchors_are_those_of_headings():
    assert "on-the-device" in anchors(ROOT / "docs/roofline.md")
    assert "derivatives-of-a-functions-own" in anchors(ROOT / "docs/architecture.md")
