"""Pictures of a memory profile: files, and the page as a browser shows it."""

import dataclasses
import json
import os
import random
import re

import pytest

try:
    from playwright.sync_api import expect
except ImportError:
    expect = None

from memory_pages import HOSTILE, needs_browser

from lrjax.memory import palette, pictures
from lrjax.memory.profile import KINDS, Buffer, MemoryProfile

MIB = 2**20
LAYERS = 24


def made_profile(small=2900, capacity=None, seed=0):
    """About 3,000 buffers, as a layer-by-layer training step has them.

    Arguments throughout, a map per layer kept until its backward step, small values in between.
    """
    rng = random.Random(seed)
    steps = 40 * LAYERS
    half = steps // 2
    buffers = []

    def add(name, size, operation, layer, kind, start, end, shape=(1, 64, 64, 8)):
        source = f"model.py:{len(buffers) % 400 + 1}"
        buffers.append(
            Buffer(name, size, shape, "bfloat16", operation, layer, kind, source, start, end)
        )

    for i in range(LAYERS):
        layer = f"VGG16/conv{i // 4 + 1}_{i % 4 + 1}"
        size = 96 * MIB >> (i // 4)
        add(f"param.{i}", 3 * MIB, "", layer, "arguments", 0, steps - 1)
        start, end = 20 * i, steps - 1 - 20 * i
        add(f"relu.{i}", size, "max", layer, "saved maps", start, end, (1, 512 >> i // 4, 512, 64))
        add(
            f"conv.{i}", size, "conv_general_dilated", layer, "step intermediates", start, start + 9
        )
        add(f"dx.{i}", size, "transpose", layer, "step intermediates", end - 15, end)
        add(f"dw.{i}", 3 * MIB, "dot_general", layer, "parameter gradients", end - 5, steps - 1)
    add("scratch", 60 * MIB, "custom-call", "", "convolution scratch", half - 8, half + 8)
    for text in HOSTILE:
        add(text, 50 * MIB, text, text, "constants", 0, steps - 1)
    for i in range(small):
        start = rng.randrange(steps)
        end = min(start + rng.randrange(60), steps - 1)
        layer = f"VGG16/conv{rng.randrange(6) + 1}_{rng.randrange(4) + 1}"
        kind = rng.choice(KINDS[4:7])
        add(f"fusion.{i}", rng.randrange(4, 400) * 1024, "add", layer, kind, start, end)
    return profile_of(buffers, steps, capacity)


def profile_of(buffers, steps, capacity=None):
    sizes = dict.fromkeys(
        ("temp_bytes", "argument_bytes", "output_bytes", "alias_bytes", "host_bytes"), 7 * MIB
    )
    names = tuple(f"step.{i}" for i in range(steps))
    drawn = MemoryProfile("h200", 0, **sizes, generated_code_bytes=1, capacity_bytes=capacity,
                          buffers=tuple(buffers), instructions=names, peak_step=0)  # fmt: skip
    in_use = drawn.timeline() or [0]
    object.__setattr__(drawn, "peak_bytes", max(in_use))
    object.__setattr__(drawn, "peak_step", in_use.index(max(in_use)))
    return drawn


def tiny(capacity=None):
    """Four steps; every rectangle is large enough to point at."""
    common = ("bfloat16", "conv_general_dilated", "Net/conv1")
    buffers = [
        Buffer("weights", 100 * MIB, (10,), *common, "arguments", "net.py:1", 0, 3),
        Buffer("kept", 50 * MIB, (1, 8, 8, 3), *common, "saved maps", "net.py:12", 1, 3),
        Buffer("short", 70 * MIB, (2, 4), "float32", "add", "Net/norm", "copies", "net.py:3", 2, 2),
    ]
    return profile_of(buffers, 4, capacity)


WRITERS = {
    "png": pictures.save_png,
    "html": pictures.save_html,
    "comparison": lambda profile, path: pictures.save_comparison_png({HOSTILE[3]: profile}, path),
}
writers = pytest.mark.parametrize("write", WRITERS.values(), ids=WRITERS)


# --- Files --------------------------------------------------------------------------------------


@writers
@pytest.mark.parametrize(
    "profile",
    [profile_of([], 0), tiny(), tiny(capacity=150 * MIB), made_profile(small=40)],
    ids=["empty", "tiny", "too large", "hostile names"],
)
@pytest.mark.filterwarnings("error")
def test_complete_file_and_nothing_else(tmp_path, write, profile):
    path = tmp_path / "picture"
    write(profile, path)
    content = path.read_bytes()
    assert content.startswith((b"\x89PNG", b"<!doctype html>"))
    assert content.rstrip().endswith((b"IEND\xaeB`\x82", b"</html>"))
    assert os.listdir(tmp_path) == ["picture"]


@writers
def test_existing_file_is_replaced_through_a_link_keeping_its_permissions(tmp_path, write):
    path, link = tmp_path / "picture", tmp_path / "link"
    path.write_text("before")
    path.chmod(0o640)
    link.symlink_to(path)
    write(tiny(), link)
    assert link.is_symlink()
    assert path.read_bytes() != b"before"
    assert path.stat().st_mode & 0o777 == 0o640


@writers
def test_failure_leaves_what_was_there(tmp_path, write):
    path = tmp_path / "picture"
    path.write_text("before")
    with pytest.raises(AttributeError):
        write(object(), path)
    assert path.read_text() == "before"
    assert os.listdir(tmp_path) == ["picture"]


@writers
@pytest.mark.parametrize(
    ("path", "error", "reason"),
    [
        ("absent/x", FileNotFoundError, r"absent' does not exist"),
        (".", IsADirectoryError, "it is a directory"),
        ("file/x", NotADirectoryError, r"file' is not a directory"),
        ("pipe", OSError, "a device or a pipe"),
    ],
)
def test_unwritable_path_is_refused_before_work_is_done(tmp_path, write, path, error, reason):
    (tmp_path / "file").touch()
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(error, match=rf"(?s)path=.* cannot be written: .*{reason}"):
        write(None, tmp_path / path)  # no profile: work would fail otherwise
    assert sorted(os.listdir(tmp_path)) == ["file", "pipe"]


def test_comparing_nothing_is_refused(tmp_path):
    with pytest.raises(ValueError, match="at least one"):
        pictures.save_comparison_png({}, tmp_path / "x.png")


def test_page_holds_the_whole_profile_and_no_address(tmp_path):
    profile = made_profile()
    pictures.save_html(profile, tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    held = re.findall(r'<script type="application/json" id="profile">(.*?)</script>', page, re.S)
    assert len(held) == 1
    data = json.loads(held[0])
    assert [(b[0], b[1], b[-2], b[-1]) for b in data["buffers"]] == [
        (b.name, b.bytes, b.start, b.end) for b in profile.buffers
    ]
    assert not re.search(r"(https?:)?//[a-z]", page.replace(held[0], ""))
    assert "{{" not in page.replace(held[0], "")


def test_every_kind_has_its_colour():
    assert len({palette.colour(kind) for kind in KINDS}) == len(KINDS)


# --- The page in a browser ----------------------------------------------------------------------


@needs_browser
class TestInBrowser:
    def test_opens_at_the_peak_listing_the_largest_first(self, opened):
        profile = made_profile()
        page = opened(profile)
        assert f"step {profile.peak_step:,}" in page.text("#alive-title").replace("\xa0", " ")
        size = {b.name: b.bytes for b in profile.buffers}
        assert [size[name] for name in page.column("Buffer")] == [
            b.bytes for b in profile.at_peak()[: len(page.column("Buffer"))]
        ]
        assert f"{len(profile.at_peak()):,} buffers" in page.text("#alive-summary")
        assert page.page.title().startswith("Memory on h200")

    def test_hovering_says_what_a_buffer_is(self, opened):
        page = opened(tiny())
        assert not page.page.is_visible("#tooltip")
        page.page.mouse.move(*page.point(1, 120 * MIB))
        tooltip = page.text("#tooltip")
        for part in ("kept", "bfloat16[1, 8, 8, 3]", "Net/conv1", "conv_general_dilated",
                     "net.py:12", "saved maps", "50.0 MiB", "steps 1 to 3"):  # fmt: skip
            assert part in tooltip
        page.page.mouse.move(*page.point(0, 120 * MIB))  # above what is alive there
        page.settle()
        assert not page.page.is_visible("#tooltip")

    def test_hostile_names_are_text(self, opened):
        page = opened(made_profile(small=10))
        for text in HOSTILE[:2] + HOSTILE[3:]:
            page.page.fill("#query", text)
            expect(page.page.locator("#alive tbody td.name")).to_have_text([text])
            assert page.column("Layer") == [text]
            assert page.page.locator("#alive td.name button").bounding_box()["width"] > 100
        assert page.page.locator("img").count() == 0

    def test_clicking_lists_what_is_alive_there(self, opened):
        page = opened(tiny())
        assert page.column("Buffer") == ["weights", "short", "kept"]
        page.page.mouse.click(*page.point(1, 20 * MIB))
        assert page.text("#alive-title") == "Alive in step 1: step.1"
        assert page.text("#alive-summary") == "2 buffers, 150 MiB"
        assert page.column("Buffer") == ["weights", "kept"]
        assert page.column("Share") == ["66.7 %", "33.3 %"]

    @pytest.mark.parametrize(
        ("column", "order"),
        [
            ("Size", ["kept", "short", "weights"]),  # largest first already: turned round
            ("Buffer", ["kept", "short", "weights"]),
            ("Layer", ["weights", "kept", "short"]),
            ("Source", ["weights", "short", "kept"]),  # by number: 3 before 12
        ],
    )
    def test_table_is_sorted_by_the_column_clicked(self, opened, column, order):
        page = opened(tiny())
        page.page.get_by_role("button", name=column, exact=True).click()
        assert page.column("Buffer") == order
        assert page.page.locator("th[aria-sort=ascending]").inner_text().startswith(column)

    def test_wheel_zooms_around_the_pointer_and_reset_returns(self, opened):
        page = opened(made_profile())
        whole, drawn = page.view(), page.pixels()
        page.page.mouse.move(*page.point(300, 50 * MIB))
        page.page.mouse.wheel(0, -900)
        expect(page.page.locator("#plot")).not_to_have_attribute("data-x0", "0")
        view = page.view()
        assert view["x1"] - view["x0"] < 0.5 * whole["x1"]
        share = (300.5 - view["x0"]) / (view["x1"] - view["x0"])
        assert share == pytest.approx(300.5 / whole["x1"], abs=0.01)
        assert page.pixels() != drawn
        assert f"steps {int(view['x0'])} to" in page.text("#range")
        page.page.click("#reset")
        page.settle()
        assert page.view() == whole
        assert page.pixels() == drawn

    def test_dragging_zooms_to_the_box_and_with_shift_moves(self, opened):
        page = opened(made_profile())
        start, end = page.point(200, 400 * MIB), page.point(400, 100 * MIB)
        page.page.mouse.move(*start)
        page.page.mouse.down()
        page.page.mouse.move(*end, steps=4)
        page.page.mouse.up()
        page.settle()
        view = page.view()
        assert (view["x0"], view["x1"]) == pytest.approx((200.5, 400.5), abs=1.5)
        assert (view["y0"], view["y1"]) == pytest.approx((100 * MIB, 400 * MIB), rel=0.03)
        page.page.keyboard.down("Shift")
        page.page.mouse.move(*page.point(300, 200 * MIB))
        page.page.mouse.down()
        page.page.mouse.move(*page.point(250, 200 * MIB), steps=4)
        page.page.mouse.up()
        page.page.keyboard.up("Shift")
        page.settle()
        assert page.view()["x0"] == pytest.approx(250.5, abs=2)

    def test_colour_by_layer_and_hiding_a_group(self, opened):
        page = opened(made_profile())
        by_kind = page.pixels()
        assert "saved maps" in page.text("#groups")
        page.page.get_by_text("Layer", exact=True).first.click()
        page.settle()
        by_layer = page.pixels()
        assert by_layer != by_kind
        assert "VGG16/conv1_1" in page.text("#groups")
        page.page.click("#groups button >> text=VGG16/conv1_1")
        page.settle()
        assert page.pixels() != by_layer
        assert "VGG16/conv1_1" not in page.column("Layer")
        page.page.get_by_text("Kind", exact=True).first.click()
        page.settle()
        assert page.pixels() == by_kind

    def test_search_dims_the_rest_and_filters_the_table(self, opened):
        page = opened(made_profile())
        drawn = page.pixels()
        page.page.keyboard.press("/")
        page.page.keyboard.type("CONV_general")
        found = f"{LAYERS} of {len(page.profile.buffers):,} buffers"
        expect(page.page.locator("#matches")).to_have_text(found)
        assert set(page.column("Operation")) <= {"conv_general_dilated", ""}
        assert page.pixels() != drawn

    def test_keyboard_alone(self, opened):
        page = opened(tiny())
        page.page.focus("#plot")
        page.page.keyboard.press("ArrowLeft")
        assert page.text("#alive-title").startswith("Alive in step 1")
        page.page.keyboard.press("ArrowUp")
        page.page.keyboard.press("ArrowUp")
        assert page.text("#tooltip").startswith("kept")
        page.page.keyboard.press("Escape")
        assert not page.page.is_visible("#tooltip")
        page.page.keyboard.press("Home")
        assert page.text("#alive-title").startswith("Alive in step 0")
        page.page.keyboard.press("p")
        assert page.text("#alive-title").startswith("Alive in step 2")
        page.page.keyboard.press("+")
        page.settle()
        assert page.view()["x1"] - page.view()["x0"] < 4
        page.page.keyboard.press("0")
        page.settle()
        assert page.view()["x1"] - page.view()["x0"] == 4

    @pytest.mark.parametrize(
        ("capacity", "allocated", "verdict"),
        [
            (None, None, ""),
            (1024 * MIB, None, "fits: 21.5 % of 1.00 GiB"),
            (1024 * MIB, 1536 * MIB, "does not fit: 150.0 % of 1.00 GiB"),
            (150 * MIB, None, "does not fit: 146.7 % of 150 MiB"),
        ],
    )
    def test_verdict_and_capacity_line(self, opened, capacity, allocated, verdict):
        page = opened(dataclasses.replace(tiny(capacity), allocated_bytes=allocated))
        assert page.text("#verdict") == verdict
        assert page.page.is_visible("#verdict") == (capacity is not None)
        assert page.page.is_visible("#capacity-label") == (capacity == 150 * MIB)

    def test_dark_where_the_system_is_and_by_the_switch(self, opened):
        page = opened(tiny(), color_scheme="dark")
        back = "getComputedStyle(document.body).backgroundColor"
        dark = page.page.evaluate(back)
        page.page.click("#theme")
        assert page.page.evaluate(back) != dark

    @pytest.mark.parametrize("step", [0, 3001, 4999])
    def test_peak_of_one_step_among_thousands_is_drawn(self, opened, step):
        common = ((8,), "float32", "add", "", "copies", "")
        buffers = [
            Buffer("always", 100 * MIB, *common, 0, 4999),
            Buffer("spike", 80 * MIB, *common, step, step),
        ]
        page = opened(profile_of(buffers, 5000))
        drawn = (
            "runs.filter((run) => run.buffer.name === 'spike').map((run) => [run.left, run.right])"
        )
        [[left, right]] = page.page.evaluate(drawn)
        width = page.page.locator("#plot").bounding_box()["width"]
        assert right - left == 1
        assert left == pytest.approx(step / 5000 * width, abs=1)

    def test_profile_of_nothing(self, opened):
        page = opened(profile_of([], 0))
        assert page.column("Buffer") == ["Nothing is alive in this step."]

    def test_stays_fluid_with_many_buffers(self, opened):
        page = opened(made_profile(small=20_000))
        drawing = """() => {
            const start = performance.now();
            for (let i = 0; i < 5; i++) drawBase();
            return (performance.now() - start) / 5;
        }"""
        assert page.page.evaluate(drawing) < 250  # a few on a desktop; CI's cores are shared
        assert page.page.locator("#alive tbody tr").count() <= 200
        page.page.click("#show-all")
        alive = len(page.profile.at_peak())
        assert page.page.locator("#alive tbody tr").count() == alive
