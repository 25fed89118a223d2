"""The site: tables and figures are what the results say, every page builds, and fits a phone."""

import functools
import http.server
import importlib
import os
import re
import shutil
import subprocess
import sys
import threading
import types
from pathlib import Path

import pytest

try:
    from playwright.sync_api import sync_playwright
except ImportError:
    sync_playwright = None

ROOT = Path(__file__).resolve().parents[2]
CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
needs_browser = pytest.mark.skipif(
    CHROMIUM is None or sync_playwright is None,
    reason="needs Chromium: apt-get install chromium && pip install playwright",
)


@pytest.fixture
def scripts(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "scripts")


class TestTables:
    def test_pages_hold_what_the_results_say(self, scripts):
        import results_page

        for page in sorted((ROOT / "docs").rglob("*.md")):
            text = page.read_text()
            assert results_page.rendered(text) == text, (
                f"{page.name}: python scripts/results_page.py"
            )

    def test_every_table_is_shown(self, scripts):
        import results_page

        text = "".join(page.read_text() for page in (ROOT / "docs").glob("*.md"))
        assert {name for _, name, _ in results_page.PLACE.findall(text)} == set(results_page.TABLES)

    def test_a_page_that_is_stale_is_written_again(self, scripts):
        import results_page

        found = results_page.rendered("<!-- results: cpu-time -->\nold\n<!-- /results -->\nafter")
        assert "| 2ps/8" in found
        assert "old" not in found
        assert found.endswith("<!-- /results -->\nafter")

    def test_a_table_that_there_is_not_is_named(self, scripts):
        import results_page

        with pytest.raises(ValueError, match="'speed' is no table; there are vgg16-memory"):
            results_page.rendered("<!-- results: speed -->\n<!-- /results -->")


def test_figures_are_what_their_script_draws(scripts, tmp_path):
    """Their texts are, and how much is drawn; the rest depends on the version of matplotlib."""
    import figures

    figures.main(tmp_path)
    drawn = {path.name: path.read_text() for path in tmp_path.iterdir()}
    committed = {path.name: path.read_text() for path in (ROOT / "docs/figures").glob("*.svg")}
    assert set(drawn) == set(committed)
    for name, text in drawn.items():
        for part in (r"<text [^>]*>([^<]*)</text>", r'<path d="M ([\d.]+)'):
            found, expected = (re.findall(part, picture) for picture in (text, committed[name]))
            assert len(found) == len(expected), f"{name}: python scripts/figures.py"
        texts = [re.findall(r"<text [^>]*>([^<]*)</text>", p) for p in (text, committed[name])]
        assert texts[0] == texts[1], f"{name}: python scripts/figures.py"


@pytest.mark.parametrize("module", ["strategies", "rules", "roofline"])
def test_the_reference_names_all_that_a_module_exports(module):
    page = (ROOT / f"docs/reference/{module}.md").read_text()
    shown = re.findall(rf"^::: lrjax\.{module}\.(\w+)$", page, re.MULTILINE)
    assert set(shown) == set(importlib.import_module(f"lrjax.{module}").__all__)


def test_pages_that_the_navigation_does_not_name_have_a_place(scripts, monkeypatch):
    pytest.importorskip("mkdocs", reason="pip install 'lrjax[docs]'")
    import site_hooks

    monkeypatch.setattr(site_hooks, "OUTSIDE", ("CHANGELOG.md", "experiments/results/new.md"))
    pages = [str(p.relative_to(ROOT / "docs")) for p in (ROOT / "docs").rglob("*.md")]
    kept = [{"Results": [{"Results": "results.md"}]}, {"All": sorted({*pages} - {"theory.md"})}]
    site_hooks.on_config(types.SimpleNamespace(nav=kept))
    assert kept[0]["Results"][1:] == ["CHANGELOG.md", "experiments/results/new.md", "theory.md"]


