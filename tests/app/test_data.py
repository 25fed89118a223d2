"""Images reach the model with the right label, at the stated size, in an order the seed decides."""

import os
import struct
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lrjax.app.data import DigitPixels, ImageFolder, ScatteredDigits, batches, decoding


def save(path, value, size=(6, 8), mode="RGB", **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    colour = value if mode != "RGB" else (value, 0, 0)
    Image.new(mode, size[::-1], colour).save(path, **options)


@pytest.fixture
def folder(tmp_path):
    """Classes "ant" and "bee"; an image's red value is ten times its label plus its number."""
    for label, name in enumerate(("ant", "bee")):
        for number in range(3):
            save(tmp_path / name / f"{number}.png", 10 * label + number)
    return tmp_path


# --- Folder -------------------------------------------------------------------------------------


def test_labels_follow_sorted_class_directories(folder):
    source = ImageFolder(folder)
    assert source.class_names == ("ant", "bee")
    assert source.image_shape == (6, 8, 3)
    assert not source.skipped
    assert [(int(e["label"]), int(e["image"][0, 0, 0])) for e in (source[i] for i in range(6))] == [
        (0, 0),
        (0, 1),
        (0, 2),
        (1, 10),
        (1, 11),
        (1, 12),
    ]


def truncate(path):
    noise = np.random.default_rng(0).integers(0, 256, (60, 80, 3)).astype(np.uint8)
    Image.fromarray(noise).save(path)
    path.write_bytes(path.read_bytes()[:5000])


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (truncate, "truncated"),
        (lambda path: path.write_bytes(b""), "UnidentifiedImageError"),
        (lambda path: path.write_text("not an image"), "UnidentifiedImageError"),
        (lambda path: (path.unlink(), path.symlink_to("nowhere")), "FileNotFoundError"),
        (lambda path: Image.new("F", (8, 6)).save(path, format="TIFF"), "32-bit pixels"),
    ],
    ids=["truncated", "empty", "text", "dangling link", "float pixels"],
)
def test_unreadable_file_is_left_out_and_named(folder, damage, reason):
    broken = folder / "ant" / "1.png"
    damage(broken)
    source = ImageFolder(folder)
    assert len(source) == 5
    assert [file.path for file in source.skipped] == [broken]
    assert reason in source.skipped[0].reason
    assert [int(source[i]["label"]) for i in range(5)] == [0, 0, 1, 1, 1]


def test_files_that_are_no_images_and_hidden_ones_are_ignored(folder):
    (folder / "ant" / "notes.txt").write_text("ants")
    (folder / "ant" / ".0.png").write_text("a resource fork")
    (folder / ".thumbnails").mkdir()
    save(folder / "bee" / "more" / "deep.JPG", 10)
    source = ImageFolder(folder)
    assert (len(source), source.skipped, source.class_names) == (7, (), ("ant", "bee"))


def test_files_that_are_not_read_are_counted_by_suffix(folder):
    for name in ("0.heic", "1.HEIC", "2.npy", "README"):
        (folder / "ant" / name).write_text("no image")
    (note,) = ImageFolder(folder).notes
    assert "files that are not read" in note
    assert note.endswith("2 .heic, 1 .npy, 1 without suffix")


def test_a_directory_that_cannot_be_listed_is_named(folder, monkeypatch):
    locked, listed = folder / "ant" / "locked", os.scandir
    locked.mkdir()

    def scandir(place):
        if Path(place) == locked:
            raise PermissionError(13, "Permission denied", str(place))
        return listed(place)

    monkeypatch.setattr(os, "scandir", scandir)
    source = ImageFolder(folder)
    assert len(source) == 6
    assert [str(one) for one in source.skipped] == [
        f"{locked}: a directory whose files cannot be listed (Permission denied)"
    ]


