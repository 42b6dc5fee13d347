"""Boxes, instances and image lists, as the project relies on them."""

import copy
import pickle

import numpy as np
import pytest
import torch
from detectron2.structures import (
    Boxes,
    BoxMode,
    ImageList,
    Instances,
    pairwise_ioa,
    pairwise_iou,
)


def boxes(*rows):
    return Boxes(torch.tensor(rows, dtype=torch.float32).reshape(-1, 4))


@pytest.mark.parametrize("container", [list, tuple])
def test_box_mode_converts_sequences_and_keeps_their_type(container):
    xywh = container([10.0, 20.0, 5.0, 6.0])
    xyxy = BoxMode.convert(xywh, BoxMode.XYWH_ABS, BoxMode.XYXY_ABS)
    assert xyxy == container([10.0, 20.0, 15.0, 26.0])
    assert BoxMode.convert(xyxy, BoxMode.XYXY_ABS, BoxMode.XYWH_ABS) == xywh
    assert BoxMode.convert(xywh, BoxMode.XYWH_ABS, BoxMode.XYWH_ABS) is xywh


@pytest.mark.parametrize("make", [np.array, torch.tensor])
def test_box_mode_never_modifies_its_input(make):
    rows = [[10.0, 20.0, 5.0, 6.0], [0.0, 0.0, 1.0, 1.0]]
    source = make(rows)
    converted = BoxMode.convert(source, BoxMode.XYWH_ABS, BoxMode.XYXY_ABS)
    assert source.tolist() == rows
    assert type(converted) is type(source)
    assert converted.dtype == source.dtype
    assert converted.tolist() == [[10, 20, 15, 26], [0, 0, 1, 1]]


def test_box_mode_refuses_relative_boxes():
    with pytest.raises(AssertionError):
        BoxMode.convert([0.1, 0.1, 0.2, 0.2], BoxMode.XYXY_REL, BoxMode.XYXY_ABS)


def test_boxes_accept_lists_arrays_and_nothing():
    assert Boxes([[0, 0, 1, 2]]).tensor.dtype == torch.float32
    assert Boxes(np.ones((3, 4))).tensor.shape == (3, 4)
    assert Boxes(torch.zeros(0)).tensor.shape == (0, 4)
    with pytest.raises(AssertionError):
        Boxes(torch.zeros(2, 5))


def test_boxes_geometry():
    found = boxes([-2, 1, 8, 5], [3, 3, 3, 9])
    assert found.area().tolist() == [40, 0]
    assert found.get_centers().tolist() == [[3, 3], [3, 6]]
    assert found.nonempty().tolist() == [True, False]
    assert found.nonempty(threshold=4).tolist() == [False, False]  # the first is 4 high
    # A box is inside an image (height 9, width 8) if x1 < 8 and y1 < 9 and nothing is negative.
    assert found.inside_box((10, 8)).tolist() == [False, True]
    assert found.inside_box((10, 7), boundary_threshold=2).tolist() == [True, True]
    found.scale(2.0, 0.5)
    assert found.tensor.tolist() == [[-4, 0.5, 16, 2.5], [6, 1.5, 6, 4.5]]


def test_clip_takes_height_and_width_and_replaces_the_tensor():
    tensor = torch.tensor([[-5.0, -5.0, 50.0, 50.0]])
    clipped = Boxes(tensor)
    clipped.clip((10, 20))
    assert clipped.tensor.tolist() == [[0, 0, 20, 10]]
    assert tensor.tolist() == [[-5, -5, 50, 50]]
    with pytest.raises(AssertionError):
        boxes([0, 0, float("nan"), 1]).clip((10, 10))


def test_boxes_select_like_tensors():
    found = boxes([0, 0, 1, 1], [0, 0, 2, 2], [0, 0, 3, 3])
    assert found[1].tensor.tolist() == [[0, 0, 2, 2]]
    assert len(found[:2]) == 2
    assert found[torch.tensor([True, False, True])].tensor[:, 2].tolist() == [1, 3]
    assert found[torch.tensor([2, 0])].tensor[:, 2].tolist() == [3, 1]
    assert [row.shape for row in found] == [(4,)] * 3
    assert len(Boxes.cat([found, found[:1]])) == 4
    assert len(Boxes.cat([])) == 0
    assert found.clone().tensor is not found.tensor
    assert found.to("cpu").device == torch.device("cpu")


