"""Images with masks, held-out images and random changes: labels stay with what they label."""

import numpy as np
import pytest
from PIL import Image

from lrjax.app.data import (
    Augmentation,
    ImageFolder,
    ScatteredDigits,
    SegmentationFolder,
    batches,
    check_validation,
    in_order,
    split,
)
from lrjax.app.data.sources import name_of


def save_pair(folder, stem, image, mask, mode="L"):
    for name, content, kind in (("images", image, "RGB"), ("masks", mask, mode)):
        (folder / name).mkdir(exist_ok=True, parents=True)
        made = Image.fromarray(np.asarray(content, np.uint8))
        made = made.convert(kind) if made.mode != kind and kind != "P" else made
        if kind == "P":
            made.putpalette([0, 0, 0, 255, 0, 0, 0, 255, 0])
        made.save(folder / name / f"{stem}.png")


@pytest.fixture
def folder(tmp_path):
    """Three pairs of 6x8; a pixel's class is its row modulo 3, and its red value ten times that."""
    mask = np.tile(np.arange(6)[:, None] % 3, (1, 8))
    image = np.stack([mask * 10, mask * 0, mask * 0], -1)
    for stem in ("a", "b", "c"):
        save_pair(tmp_path, stem, image, mask)
    return tmp_path


def test_pairs_are_read(folder):
    source = SegmentationFolder(folder)
    assert (len(source), source.class_names) == (3, ("0", "1", "2"))
    assert (source.image_shape, source.label_shape) == ((6, 8, 3), (6, 8))
    example = source[1]
    assert example["label"].dtype == np.int32
    np.testing.assert_array_equal(example["image"][..., 0], example["label"] * 10)
    assert source.name(1) == str(folder / "images" / "b.png")


@pytest.mark.parametrize("fit", ["native", "resize"])
@pytest.mark.parametrize("size", [(4, 4), (12, 16), (9, 5)])
def test_masks_are_brought_to_size_with_their_images(folder, fit, size):
    example = SegmentationFolder(folder, image_size=size, fit=fit)[0]
    assert example["label"].shape == size
    assert set(np.unique(example["label"])) <= {0, 1, 2}
    if fit == "native":
        np.testing.assert_array_equal(example["image"][..., 0], example["label"] * 10)


def test_values_of_a_palette_are_its_indices(tmp_path):
    mask = np.arange(12).reshape(3, 4) % 3
    save_pair(tmp_path, "a", np.zeros((3, 4, 3)), mask, mode="P")
    np.testing.assert_array_equal(SegmentationFolder(tmp_path)[0]["label"], mask)


def other_size(folder):
    save_pair(folder, "b", np.zeros((6, 8, 3)), np.zeros((6, 7)))


def colours(folder):
    Image.new("RGB", (8, 6)).save(folder / "masks" / "b.png")


def gap(folder):
    save_pair(folder, "b", np.zeros((6, 8, 3)), np.full((6, 8), 255))


def one_class(folder):
    for stem in "abc":
        save_pair(folder, stem, np.zeros((6, 8, 3)), np.zeros((6, 8)))


def same_name(folder):
    Image.new("RGB", (8, 6)).save(folder / "images" / "a.jpg")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (other_size, r"masks/b.png is 6x7 and .*images/b.png 6x8 \(height x width\)"),
        (gap, "has the value 255, but no mask has 3, 4, 5, 6, 7 and 247 more"),
        (one_class, "at least two classes"),
        (same_name, r"files share a name: .*a.jpg, .*a.png"),
        (lambda f: (f / "masks" / "b.png").unlink(), "no mask for .*b.png; add masks"),
        (lambda f: (f / "images" / "b.png").unlink(), "no image for .*b.png; add images"),
        (lambda f: (f / "masks").rename(f / "labels"), "has no directory masks"),
    ],
)
def test_what_does_not_fit_is_refused(folder, damage, message):
    damage(folder)
    with pytest.raises(ValueError, match=message):
        SegmentationFolder(folder)


def test_unreadable_pairs_are_left_out_and_named(folder):
    colours(folder)
    (folder / "images" / "c.png").write_text("no image")
    source = SegmentationFolder(folder)
    assert len(source) == 1
    assert [file.path.name for file in source.skipped] == ["b.png", "c.png"]
    assert "this file has colours" in source.skipped[0].reason


def turned(path, orientation, size=(8, 6)):
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.new("RGB" if "images" in path.parts else "L", size).save(path, exif=exif)


def test_a_mask_that_may_be_turned_or_not_is_left_out_and_named(folder):
    """By half a circle, which leaves the size as it is."""
    turned(folder / "images" / "b.png", 3)
    (skipped,) = SegmentationFolder(folder).skipped
    assert skipped.path == folder / "images" / "b.png"
    assert "turned by an EXIF orientation" in skipped.reason
    assert "b.png may be turned or not; save the image upright" in skipped.reason
    turned(folder / "masks" / "b.png", 3)
    assert not SegmentationFolder(folder).skipped


def test_a_mask_of_the_upright_size_is_upright(folder):
    turned(folder / "images" / "b.png", 6, size=(6, 8))
    source = SegmentationFolder(folder)
    assert (len(source), source.skipped) == (3, ())


def test_a_mask_of_the_size_before_turning_is_refused_and_says_why(folder):
    turned(folder / "images" / "b.png", 6)
    with pytest.raises(ValueError, match=r"b\.png 8x6 .*b\.png: it is turned by an EXIF orient"):
        SegmentationFolder(folder)


def test_a_pair_that_breaks_later_is_replaced_with_a_warning(folder):
    source = SegmentationFolder(folder)
    (folder / "masks" / "a.png").write_text("no image")
    with pytest.warns(UserWarning, match=r"a\.png or its mask was readable"):
        example = source[0]
    np.testing.assert_array_equal(example["image"][..., 0], example["label"] * 10)