def test_links_to_directories_are_followed_once_and_never_upwards(folder, tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    save(elsewhere / "more" / "9.png", 9)
    (elsewhere / "more" / "back").symlink_to(elsewhere)
    ant = folder / "ant"
    (ant / "0 linked").symlink_to(elsewhere)
    (ant / "again").symlink_to(elsewhere / "more")
    (ant / "all classes").symlink_to(folder)
    (ant / "circle").symlink_to(ant / "circle")
    source = ImageFolder(folder)
    names = [Path(source.name(i)).relative_to(folder).as_posix() for i in range(len(source))]
    own = [f"{name}/{number}.png" for name in ("ant", "bee") for number in range(3)]
    assert names == ["ant/0 linked/more/9.png", *own]
    assert not source.skipped


def make_empty_class(folder):
    (folder / "cat").mkdir()


def make_unreadable_class(folder):
    (folder / "cat").mkdir()
    (folder / "cat" / "0.png").write_text("no")


def make_splits(folder):
    (folder / "ant").rename(folder / "train")
    (folder / "bee").rename(folder / "val")


def make_flat(folder):
    for name in ("ant", "bee"):
        for file in (folder / name).iterdir():
            file.rename(folder / f"{name}{file.name}")
        (folder / name).rmdir()


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (make_empty_class, r"no readable image in .*cat; add images or remove"),
        (make_unreadable_class, r"no readable image in .*cat(.|\n)*0\.png: Unidentified"),
        (make_splits, r"holds splits \(train, val\), not classes; give one of them"),
        (make_flat, "0 class directories; at least two"),
        (lambda folder: save(folder / "bee" / "9.png", 19, size=(7, 8)), "images differ in size"),
    ],
    ids=["empty class", "unreadable class", "splits", "no classes", "sizes differ"],
)
def test_folder_that_cannot_be_trained_on_is_refused(folder, spoil, message):
    spoil(folder)
    with pytest.raises(ValueError, match=message):
        ImageFolder(folder)


def test_missing_folder_is_refused(tmp_path):
    with pytest.raises(ValueError, match="nowhere is not a directory"):
        ImageFolder(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("options", "message"),
    [({"fit": "stretch"}, "fit: got 'stretch'"), ({"image_size": (0, 5)}, "image_size: got 0x5")],
)
def test_bad_folder_options_are_refused(folder, options, message):
    with pytest.raises(ValueError, match=message):
        ImageFolder(folder, **options)


def test_file_that_breaks_after_the_check_is_replaced_with_its_own_label(folder):
    source = ImageFolder(folder)
    (folder / "ant" / "2.png").write_bytes(b"")
    with pytest.warns(UserWarning, match=r"2\.png was readable when the folder was checked"):
        example = source[2]
    assert (int(example["label"]), int(example["image"][0, 0, 0])) == (1, 10)


@pytest.mark.parametrize("size", [(6, 8), (4, 4), (9, 13), (3, 20)])
def test_native_fit_is_centred_and_never_resamples(tmp_path, size):
    pixels = np.random.default_rng(0).integers(1, 256, (6, 8, 3)).astype(np.uint8)
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        Image.fromarray(pixels).save(tmp_path / name / "0.png")
    given = ImageFolder(tmp_path, image_size=size)[0]["image"]
    # Whatever the size, what is seen of the image is a window of a large black canvas around it.
    canvas = np.pad(pixels, ((20, 20), (20, 20), (0, 0)))
    top, left = 20 + (6 - size[0]) // 2, 20 + (8 - size[1]) // 2
    np.testing.assert_array_equal(given, canvas[top : top + size[0], left : left + size[1]])


def test_resize_fit_covers_the_size(tmp_path):
    for name in ("a", "b"):
        save(tmp_path / name / "0.png", 200, size=(30, 50))
    image = ImageFolder(tmp_path, image_size=(16, 16), fit="resize")[0]["image"]
    assert image.shape == (16, 16, 3)
    assert (image[..., 0] == 200).all()


@pytest.mark.parametrize("fit", ["native", "resize"])
@pytest.mark.parametrize("size", [(6, 8), (4, 4), (9, 13), (3, 20), (12, 16)])
def test_the_window_of_what_is_fitted_is_where_its_pixels_are(size, fit):
    pixels = np.random.default_rng(0).integers(1, 256, (6, 8, 3)).astype(np.uint8)
    image = Image.fromarray(pixels)
    place = decoding.window((6, 8), size, fit)
    (top, left), (height, width) = place.offset, place.scale
    ends = (left, top, left + size[1] * width, top + size[0] * height)
    if fit == "native":
        found = image.crop(ends)
    else:
        found = image.resize(size[::-1], Image.Resampling.BILINEAR, box=ends)
    np.testing.assert_array_equal(found, decoding.fitted(image, size, fit))