def test_pairwise_overlap():
    # Intersection 2 x 2 = 4 of areas 16 and 12: IoU 4 / (16 + 12 - 4) = 1/6, IoA 4 / 12 = 1/3.
    first = boxes([0, 0, 4, 4], [20, 20, 21, 21])
    second = boxes([2, 2, 4, 8])
    assert pairwise_iou(first, second)[:, 0].tolist() == pytest.approx([1 / 6, 0])
    assert pairwise_ioa(first, second)[:, 0].tolist() == pytest.approx([1 / 3, 0])
    empty = boxes([1, 1, 1, 1])
    assert pairwise_iou(empty, empty).tolist() == [[0]]  # 0 / 0 is defined as no overlap
    assert pairwise_iou(first, boxes()).shape == (2, 0)


def test_instances_hold_fields_of_one_length():
    found = Instances((4, 6), scores=torch.tensor([0.1, 0.9]))
    found.pred_boxes = boxes([0, 0, 1, 1], [0, 0, 2, 2])
    found.names = ["a", "b"]
    assert len(found) == 2
    assert found.image_size == (4, 6)
    assert found.has("names")
    assert not found.has("masks")
    assert set(found.get_fields()) == {"scores", "pred_boxes", "names"}
    with pytest.raises(AssertionError):
        found.extra = [1, 2, 3]
    with pytest.raises(AttributeError):
        _ = found.masks
    found.remove("names")
    with pytest.raises(KeyError):
        found.get("names")


def test_instances_select_and_join():
    found = Instances((4, 6), scores=torch.arange(4.0), names=list("abcd"))
    found.pred_boxes = boxes(*([0, 0, k, k] for k in range(4)))
    assert found[2].scores.tolist() == [2]
    assert found[-1].names == ["d"]
    assert found[1:3].names == ["b", "c"]
    kept = found.to("cpu")
    kept.remove("names")
    assert kept[torch.tensor([True, False, False, True])].pred_boxes.tensor[:, 2].tolist() == [0, 3]
    with pytest.raises(IndexError):
        _ = found[4]
    joined = Instances.cat([found[:1], found[3:]])
    assert joined.names == ["a", "d"]
    assert joined.scores.tolist() == [0, 3]
    assert len(joined.pred_boxes) == 2
    with pytest.raises(AssertionError):
        Instances.cat([found, Instances((9, 9), scores=torch.zeros(1))])


def test_instances_without_fields_and_iteration():
    with pytest.raises(NotImplementedError):
        len(Instances((1, 1)))
    with pytest.raises(NotImplementedError):
        iter(Instances((1, 1), scores=[1]))


def test_structures_can_be_copied_and_pickled():
    found = Instances((4, 6), pred_boxes=boxes([0, 0, 1, 1]))
    for other in (copy.deepcopy(found), pickle.loads(pickle.dumps(found))):
        assert other.image_size == (4, 6)
        assert other.pred_boxes.tensor.tolist() == [[0, 0, 1, 1]]


def test_image_list_pads_bottom_and_right():
    small, large = torch.ones(3, 2, 5), torch.ones(3, 4, 3)
    images = ImageList.from_tensors([small, large], pad_value=7.0)
    assert images.tensor.shape == (2, 3, 4, 5)
    assert [tuple(size) for size in images.image_sizes] == [(2, 5), (4, 3)]
    assert images.tensor[0, :, 2:].unique().tolist() == [7]
    assert torch.equal(images[0], small)
    assert torch.equal(images[1], large)
    assert len(images) == 2
    assert images.to(torch.float64).tensor.dtype == torch.float64


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({}, (5, 7)),
        ({"size_divisibility": 4}, (8, 8)),
        ({"size_divisibility": 1}, (5, 7)),
        ({"padding_constraints": {"square_size": 9}}, (9, 9)),
        ({"size_divisibility": 2, "padding_constraints": {"size_divisibility": 10}}, (10, 10)),
        ({"padding_constraints": {"square_size": 9, "size_divisibility": 4}}, (12, 12)),
    ],
)
@pytest.mark.parametrize("count", [1, 2])
def test_image_list_size(arguments, expected, count):
    images = ImageList.from_tensors([torch.zeros(1, 5, 7)] * count, **arguments)
    assert images.tensor.shape[-2:] == expected


def test_image_list_does_not_freeze_sizes_while_tracing():
    def pad(first, second):
        images = ImageList.from_tensors([first, second], 4)
        return images.tensor, *images.image_sizes

    with pytest.warns():  # tracing is deprecated, but FLOP counting needs it
        traced = torch.jit.trace(pad, (torch.ones(1, 5, 6), torch.ones(1, 3, 9)))
    batch, first, second = traced(torch.ones(1, 13, 2), torch.ones(1, 4, 4))
    assert batch.shape == (2, 1, 16, 4)
    assert batch.sum() == 26 + 16
    assert first.tolist() == [13, 2]
    assert second.tolist() == [4, 4]
