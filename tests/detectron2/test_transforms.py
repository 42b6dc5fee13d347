"""Transforms and augmentations: what they do to images and boxes, and the numbers they draw."""

import numpy as np
import pytest
from detectron2.data import transforms as T

IMAGE = np.arange(40 * 60 * 3, dtype=np.uint8).reshape(40, 60, 3)


def augment(augmentation, image=IMAGE, boxes=None, seed=0):
    np.random.seed(seed)
    aug_input = T.AugInput(image.copy(), boxes=None if boxes is None else np.array(boxes, float))
    return aug_input, augmentation(aug_input)


def test_resize_moves_boxes_with_the_image():
    aug_input, transform = augment(T.Resize((20, 120)), boxes=[[6, 4, 30, 40]])
    assert aug_input.image.shape == (20, 120, 3)
    assert aug_input.image.dtype == np.uint8
    assert aug_input.boxes.tolist() == [[12, 2, 60, 20]]  # x times 2, y by half
    back = transform.inverse()
    assert (back.h, back.w, back.new_h, back.new_w) == (20, 120, 40, 60)
    with pytest.raises(AssertionError):
        transform.apply_image(IMAGE[:-1])


@pytest.mark.parametrize("dtype", [np.uint8, np.float32, np.float64])
@pytest.mark.parametrize("shape", [(8, 6), (8, 6, 1), (8, 6, 3)])
def test_resize_keeps_type_dimensions_and_constant_images(dtype, shape):
    resized = T.ResizeTransform(8, 6, 4, 9).apply_image(np.full(shape, 7, dtype))
    assert resized.shape == (4, 9, *shape[2:])
    assert resized.dtype == dtype
    assert np.unique(resized).tolist() == [7]


def test_labels_are_resized_without_new_values():
    labels = np.array([[0, 200], [100, 50]], np.uint8)
    resized = T.ResizeTransform(2, 2, 4, 4).apply_segmentation(labels)
    assert resized.tolist() == np.kron(labels, np.ones((2, 2), np.uint8)).tolist()


@pytest.mark.parametrize(
    ("size", "limit", "expected"),
    [
        (20, 1000, (20, 30)),
        (80, 90, (60, 90)),  # 80 x 120 is scaled by 90 / 120
        (33, 1000, (33, 50)),  # 49.5 is rounded up
    ],
)
def test_resize_shortest_edge(size, limit, expected):
    assert T.ResizeShortestEdge.get_output_shape(40, 60, size, limit) == expected
    assert T.ResizeShortestEdge.get_output_shape(60, 40, size, limit) == expected[::-1]
    aug_input, _ = augment(T.ResizeShortestEdge(size, limit))
    assert aug_input.image.shape[:2] == expected


def test_lengths_are_drawn_from_numpy():
    choice = T.ResizeShortestEdge([20, 30, 50], 1000, sample_style="choice")
    between = T.ResizeShortestEdge([20, 50], 1000)
    for seed in range(5):
        chosen, drawn = (augment(resize, seed=seed)[1].new_h for resize in (choice, between))
        np.random.seed(seed)
        assert chosen == np.random.choice([20, 30, 50])
        np.random.seed(seed)
        assert drawn == np.random.randint(20, 51)
    assert isinstance(augment(T.ResizeShortestEdge(0))[1], T.NoOpTransform)


def test_flip_draws_one_number_and_mirrors_boxes():
    flip = T.RandomFlip(prob=0.4)
    for seed in range(6):
        aug_input, transform = augment(flip, boxes=[[3, 4, 10, 20]], seed=seed)
        np.random.seed(seed)
        flipped = np.random.uniform() < 0.4
        assert isinstance(transform, T.HFlipTransform if flipped else T.NoOpTransform)
        # width 60: x0 becomes 60 - 10, x1 becomes 60 - 3
        assert aug_input.boxes.tolist() == [[50, 4, 57, 20] if flipped else [3, 4, 10, 20]]
        assert np.array_equal(aug_input.image, IMAGE[:, ::-1] if flipped else IMAGE)
    vertical = augment(T.RandomFlip(1.0, horizontal=False, vertical=True))[0]
    assert np.array_equal(vertical.image, IMAGE[::-1])
    with pytest.raises(ValueError):  # noqa: PT011
        T.RandomFlip(horizontal=True, vertical=True)


def test_crop_draws_height_width_top_left():
    random_crop = T.RandomCrop("absolute_range", (16, 24))
    aug_input, crop = augment(random_crop, boxes=[[0, 0, 60, 40]], seed=5)
    np.random.seed(5)
    height = np.random.randint(16, 25)
    width = np.random.randint(16, 25)
    top = np.random.randint(40 - height + 1)
    left = np.random.randint(60 - width + 1)
    assert (crop.h, crop.w, crop.y0, crop.x0) == (height, width, top, left)
    assert np.array_equal(aug_input.image, IMAGE[top : top + height, left : left + width])
    assert aug_input.boxes.tolist() == [[-left, -top, 60 - left, 40 - top]]