@pytest.mark.parametrize(
    ("mode", "value", "expected"),
    [("L", 77, 77), ("RGBA", (77, 0, 0, 10), 77), ("I;16", 77 * 256 + 3, 77), ("1", 1, 255)],
)
def test_every_mode_becomes_8_bit_rgb(tmp_path, mode, value, expected):
    for name in ("a", "b"):
        save(tmp_path / name / "0.png", value, mode=mode)
    image = ImageFolder(tmp_path)[0]["image"]
    assert (image.dtype, image.shape) == (np.uint8, (6, 8, 3))
    assert (image[..., 0] == expected).all()


@pytest.mark.parametrize(("largest", "is_told"), [(4095, True), (40_000, False)])
def test_16_bit_images_that_become_almost_black_are_told(folder, largest, is_told):
    save(folder / "ant" / "wide.png", largest, mode="I;16")
    save(folder / "bee" / "wide.png", largest // 2, mode="I;16")
    notes = ImageFolder(folder).notes
    assert len(notes) == is_told
    if is_told:
        assert "value above 4,095, and these are divided by 256" in notes[0]
        assert "at most 15 of 255; rescale the files" in notes[0]


def test_16_bit_colours_that_become_almost_black_are_told(folder):
    """Pillow reads them and does not write them."""

    def chunk(kind, content):
        checksum = struct.pack(">I", zlib.crc32(kind + content))
        return struct.pack(">I", len(content)) + kind + content + checksum

    rows = (b"\0" + struct.pack(">24H", *[4000] * 24)) * 6
    (folder / "ant" / "wide.png").write_bytes(
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", struct.pack(">IIBBBBB", 8, 6, 16, 2, 0, 0, 0))
        + chunk(b"IDAT", zlib.compress(rows))
        + chunk(b"IEND", b"")
    )
    source = ImageFolder(folder)
    assert source[3]["image"].max() == 15
    assert "value above 4,095, and these are divided by 256" in source.notes[0]


def test_exif_orientation_is_applied(tmp_path):
    turned = Image.Exif()
    turned[0x0112] = 6  # rotate by 90 degrees to view
    for name in ("a", "b"):
        save(tmp_path / name / "0.png", 5, size=(6, 8), exif=turned)
    assert ImageFolder(tmp_path).image_shape == (8, 6, 3)


# --- Digits -------------------------------------------------------------------------------------


def test_digits_depend_on_seed_and_index_alone():
    first, again = ScatteredDigits((64, 96), seed=3), ScatteredDigits((64, 96), seed=3)
    np.testing.assert_array_equal(first[5]["image"], again[5]["image"])
    assert (first[5]["image"] != ScatteredDigits((64, 96), seed=4)[5]["image"]).any()
    assert (first[5]["image"] != first[15]["image"]).any()
    assert first[5]["image"].shape == first.image_shape == (64, 96, 3)


def test_every_digit_on_a_canvas_is_a_scan_of_the_labelled_class():
    """Undo the drawing: cut the canvas into its connected cells and find each scan in the set."""
    from sklearn.datasets import load_digits

    bundle = load_digits()
    scans = bundle.images / bundle.images.sum(axis=(1, 2), keepdims=True)
    source = ScatteredDigits((48, 48), classes=(7, 2), count=4)
    for index in range(4):
        canvas = source[index]["image"][..., 0].astype(float)
        nearest = []
        for top, left in np.ndindex(3, 3):
            cell = canvas[16 * top :, 16 * left :][:16, :16]
            if not cell.any():
                continue
            windows = np.lib.stride_tricks.sliding_window_view(cell, (8, 8)).reshape(-1, 1, 8, 8)
            distance = np.abs(windows / 3100 - scans).sum(axis=(2, 3)).min(axis=0)
            assert distance.min() < 0.02
            nearest.append(bundle.target[distance.argmin()])
        assert nearest == [int(source.class_names[source[index]["label"]])] * 4


def test_label_cannot_be_read_at_an_eighth_of_the_resolution():
    """Total brightness, the one thing dots still carry, is the same for every class."""
    source = ScatteredDigits((256, 256), num_images=40)
    totals = np.array([int(source[i]["image"].sum()) for i in range(40)])
    assert np.ptp(totals) < 0.005 * totals.mean()


def test_classes_are_balanced():
    source = ScatteredDigits((32, 32), num_images=30, classes=(1, 4, 8))
    assert np.bincount([source[i]["label"] for i in range(30)]).tolist() == [10, 10, 10]


@pytest.mark.parametrize(
    ("size", "options", "message"),
    [
        ((15, 64), {}, "use at least 16x16"),
        ((64, 64), {"classes": (3,)}, "two or more different digits"),
        ((64, 64), {"classes": (3, 3)}, "two or more different digits"),
        ((64, 64), {"classes": (3, 10)}, "digits are 0 to 9"),
        ((64, 64), {"count": 17}, "takes 1 to 16 digits"),
        ((64, 64), {"num_images": 0}, "num_images: got 0"),
    ],
)
def test_bad_digit_options_are_refused(size, options, message):
    with pytest.raises(ValueError, match=message):
        ScatteredDigits(size, **options)


# --- Batches ------------------------------------------------------------------------------------


def drawn(source, batch_size, seed, count):
    stream = batches(source, batch_size, seed=seed)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return [next(stream) for _ in range(count)]


def test_batches_are_uint8_with_int32_labels(folder):
    batch = drawn(ImageFolder(folder), 4, 0, 1)[0]
    assert (batch["image"].shape, batch["image"].dtype) == ((4, 6, 8, 3), np.uint8)
    assert (batch["label"].shape, batch["label"].dtype) == ((4,), np.int32)


def test_order_is_the_seeds_and_every_epoch_sees_every_image_once(folder):
    source = ImageFolder(folder)

    def order(seed):
        reds = [batch["image"][:, 0, 0, 0] for batch in drawn(source, 2, seed, 6)]
        return np.concatenate(reds).tolist()

    assert order(1) == order(1)
    assert order(1) != order(2)
    assert sorted(order(1)[:6]) == sorted(order(1)[6:]) == [0, 1, 2, 10, 11, 12]
    assert order(1)[:6] != order(1)[6:]


def test_images_keep_their_labels_in_batches(folder):
    for batch in drawn(ImageFolder(folder), 5, 0, 5):
        np.testing.assert_array_equal(batch["label"], batch["image"][:, 0, 0, 0] // 10)


def test_balanced_batches_let_the_classes_take_turns(folder):
    (folder / "ant" / "1.png").unlink()
    (folder / "ant" / "2.png").unlink()
    stream = batches(ImageFolder(folder), 2, seed=0, balanced=True)
    drawn_reds = [sorted(next(stream)["image"][:, 0, 0, 0].tolist()) for _ in range(6)]
    assert [first for first, _ in drawn_reds] == [0] * 6
    seconds = [second for _, second in drawn_reds]
    assert sorted(seconds[:3]) == sorted(seconds[3:]) == [10, 11, 12]


def test_empty_batch_is_refused(folder):
    with pytest.raises(ValueError, match="batch_size: got 0"):
        batches(ImageFolder(folder), 0, seed=0)


def test_pixels_are_labelled_with_their_digit_or_the_background():
    canvases = ScatteredDigits((48, 64), classes=(7, 2))
    source = DigitPixels(canvases)
    assert source.class_names == ("background", "7", "2")
    assert len(source) == len(canvases)
    batch = next(batches(source, 2, seed=0, balanced=True))
    assert batch["label"].shape == (2, *source.label_shape) == (2, 48, 64)
    assert {tuple(np.unique(label)) for label in batch["label"]} == {(0, 1), (0, 2)}
    assert ((batch["label"] > 0) == (batch["image"][..., 0] > 0)).all()