def test_links_of_files_become_links_of_pages(scripts):
    pytest.importorskip("mkdocs", reason="pip install 'lrjax[docs]'")
    import site_hooks

    pages = {"index.md", "memory.md", "how-to/nnx.md", "experiments/results/a.md", "CHANGELOG.md"}
    for own, link, wanted in (
        ("how-to/nnx.md", "[m](../memory.md#targets)", "[m](../memory.md#targets)"),
        ("memory.md", "[`r`](../experiments/results/a.md)", "[`r`](experiments/results/a.md)"),
        (
            "how-to/nnx.md",
            "[r](../../experiments/results/a.md)",
            "[r](../experiments/results/a.md)",
        ),
        ("CHANGELOG.md", "[m](docs/memory.md)", "[m](memory.md)"),
        ("experiments/results/a.md", "[c](../../CHANGELOG.md)", "[c](../../CHANGELOG.md)"),
        ("memory.md", "[home](../README.md)", "[home](index.md)"),
        ("memory.md", "[a folder](../experiments/results)", "a folder"),
        ("memory.md", "[away](https://arxiv.org)", "[away](https://arxiv.org)"),
        ("memory.md", "`[x](../lrjax)`", "`[x](../lrjax)`"),
        ("memory.md", "[gone](nowhere.md)", "[gone](nowhere.md)"),  # mkdocs complains
    ):
        assert site_hooks.relinked(link, own, pages) == wanted


def test_docstrings_become_markdown(scripts):
    pytest.importorskip("griffe", reason="pip install 'lrjax[docs]'")
    from site_docstrings import readable

    text = "Do :func:`it`.\n\nReturns:\n  A ``Plan``: print it.\n\nExample::\n\n    a = 1\n\n    b"
    assert readable(text) == (
        "Do `it`.\n\nReturns:\n  A ``Plan``; print it.\n\n**Example**\n\n```python\na = 1\n\nb\n```"
    )
    assert "```pycon\n>>> a" in readable("Example:\n  >>> a\n  >>> b\n")


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The built site's folder and its address."""
    pytest.importorskip("mkdocstrings", reason="pip install 'lrjax[docs]'")
    pytest.importorskip("mkdocs_jupyter", reason="pip install 'lrjax[docs]'")
    folder = tmp_path_factory.mktemp("site")
    build = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)],
        cwd=ROOT,
        env=os.environ | {"NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
    )
    assert build.returncode == 0, build.stderr
    handler = functools.partial(Quiet, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield folder, f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args):
        pass


@pytest.mark.slow
class TestSite:
    def test_every_document_is_a_page(self, site):
        folder, _ = site
        for page in (ROOT / "docs").rglob("*.md"):
            built = folder / page.relative_to(ROOT / "docs").with_suffix(".html")
            assert built.is_file(), page.name

    def test_the_reference_has_what_users_import(self, site):
        import lrjax

        text = "".join(p.read_text() for p in (site[0] / "reference").glob("*.html"))
        shown = set(re.findall(r'<h2 id="([\w.]+)"', text))
        for name in set(lrjax.__all__) - {"__version__"}:
            assert any(found.endswith(f".{name}") for found in shown), name

    def test_every_subcommand_is_listed(self, site):
        text = (site[0] / "reference/command.html").read_text()
        for name in ("train", "doctor", "memory", "plan", "compare-strategies"):
            assert f"lrjax {name}" in text

    @needs_browser
    def test_searching_finds_pages(self, site):
        with sync_playwright() as playwright:
            browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
            page = browser.new_page(viewport={"width": 1300, "height": 900})
            page.goto(f"{site[1]}/index.html")
            # Key by key: the theme reads the field when a key is released, and `fill` presses none.
            page.locator("input[name=query]").press_sequentially("frontiers")
            page.wait_for_selector(".md-search-result__link", timeout=60_000)
            links = page.locator(".md-search-result__link").evaluate_all(
                "links => links.map(link => link.getAttribute('href'))"
            )
            browser.close()
        assert any("theory.html" in link for link in links), links

    @needs_browser
    @pytest.mark.parametrize("width", [390, 1300])
    def test_no_page_scrolls_sideways_or_asks_elsewhere(self, site, width):
        folder, address = site
        with sync_playwright() as playwright:
            browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
            page = browser.new_page(viewport={"width": width, "height": 900})
            requests, errors = [], []
            page.on("request", lambda request: requests.append(request.url))
            page.on("pageerror", lambda error: errors.append(str(error)))
            for path in sorted(folder.rglob("*.html")):
                page.goto(f"{address}/{path.relative_to(folder)}")
                assert page.evaluate("document.documentElement.scrollWidth") <= width, path
                assert page.locator("h1").first.inner_text(), path
            browser.close()
        assert errors == []
        assert len(requests) > 2 * len(list(folder.rglob("*.html")))  # pages and what they need
        own = (address, "data:", "blob:")
        assert [url for url in requests if not url.startswith(own)] == []
