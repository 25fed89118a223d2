"""A step's time in the pictures of its memory."""

import json
import re

import pytest
from memory_pages import HOSTILE, needs_browser

from lrjax.memory import pictures, step_time
from lrjax.memory.profile import Buffer, MemoryProfile
from lrjax.roofline import Kernel, Rates, Roofline

RATES = Rates("h200", {"half": 1e12, "float32": 1e12}, 1e12, 1e11)


def made_time(kernels=30, conditionals=2):
    def kernel(i):
        kind = ("convolution", "elementwise", HOSTILE[0])[i % 3]
        source = f"/home/me/net.py:{i}"
        return Kernel(f"fusion.{i}", kind, HOSTILE[1], source, 1e9, 1e6, 4, 1e-3 * (i + 1), "bytes")

    return Roofline(RATES, tuple(map(kernel, range(kernels))), conditionals)


def made_profile():
    weights = Buffer("w", 64, (16,), "float32", "dot", "Net", "arguments", "net.py:1", 0, 1)
    return MemoryProfile("h200", 64, 0, 64, 0, 0, 0, 0, None, (weights,), ("a", "b"), 0)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.0, "0.00 us"),
        (3e-6, "3.00 us"),
        (0.9996e-3, "1.00 ms"),
        (0.08351, "83.5 ms"),
        (0.99951, "1.00 s"),
        (1234.5, "1,234 s"),
    ],
)
def test_seconds_have_three_digits_and_a_unit(seconds, text):
    assert step_time.seconds_text(seconds) == text


def test_the_rows_of_a_table_are_the_longest_and_the_rest_and_add_up():
    seconds = {str(i): float(i) for i in range(20)}
    rows = step_time.longest(seconds, most=5)
    assert rows[:2] == [("19", 19.0), ("18", 18.0)]
    assert rows[-1][0] == "16 others"
    assert len(rows) == 5
    assert sum(s for _, s in rows) == sum(seconds.values())
    assert step_time.longest(seconds, most=20) == sorted(seconds.items(), key=lambda i: -i[1])


@pytest.mark.parametrize("time", [None, made_time(), made_time(0, 0), made_time(1)])
@pytest.mark.filterwarnings("error")
def test_the_page_holds_the_time_it_is_given(tmp_path, time):
    pictures.save_html(made_profile(), tmp_path / "page.html", step_time=time)
    page = (tmp_path / "page.html").read_text()
    [held] = re.findall(r'<script type="application/json" id="profile">(.*?)</script>', page, re.S)
    found = json.loads(held)["time"]
    if time is None:
        assert found is None
        return
    assert found["seconds"] == time.seconds
    assert [k[0] for k in found["kernels"]] == [
        k.name for k in sorted(time.kernels, key=lambda k: -k.seconds)[: step_time.MOST_ROWS]
    ]
    if time.kernels:
        for table in ("kinds", "sources"):
            assert sum(share for _, _, share in found[table]) == pytest.approx(1)


@pytest.mark.parametrize("time", [made_time(), made_time(0, 0), made_time(1)])
@pytest.mark.filterwarnings("error")
def test_the_png_is_higher_with_a_time(tmp_path, time):
    heights = []
    for chosen in (None, time):
        pictures.save_png(made_profile(), tmp_path / "p.png", step_time=chosen)
        heights.append(int.from_bytes((tmp_path / "p.png").read_bytes()[20:24]))
    assert heights[1] > 1.4 * heights[0]


@pytest.mark.parametrize("save", [pictures.save_png, pictures.save_html])
def test_what_is_no_time_is_refused_before_anything_is_written(tmp_path, save):
    with pytest.raises(TypeError, match=r"step_time=0.5 is a float; give what .*estimate"):
        save(made_profile(), tmp_path / "picture", step_time=0.5)
    assert not list(tmp_path.iterdir())


@needs_browser
class TestInBrowser:
    def test_total_kinds_and_kernels_are_shown_as_text(self, opened):
        time = made_time()
        page = opened(made_profile(), step_time=time)
        total = step_time.seconds_text(time.seconds)
        assert page.text("#time-title") == f"Step time on h200: {total}"
        assert f"Step time\n{total}" in page.text("#totals")
        kinds = page.page.locator("#time-kinds tbody tr td:first-child").all_inner_texts()
        assert kinds == list(time.by_kind())
        kernels = page.page.locator("#kernels tbody tr td:first-child").all_inner_texts()
        assert kernels == [f"fusion.{i}" for i in range(29, 17, -1)]
        assert page.text("#kernels-title") == "The 12 longest of 30 kernels"
        assert page.page.locator("#kernels td.code").first.inner_text() == "net.py:29"
        assert page.page.locator("img").count() == 0

    def test_a_page_without_a_time_says_nothing_of_it(self, opened):
        page = opened(made_profile())
        assert not page.page.is_visible("#time")
        assert "Step time" not in page.text("#totals")

    def test_a_phone_does_not_scroll_sideways(self, opened):
        page = opened(made_profile(), step_time=made_time())
        page.page.set_viewport_size({"width": 390, "height": 800})
        page.settle()
        assert page.page.evaluate("document.documentElement.scrollWidth") <= 390
