"""The page of a memory profile, opened in a headless browser."""

import shutil

import pytest

try:
    from playwright.sync_api import sync_playwright
except ImportError:
    sync_playwright = None

from lrjax.memory import pictures

HOSTILE = (
    "</script ><script>document.title='broken'</script>",
    '<img src="http://127.0.0.1:9/x" onerror="document.title=1">',
    "{{profile}} /*{{style}}*/ $x_1^{$ \\u2028 \u2028 \x00 ]]> <!-- & &amp;",
    "名前 \U0001d518 " + "x" * 400,
)

CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
needs_browser = pytest.mark.skipif(
    CHROMIUM is None or sync_playwright is None,
    reason="needs Chromium: apt-get install chromium && pip install playwright",
)


class Page:
    """A page with a profile, and where things lie in its plot."""

    def __init__(self, browser, path, profile, step_time=None, **options):
        pictures.save_html(profile, path, step_time=step_time)
        self.profile = profile
        self.page = browser.new_page(viewport={"width": 1400, "height": 1000}, **options)
        self.page.set_default_timeout(10_000)
        self.troubles, self.requests = [], []
        self.page.on("console", lambda message: self.troubles.append(message.text))
        self.page.on("pageerror", lambda error: self.troubles.append(str(error)))
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.url = path.as_uri()
        self.page.goto(self.url)
        self.settle()

    def settle(self):
        """Wait until everything asked for is drawn."""
        self.page.evaluate("new Promise(done => requestAnimationFrame(() => setTimeout(done)))")

    def view(self):
        data = self.page.evaluate("({...document.getElementById('plot').dataset})")
        return {name: float(value) for name, value in data.items()}

    def point(self, step, height):
        """Pixel of the middle of a step and a number of bytes."""
        box, view = self.page.locator("#plot").bounding_box(), self.view()
        across = (step + 0.5 - view["x0"]) / (view["x1"] - view["x0"])
        up = (height - view["y0"]) / (view["y1"] - view["y0"])
        return box["x"] + across * box["width"], box["y"] + (1 - up) * box["height"]

    def text(self, selector):
        self.settle()
        return self.page.inner_text(selector)

    def column(self, title):
        number = 1 + self.page.locator("#alive th").all_text_contents().index(title)
        return self.page.locator(f"#alive tbody tr td:nth-child({number})").all_inner_texts()

    def pixels(self):
        return self.page.evaluate("document.getElementById('base').toDataURL()")
