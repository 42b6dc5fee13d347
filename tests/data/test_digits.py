import concurrent.futures
import dataclasses
import json
from collections import Counter

import numpy as np
import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import BoxMode
from PIL import Image

from efficient_detr.data import DigitsSettings, digits, generate_digits, register_digits
from efficient_detr.data.digit_images import (
    DigitPictureSettings,
    GlyphSource,
    draw_digit_picture,
)
from efficient_detr.data.digits import split_digits
from efficient_detr.errors import UserError

SMALL = DigitsSettings(train_images=40, val_images=12)


def contents(folder):
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def picture_size(path):
    with Image.open(path) as picture:
        return picture.size


def annotations(folder, split):
    return json.loads((folder / f"instances_{split}.json").read_text())


@pytest.fixture(scope="module")
def scans():
    sklearn_datasets = pytest.importorskip("sklearn.datasets", reason="needs scikit-learn")
    return sklearn_datasets.load_digits()


@pytest.fixture(scope="module")
def folder(tmp_path_factory, scans):
    return generate_digits(tmp_path_factory.mktemp("root"), SMALL)


@pytest.fixture(scope="module")
def glyphs(scans):
    indices = list(range(0, 1797, 12))
    return GlyphSource(scans=scans.images, values=scans.target, indices=indices)


@pytest.fixture
def names():
    """A name for the catalogs; what a test registers under it is removed."""
    name = "digits_of_a_test"
    yield name
    for split in ("train", "val"):
        if f"{name}_{split}" in DatasetCatalog.list():
            DatasetCatalog.remove(f"{name}_{split}")
            MetadataCatalog.remove(f"{name}_{split}")


class TestSplit:
    def test_no_scan_is_in_both_halves(self):
        split = split_digits(1797, 1400)
        assert len(split["train"]) == 1400
        assert len(split["val"]) == 397
        assert sorted(split["train"] + split["val"]) == list(range(1797))

    def test_it_is_the_same_every_time_but_not_in_the_order_of_the_scans(self):
        assert split_digits(1797, 1400) == split_digits(1797, 1400)
        assert split_digits(1797, 1400)["train"] != list(range(1400))

    def test_every_digit_can_be_validated(self, scans):
        values = scans.target[split_digits(1797, 1400)["val"]]
        # 397 scans of 10 digits: about 40 each.
        assert min(Counter(values.tolist()).values()) >= 25

    def test_pictures_show_only_scans_of_their_half(self, folder, scans):
        split = split_digits(1797, 1400)
        for half in ("train", "val"):
            for annotation in annotations(folder, half)["annotations"]:
                assert annotation["scan_index"] in split[half]
                assert scans.target[annotation["scan_index"]] + 1 == annotation["category_id"]

    @pytest.mark.parametrize("train_digits", [0, 10, 11])
    def test_an_empty_half_is_an_error(self, train_digits):
        with pytest.raises(ValueError, match="from 1 to 9"):
            split_digits(10, train_digits)