def test_masks_are_no_classes_of_images(folder):
    with pytest.raises(ValueError, match="images and masks, not classes"):
        ImageFolder(folder)


# --- Held out -------------------------------------------------------------------------------------


def test_a_part_of_every_class_is_held_out():
    source = ScatteredDigits((32, 32), num_images=21, classes=(0, 1, 2))
    training, validation = split(source, 0.25, seed=3)
    assert sorted([*training.indices, *validation.indices]) == list(range(21))
    assert np.bincount(validation.labels).tolist() == [2, 2, 2]
    again = split(source, 0.25, seed=3)[1]
    np.testing.assert_array_equal(validation.indices, again.indices)
    assert (split(source, 0.25, seed=4)[1].indices != validation.indices).any()
    example = validation[0]
    assert example["label"] == source.labels[validation.indices[0]]
    assert name_of(validation, 0) == f"image {validation.indices[0]}"


@pytest.mark.parametrize("fraction", [0.0, 1.0, -0.1, 2.0])
def test_a_fraction_is_between_zero_and_one(fraction):
    with pytest.raises(ValueError, match="use a fraction between 0 and 1"):
        split(ScatteredDigits((32, 32), num_images=4), fraction, seed=0)


def test_a_class_of_one_image_cannot_be_held_out():
    source = ScatteredDigits((32, 32), num_images=3, classes=(0, 1))
    with pytest.raises(ValueError, match="class '1' has one image"):
        split(source, 0.5, seed=0)


def test_held_out_images_show_every_class(folder):
    """Class 3 is in one of four images."""
    save_pair(folder, "d", np.zeros((6, 8, 3)), np.full((6, 8), 3))
    source = SegmentationFolder(folder)
    for seed in range(5):
        training, validation = split(source, 0.5, seed=seed)
        shown = [validation.classes_of(index) for index in range(len(validation))]
        assert {3} in shown
        assert {0, 1, 2} in shown
        check_validation(training, validation)
    with pytest.raises(ValueError, match=r"no held-out image shows .*; hold more out"):
        check_validation(*split(source, 0.25, seed=0))


def test_a_folder_of_other_classes_is_refused(tmp_path):
    for root, names in (("one", ("ant", "bee")), ("two", ("ant", "cat"))):
        for name in names:
            (tmp_path / root / name).mkdir(parents=True)
            Image.new("RGB", (8, 6)).save(tmp_path / root / name / "0.png")
    one, two = (ImageFolder(tmp_path / name) for name in ("one", "two"))
    with pytest.raises(ValueError, match="it lacks bee and adds cat"):
        check_validation(one, two)
    larger = ImageFolder(tmp_path / "one", image_size=(8, 8))
    with pytest.raises(ValueError, match="images are 8x8 and those to train on 6x8"):
        check_validation(one, larger)


def test_every_image_is_evaluated_once():
    source = ScatteredDigits((32, 32), num_images=5, classes=(0, 1))
    seen = [(batch["index"].tolist(), count) for batch, count in in_order(source, 2)]
    assert seen == [([0, 1], 2), ([2, 3], 2), ([4, 4], 1)]


# --- Random changes -------------------------------------------------------------------------------

EVERYTHING = Augmentation(True, True, 2, 0.5, 0.5, 0.5)


class Numbered:
    """Images whose pixels are all different, with their first channel as label."""

    image_shape = (6, 8, 3)
    label_shape = (6, 8)
    class_names = ("0", "1")
    labels = np.zeros(4, np.int32)

    def __len__(self):
        return 4

    def __getitem__(self, index):
        image = np.arange(6 * 8 * 3).reshape(6, 8, 3).astype(np.uint8)
        return {"image": image, "label": image[..., 0].astype(np.int32)}


@pytest.mark.parametrize(
    "augmentation",
    [Augmentation(flip=True), Augmentation(flip_rows=True), Augmentation(crop=3)],
    ids=str,
)
def test_labels_move_with_their_pixels(augmentation):
    stream = batches(Numbered(), 4, seed=0, augmentation=augmentation)
    found = [next(stream) for _ in range(4)]
    for batch in found:
        np.testing.assert_array_equal(batch["image"][..., 0], batch["label"])
    changed = [bool((i != Numbered()[0]["image"]).any()) for b in found for i in b["image"]]
    assert sum(changed) > 0
    assert augmentation.crop or sum(changed) < len(changed)


def test_colours_change_by_no_more_than_their_strength():
    grey = {"image": np.full((4, 4, 3), 100, np.uint8), "label": np.zeros((), np.int32)}
    change = Augmentation(brightness=0.2)
    values = [
        change.random_map(grey, np.random.default_rng(seed))["image"][0, 0, 0] for seed in range(50)
    ]
    assert 79 <= min(values) < 90
    assert 110 < max(values) <= 121


def test_changes_follow_from_the_seed_and_go_on_from_a_position():
    def stream(seed):
        return batches(Numbered(), 2, seed=seed, augmentation=EVERYTHING)

    first, again, other = stream(0), stream(0), stream(1)
    one = [next(first)["image"] for _ in range(3)]
    np.testing.assert_array_equal(one, [next(again)["image"] for _ in range(3)])
    assert (np.array(one) != np.array([next(other)["image"] for _ in range(3)])).any()
    position = first.get_state()
    after = next(first)["image"]
    resumed = stream(0)
    resumed.set_state(position)
    np.testing.assert_array_equal(next(resumed)["image"], after)


def test_a_crop_larger_than_the_image_is_refused():
    with pytest.raises(ValueError, match=r"augment\.crop: got 6 for images of 6x8; use at most 5"):
        Augmentation(crop=6).check((6, 8, 3))
