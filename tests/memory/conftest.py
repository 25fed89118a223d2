"""Pages of memory profiles in a headless browser."""

import pytest
from memory_pages import CHROMIUM, Page, sync_playwright


@pytest.fixture(scope="module")
def browser():
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def opened(browser, tmp_path):
    pages = []

    def open_page(profile, **options):
        pages.append(Page(browser, tmp_path / "page.html", profile, **options))
        return pages[-1]

    yield open_page
    for page in pages:
        page.settle()
        assert page.troubles == []
        assert page.requests == [page.url]
        page.page.close()