class TestPictures:
    def test_the_box_is_tight_around_what_was_painted(self, glyphs):
        """A glyph on an even background, painted dark on white: the ink can be found again."""
        generator = np.random.default_rng(5)
        found = 0
        for index in glyphs.indices[:40]:
            glyph = glyphs.render(
                index,
                longer_side=float(generator.uniform(24, 70)),
                shape=np.array([[0.9, 0.2], [-0.1, 1.1]]),
                digit_side=(16, 80),
            )
            if glyph is None:
                continue
            left, top, width, height = glyph.box
            ink = glyph.mask >= 0.5
            inside = ink[top : top + height, left : left + width]
            assert inside.sum() == ink.sum()  # nothing outside ...
            assert inside[0].any()  # ... and ink on each of the four sides
            assert inside[-1].any()
            assert inside[:, 0].any()
            assert inside[:, -1].any()
            found += 1
        assert found >= 30

    def test_a_wanted_size_is_met(self, glyphs):
        for side in (30.0, 50.0, 70.0):
            glyph = glyphs.render(
                glyphs.indices[0], longer_side=side, shape=np.eye(2), digit_side=(16, 80)
            )
            assert abs(max(glyph.box[2:]) - side) <= 2

    def test_a_digit_too_slim_for_the_permitted_sides_is_refused(self, glyphs, scans):
        one = next(index for index in glyphs.indices if scans.target[index] == 1)
        squeezed = np.diag([0.1, 1.0])  # ten times slimmer: 16 px wide means over 80 px high
        assert glyphs.render(one, longer_side=40.0, shape=squeezed, digit_side=(16, 80)) is None

    def test_boxes_lie_on_what_a_digit_changes(self, glyphs):
        """The same background with and without a digit, apart from fresh noise.

        The noise has a standard deviation of at most 5 a channel, so the difference of two
        pictures has at most 5 * 2 ** 0.5 * 0.67 = 4.7 in brightness (the weights of the channels
        have a norm of 0.67); half-covered ink differs by about 60. 45 separates the two.
        """
        plain = DigitPictureSettings(
            max_clutter=0, photo_share=0.0, contrast=(120, 125), empty_share=0.0
        )
        luma = np.array([0.299, 0.587, 0.114])
        for seed in range(30):
            pictures = []
            for max_digits in (0, 1):
                settings = dataclasses.replace(plain, max_digits=max_digits)
                generator = np.random.default_rng(seed)
                pictures.append(draw_digit_picture(generator, glyphs, [], settings))
            (empty, none), (image, placed) = pictures
            assert none == []
            changed = np.abs(image @ luma - empty @ luma) > 45
            rows, columns = np.flatnonzero(changed.any(1)), np.flatnonzero(changed.any(0))
            left, top, width, height = placed[0].box
            assert abs(columns[0] - left) <= 2
            assert abs(rows[0] - top) <= 2
            assert abs(columns[-1] + 1 - left - width) <= 2
            assert abs(rows[-1] + 1 - top - height) <= 2

    def test_numbers_sides_and_overlaps_stay_in_their_limits(self, glyphs):
        settings = DigitPictureSettings()
        numbers: Counter[int] = Counter()
        for seed in range(150):
            image, placed = draw_digit_picture(np.random.default_rng(seed), glyphs, [], settings)
            numbers[len(placed)] += 1
            assert image.dtype == np.uint8
            height, width, channels = image.shape
            assert channels == 3
            assert 96 <= min(height, width) <= max(height, width) <= 112
            for digit in placed:
                x, y, w, h = digit.box
                assert x >= 0
                assert y >= 0
                assert x + w <= width
                assert y + h <= height
                assert 16 <= min(w, h) <= max(w, h) <= 80
        assert set(numbers) == set(range(7))
        assert numbers[0] < 20  # about 4 %

    def test_overlap_is_limited(self, glyphs):
        strict = DigitPictureSettings(max_overlap=0.0, empty_share=0.0)
        loose = DigitPictureSettings(max_overlap=0.12, overlap_share=1.0, empty_share=0.0)
        assert max(largest_overlaps(glyphs, strict)) == 0.0
        assert 0.0 < max(largest_overlaps(glyphs, loose)) <= 0.12

    def test_settings_that_cannot_be_met_are_named(self):
        with pytest.raises(ValueError, match="digit_side"):
            DigitPictureSettings(digit_side=(16, 95))
        with pytest.raises(ValueError, match="image_side"):
            DigitPictureSettings(image_side=(112, 96))
        with pytest.raises(ValueError, match="val_images"):
            DigitsSettings(val_images=0)
        with pytest.raises(ValueError, match="seed"):
            DigitsSettings(seed=-1)