@pytest.mark.parametrize(
    ("kind", "size", "expected"),
    [
        ("absolute", (16, 24), (16, 24)),
        ("absolute", (100, 24), (40, 24)),
        ("relative", (0.5, 0.33), (20, 20)),  # 60 * 0.33 = 19.8 is rounded
    ],
)
def test_crop_of_fixed_size(kind, size, expected):
    assert augment(T.RandomCrop(kind, size))[0].image.shape[:2] == expected


def test_relative_range_crop_stays_in_its_range():
    crop = T.RandomCrop("relative_range", (0.5, 0.75))
    shapes = [augment(crop, seed=seed)[0].image.shape[:2] for seed in range(20)]
    assert all(20 <= height <= 40 and 45 <= width <= 60 for height, width in shapes)
    assert len(set(shapes)) > 10


def test_large_scale_jitter():
    jitter = T.AugmentationList([T.ResizeScale(0.1, 2.0, 32, 48), T.FixedSizeCrop((32, 48))])
    for seed in range(5):
        aug_input, transforms = augment(jitter, boxes=[[0, 0, 60, 40]], seed=seed)
        assert aug_input.image.shape == (32, 48, 3)
        np.random.seed(seed)
        factor = min(32 / 40, 48 / 60) * np.random.uniform(0.1, 2.0)
        resize = transforms.transforms[0]
        assert (resize.new_h, resize.new_w) == (round(40 * factor), round(60 * factor))
    assert (augment(T.FixedSizeCrop((50, 70), pad_value=9.0))[0].image[40:] == 9).all()


def test_colours():
    grey = np.full((4, 4, 3), 100, np.uint8)
    # With weight 0.5: half of the value, and half of the value plus half of the mean.
    assert (augment(T.RandomBrightness(0.5, 0.5), grey)[0].image == 50).all()
    assert (augment(T.RandomContrast(0.5, 0.5), grey)[0].image == 100).all()
    red = np.zeros((1, 1, 3), np.uint8)
    red[..., 0] = 200  # grey value 0.299 * 200 = 59.8
    saturated = augment(T.RandomSaturation(0.5, 0.5), red)[0].image
    assert saturated[0, 0].tolist() == pytest.approx([130, 30, 30], abs=1)
    assert not np.array_equal(augment(T.RandomLighting(20.0), grey)[0].image, grey)


def test_random_apply():
    apply = T.RandomApply(T.HFlipTransform(60), prob=0.5)
    for seed in range(6):
        np.random.seed(seed)
        applied = np.random.uniform() < 0.5
        assert np.array_equal(augment(apply, seed=seed)[0].image[:, ::-1], IMAGE) == applied


def test_augmentations_receive_what_they_name():
    class CropToFirstBox(T.Augmentation):
        def get_transform(self, image, boxes):
            x0, y0, x1, y1 = (int(value) for value in boxes[0])
            assert image.shape[1] >= x1
            return T.CropTransform(x0, y0, x1 - x0, y1 - y0)

    class NeedsDepth(T.Augmentation):
        def get_transform(self, image, depth):
            raise AssertionError("never called")

    assert augment(CropToFirstBox(), boxes=[[5, 6, 25, 36]])[0].image.shape == (30, 20, 3)
    with pytest.raises(AttributeError, match="depth"):
        augment(NeedsDepth())


def test_lists_mix_augmentations_and_transforms():
    steps = [T.ResizeShortestEdge(20), T.HFlipTransform(30), T.RandomCrop("absolute", (10, 10))]
    aug_input, transforms = augment(T.AugmentationList(steps))
    assert aug_input.image.shape == (10, 10, 3)
    names = [type(transform).__name__ for transform in transforms.transforms]
    assert names == ["ResizeTransform", "HFlipTransform", "CropTransform"]
    again = transforms.apply_image(IMAGE.copy())
    assert np.array_equal(again, aug_input.image)
    image, _ = T.apply_augmentations([T.Resize((5, 6))], IMAGE)
    assert image.shape == (5, 6, 3)


def test_names_in_logs_show_what_was_chosen():
    assert repr(T.RandomFlip()) == "RandomFlip()"
    assert repr(T.RandomFlip(0.3)) == "RandomFlip(prob=0.3)"
    text = repr(T.ResizeShortestEdge((480, 800), 1333, "choice"))
    assert text.startswith("ResizeShortestEdge(short_edge_length=(480, 800), max_size=1333")

    class Custom(T.Augmentation):
        def __init__(self, strength, offset=0):
            super().__init__()
            self._init(locals())

    assert repr(T.AugmentationList([Custom(2.5)])) == "AugmentationList[Custom(strength=2.5)]"