def largest_overlaps(glyphs, settings):
    """Largest intersection over union of two boxes in each of some pictures."""
    for seed in range(40):
        _, placed = draw_digit_picture(np.random.default_rng(seed), glyphs, [], settings)
        masks = []
        for digit in placed:
            x, y, w, h = digit.box
            mask = np.zeros((112, 112), dtype=bool)
            mask[y : y + h, x : x + w] = True
            masks.append(mask)
        yield max(
            ((a & b).sum() / (a | b).sum() for i, a in enumerate(masks) for b in masks[:i]),
            default=0.0,
        )


class TestGeneration:
    def test_equal_settings_give_equal_bytes(self, folder, tmp_path):
        again = generate_digits(tmp_path, SMALL)
        assert contents(again) == contents(folder)

    def test_another_seed_gives_other_pictures(self, folder, tmp_path):
        other = generate_digits(tmp_path, DigitsSettings(train_images=40, val_images=12, seed=1))
        one, two = contents(folder), contents(other)
        assert one.keys() == two.keys()
        assert one["train/000001.jpg"] != two["train/000001.jpg"]

    def test_a_picture_does_not_depend_on_how_many_there_are(self, folder, tmp_path):
        fewer = generate_digits(tmp_path, DigitsSettings(train_images=3, val_images=1))
        for name in ("train/000003.jpg", "val/000001.jpg"):
            assert (fewer / name).read_bytes() == (folder / name).read_bytes()

    def test_the_files_are_what_the_annotations_say(self, folder):
        for split, number in (("train", 40), ("val", 12)):
            data = annotations(folder, split)
            assert [category["id"] for category in data["categories"]] == list(range(1, 11))
            assert [category["name"] for category in data["categories"]] == list("0123456789")
            assert len(data["images"]) == number == len(list((folder / split).iterdir()))
            assert len({a["id"] for a in data["annotations"]}) == len(data["annotations"])
            for image in data["images"]:
                assert picture_size(folder / split / image["file_name"]) == (
                    image["width"],
                    image["height"],
                )

    def test_there_are_pictures_without_digits(self, folder):
        data = annotations(folder, "train")
        filled = {annotation["image_id"] for annotation in data["annotations"]}
        empty = [image for image in data["images"] if image["id"] not in filled]
        assert 1 <= len(empty) <= 10

    def test_what_is_there_is_not_generated_again(self, folder):
        before = (folder / "train" / "000001.jpg").stat().st_mtime_ns
        calls = []
        generate_digits(folder.parent, SMALL, progress=lambda *done: calls.append(done))
        assert calls == []
        assert (folder / "train" / "000001.jpg").stat().st_mtime_ns == before

    def test_progress_counts_to_the_end(self, tmp_path, scans):
        calls = []
        settings = DigitsSettings(train_images=3, val_images=2)
        generate_digits(tmp_path, settings, progress=lambda *done: calls.append(done))
        assert calls == [(1, 5), (2, 5), (3, 5), (4, 5), (5, 5)]

    def test_other_settings_replace_the_folder(self, tmp_path, scans):
        generate_digits(tmp_path, DigitsSettings(train_images=4, val_images=2))
        folder = generate_digits(tmp_path, DigitsSettings(train_images=2, val_images=2))
        assert len(list((folder / "train").iterdir())) == 2
        assert not [path for path in tmp_path.iterdir() if path.is_dir() and path != folder]

    def test_another_generator_replaces_the_folder(self, tmp_path, scans, monkeypatch):
        settings = DigitsSettings(train_images=2, val_images=1)
        folder = generate_digits(tmp_path, settings)
        changed = tmp_path / "changed.py"
        changed.write_text("# another way to draw\n")
        monkeypatch.setattr(digits.digit_images, "__file__", str(changed))
        old = json.loads((folder / "generator.json").read_text())
        generate_digits(tmp_path, settings)
        new = json.loads((folder / "generator.json").read_text())
        assert old["settings"] == new["settings"]
        assert old["generator"] != new["generator"]

    def test_a_folder_of_somebody_else_is_left_alone(self, tmp_path, scans):
        mine = tmp_path / "quickstart_digits" / "notes.txt"
        mine.parent.mkdir()
        mine.write_text("mine")
        with pytest.raises(UserError, match="quickstart_digits exists but was not written by"):
            generate_digits(tmp_path, DigitsSettings(train_images=2, val_images=1))
        assert mine.read_text() == "mine"

    def test_an_interrupted_generation_leaves_nothing(self, tmp_path, scans):
        def interrupt(done, total):
            if done == 3:
                raise KeyboardInterrupt

        settings = DigitsSettings(train_images=4, val_images=2)
        with pytest.raises(KeyboardInterrupt):
            generate_digits(tmp_path, settings, progress=interrupt)
        assert not [path for path in tmp_path.iterdir() if path.is_dir()]
        assert (generate_digits(tmp_path, settings) / "instances_val.json").is_file()

    def test_of_concurrent_calls_one_generates(self, tmp_path, scans):
        settings = DigitsSettings(train_images=8, val_images=2)
        counts: list[list[tuple[int, ...]]] = [[] for _ in range(3)]

        def call(index):
            return generate_digits(tmp_path, settings, progress=lambda *d: counts[index].append(d))

        with concurrent.futures.ThreadPoolExecutor(3) as pool:
            folders = list(pool.map(call, range(3)))
        assert len(set(folders)) == 1
        assert sorted(len(calls) for calls in counts) == [0, 0, 10]


class TestRegistration:
    def test_nothing_is_generated_before_it_is_read(self, tmp_path, names):
        register_digits(tmp_path, SMALL, name=names)
        assert list(tmp_path.iterdir()) == []
        assert MetadataCatalog.get(f"{names}_val").thing_classes == list("0123456789")
        # Files that are not there yet must not be named, or checks of the files would fail.
        assert MetadataCatalog.get(f"{names}_val").get("json_file") is None

    def test_records_have_contiguous_classes_and_files(self, folder, names):
        train_name, val_name = register_digits(folder.parent, SMALL, name=names)
        assert (train_name, val_name) == (f"{names}_train", f"{names}_val")
        records = DatasetCatalog.get(val_name)
        assert len(records) == 12
        by_id = {a["id"]: a for a in annotations(folder, "val")["annotations"]}
        expected = Counter(a["category_id"] - 1 for a in by_id.values())
        found = Counter(a["category_id"] for r in records for a in r["annotations"])
        assert found == expected
        assert all(picture_size(r["file_name"]) == (r["width"], r["height"]) for r in records)
        assert {a["bbox_mode"] for r in records for a in r["annotations"]} == {BoxMode.XYWH_ABS}
        metadata = MetadataCatalog.get(val_name)
        assert metadata.json_file == str(folder / "instances_val.json")
        assert metadata.image_root == str(folder / "val")
        assert metadata.evaluator_type == "coco"

    def test_registering_twice_is_harmless(self, folder, names):
        first = register_digits(folder.parent, SMALL, name=names)
        DatasetCatalog.get(first[0])
        assert register_digits(folder.parent, SMALL, name=names) == first
        assert len(DatasetCatalog.get(first[0])) == 40

    def test_a_taken_name_is_an_error(self, folder, tmp_path, names):
        register_digits(folder.parent, SMALL, name=names)
        with pytest.raises(UserError, match=f"{names}_train"):
            register_digits(tmp_path, SMALL, name=names)
        with pytest.raises(UserError, match=f"{names}_train"):
            register_digits(folder.parent, name=names)

    def test_the_package_registers_the_quickstart_data(self):
        assert {"quickstart_digits_train", "quickstart_digits_val"} <= set(DatasetCatalog.list())
        assert MetadataCatalog.get("quickstart_digits_val").thing_classes == list("0123456789")

    def test_the_default_root_is_detectron2s(self, monkeypatch):
        monkeypatch.setenv("DETECTRON2_DATASETS", "/somewhere")
        assert str(digits.default_root()) == "/somewhere"
        monkeypatch.delenv("DETECTRON2_DATASETS")
        assert str(digits.default_root()) == "datasets"
