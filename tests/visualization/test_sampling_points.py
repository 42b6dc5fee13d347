"""Pictures of sampling points: in register with the image, and with the weights of the query."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from detectron2.config import LazyCall as L
from detectron2.config import LazyConfig, instantiate
from detectron2.structures import ImageList
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from omegaconf import OmegaConf
from PIL import Image as PillowImage
from torch import Tensor, nn

from efficient_detr.errors import UserError
from efficient_detr.modeling.backbones.dat_variants import (
    StageSpecification,
    dat,
    dat_backbone,
    dat_plus_plus,
)
from efficient_detr.modeling.backbones.deformed_keys import OffsetLimit, sample_map
from efficient_detr.visualization.sampling_points import (
    sampling_points_figure,
    save_sampling_points,
)
from efficient_detr.visualization.sampling_recorder import (
    SamplingRecorder,
    check_deformable_block,
    deformable_blocks_of_config,
    pixels_of_points,
)

STAGES = (
    StageSpecification("L", 8, 2),
    StageSpecification("LD", 8, 2, num_groups=2),
    StageSpecification("DL", 16, 4, num_groups=2, key_stride=2),
    StageSpecification("D", 16, 4),
)


class PaddingModel(nn.Module):
    """Takes Detectron2's dicts and pads, to multiples of 32 as detectors do."""

    def __init__(self, input_format: str = "RGB", divisibility: int = 32, **options: Any) -> None:
        super().__init__()
        self.divisibility = divisibility
        self.input_format = input_format
        self.bottom_up = instantiate(dat(STAGES, image_size=64, **options)).eval()

    def forward(self, batched_inputs: list[dict[str, Tensor]]) -> Any:
        images = [inputs["image"] / 64 - 2 for inputs in batched_inputs]
        return self.bottom_up(ImageList.from_tensors(images, self.divisibility).tensor)


class FixedPoints(OffsetLimit):
    """Moves every key to one place."""

    def __init__(self, x: float, y: float) -> None:
        self.point = torch.tensor([x, y])

    def __call__(self, offsets: Tensor, references: Tensor, intervals: Tensor) -> Tensor:
        return self.point.expand_as(offsets)


def record(model: nn.Module, image: Tensor, *place: int, **options: Any) -> SamplingRecorder:
    with torch.no_grad(), SamplingRecorder(model, *place, **options) as recorder:
        model([{"image": image}])
    return recorder


def noise(height: int = 80, width: int = 100) -> Tensor:
    return torch.randint(256, (3, height, width), dtype=torch.uint8)


# Places ------------------------------------------------------------------------------------------


def test_pixels_of_points() -> None:
    """Cells of 16 x 16 pixels; the middle of the first one is at (8, 8)."""
    points = torch.tensor([[-1.0, -1.0], [0.0, 0.0], [1.0, 1.0]])
    pixels = pixels_of_points(points, (4, 6), 16)
    np.testing.assert_allclose(pixels, [[8, 8], [48, 32], [88, 56]])


@pytest.mark.parametrize(("width", "height"), [(96, 64), (110, 70)])
def test_pixels_are_where_the_map_is_sampled(width: int, height: int) -> None:
    """A map whose cells hold the mean place of their pixels: sampling it gives the place.

    Of 110 x 70 pixels, the last 14 columns and 6 rows are in no cell.
    """
    x, y = torch.meshgrid(torch.arange(width) + 0.5, torch.arange(height) + 0.5, indexing="xy")
    places = nn.functional.avg_pool2d(torch.stack([x, y])[None], 16).permute(0, 2, 3, 1)
    points = 2 * torch.rand(1, 1, 50, 2) - 1
    expected = sample_map(places, points)[0]
    pixels = pixels_of_points(points[0, 0], (4, 6), 16)
    np.testing.assert_allclose(pixels, expected.numpy(), rtol=1e-5)


@pytest.mark.parametrize(
    ("backbone", "length", "cells"),
    # 58 pixels are 14 cells of 4, 7 of 8 and 3 of 16 if rounded down, and 15, 8 and 4 if up.
    [(dat, 40, 2), (dat, 58, 3), (dat_plus_plus, 40, 3), (dat_plus_plus, 58, 4)],
)
def test_cells_keep_their_size_without_padding(backbone: Any, length: int, cells: int) -> None:
    """The corners of the map are the middles of its first and last cell of 16 pixels."""
    stages = (*STAGES[:2], StageSpecification("D", 16, 4, num_groups=2), STAGES[3])
    model = PaddingModel(divisibility=1)
    model.bottom_up = instantiate(backbone(stages, image_size=64)).eval()
    keys = model.bottom_up.stages[2].blocks[0].attention.keys
    keys.limit = FixedPoints(1.0, -1.0)
    example = record(model, noise(length, length), 2, 0).example([(0.0, 0.0), (1.0, 1.0)])
    last = 16 * cells - 8
    assert example.map_shape == (cells, cells)
    np.testing.assert_allclose(example.points[..., 0], last)
    np.testing.assert_allclose(example.points[..., 1], 8)
    assert [one.position.tolist() for one in example.attended] == [[8, 8], [last, last]]
    (middle,) = record(model, noise(length, length), 2, 0).example([(25 / length, 0.5)]).attended
    assert middle.position[0] == 24  # pixel 25 is in the second cell, 16 to 31


def test_a_point_is_drawn_on_its_pixel() -> None:
    """The image is 100 x 80 pixels in a canvas of 128 x 96, a map of 8 x 6 cells of 16 pixels.

    The point -1 + 2 * 2 / 7 is the middle of column 2, pixels 32 to 47: 40. The point 0 is half way
    between rows 2 and 3: 48. There the image has its only white square.
    """
    model = PaddingModel()
    model.bottom_up.stages[2].blocks[0].attention.keys.limit = FixedPoints(-1 + 4 / 7, 0.0)
    image = torch.zeros(3, 80, 100, dtype=torch.uint8)
    image[:, 46:50, 38:42] = 255
    example = record(model, image, 2, 0, group=0).example([(0.0, 0.0)])
    figure = sampling_points_figure([example])
    picture, axis = drawn(figure), figure.axes[0]
    shown = np.asarray(axis.get_images()[0].get_array()).mean(-1)
    white = np.argwhere(shown > 200).mean(0)[::-1] + 0.5
    dots = axis.collections[1]
    points = np.asarray(dots.get_offsets())
    np.testing.assert_allclose(points, np.tile(white, (12, 1)), atol=1.0)
    colour = np.asarray(dots.get_facecolor())[0, :3]
    np.testing.assert_allclose(picture_at(picture, axis, white), colour, atol=0.02)


def drawn(figure: Figure) -> np.ndarray:
    """(height, width, 3) of the rendered figure, 0 to 1."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3] / 255


def picture_at(picture: np.ndarray, axis: Any, point: Any) -> np.ndarray:
    x, y = axis.transData.transform(point)
    pixel: np.ndarray = picture[len(picture) - 1 - int(y), int(x)]
    return pixel


def test_nothing_is_drawn_in_the_padding() -> None:
    """The image is 70 x 100 pixels, the canvas 96 x 128; the point is at (80, 56)."""
    model = PaddingModel()
    model.bottom_up.stages[2].blocks[0].attention.keys.limit = FixedPoints(-1 + 9 / 5, -1 + 6 / 7)
    example = record(model, torch.zeros(3, 100, 70, dtype=torch.uint8), 2, 0).example([(0, 0)])
    np.testing.assert_allclose(example.points, np.tile([80.0, 56.0], (2, 12, 1)), rtol=1e-5)
    assert example.image.shape == (100, 70, 3)
    figure = sampling_points_figure([example])
    axis = figure.axes[1]
    (point,) = np.unique(np.asarray(axis.collections[0].get_offsets()).round(2), axis=0)
    np.testing.assert_allclose(picture_at(drawn(figure), axis, point), 1.0)
    axis.collections[0].set_clip_on(False)
    assert picture_at(drawn(figure), axis, point).min() < 0.5


def test_references_are_the_undeformed_points() -> None:
    """Without offsets, the grid of 2022 has its keys at (i + 1/2) (W - 1) / W_k cells."""
    model = PaddingModel()
    attention = model.bottom_up.stages[2].blocks[0].attention
    nn.init.zeros_(attention.keys.offset_network.output.weight)
    example = record(model, noise(), 2, 0).example([(0.5, 0.5)])
    assert example.map_shape == (3, 4)
    expected = 16 * ((np.arange(4) + 0.5) * 7 / 4 + 0.5)
    np.testing.assert_allclose(example.references[:4, 0], expected, rtol=1e-6)
    for points in example.points:
        np.testing.assert_allclose(points, example.references, rtol=1e-5)


def test_the_grid_of_dat_plus_plus_is_finite_for_one_key() -> None:
    stages = [StageSpecification("D", 8, 2, key_stride=stride) for stride in (8, 4, 2, 1)]
    model = PaddingModel()
    model.bottom_up = instantiate(dat_plus_plus(stages, image_size=64)).eval()
    example = record(model, noise(32, 32), 3, 0).example([(1.0, 1.0)])
    np.testing.assert_allclose(example.references, [[16, 16]])  # the middle of the only cell
    assert np.isfinite(example.points).all()


# Queries -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("query", "cell"),
    # Of 7 x 5 cells of 16 pixels that the image covers, the last ones in part.
    [((0, 0), (0, 0)), ((0.33, 0.5), (2, 2)), ((1, 1), (6, 4)), ((0.97, 0.99), (6, 4))],
)
def test_queries_are_cells_of_the_image(query: Any, cell: Any) -> None:
    model = PaddingModel()
    attention = model.bottom_up.stages[2].blocks[0].attention
    given = []
    attention.register_forward_pre_hook(lambda module, args: given.append(args[0]))
    recorder = record(model, noise(), 2, 0)
    (attended,) = recorder.example([query]).attended
    np.testing.assert_allclose(attended.position, 16 * (np.array(cell) + 0.5))
    index = torch.tensor([cell[1] * 8 + cell[0]])
    weights = attention.attention_weights(given[0], index)[0][0, :, 0]  # (H, M)
    expected = torch.stack([weights[:2].mean(0), weights[2:].mean(0)])
    np.testing.assert_allclose(attended.weights, expected.numpy(force=True), rtol=1e-6)
    assert attended.weights.sum(1) == pytest.approx([1, 1])


def test_one_head_and_one_group() -> None:
    model = PaddingModel()
    image = noise()
    everything = record(model, image, 2, 0).example([(0.5, 0.5)])
    of_group = record(model, image, 2, 0, group=1).example([(0.5, 0.5)])
    np.testing.assert_array_equal(of_group.points, everything.points[1:])
    np.testing.assert_array_equal(of_group.attended[0].weights, everything.attended[0].weights[1:])
    heads = [record(model, image, 2, 0, head=head).example([(0.5, 0.5)]) for head in (2, 3)]
    for head, example in zip((2, 3), heads, strict=True):
        assert example.groups == (1,) and example.weights_of == f"head {head}"
        np.testing.assert_array_equal(example.points, of_group.points)
    mean = np.mean([example.attended[0].weights for example in heads], axis=0)
    np.testing.assert_allclose(mean, of_group.attended[0].weights, rtol=1e-6)


def test_the_image_is_what_the_model_saw() -> None:
    image = noise(50, 70)
    for input_format, channels in (("RGB", [0, 1, 2]), ("BGR", [2, 1, 0])):
        recorder = record(PaddingModel(input_format), image, 3)
        shown = recorder.example([(0.5, 0.5)]).image
        np.testing.assert_array_equal(shown, image[channels].permute(1, 2, 0).numpy())


def test_hooks_are_removed_and_batches_refused() -> None:
    model = PaddingModel()
    recorder = record(model, noise(), 3)
    assert not any(module._forward_pre_hooks for module in model.modules())
    with recorder:
        model([{"image": noise()}, {"image": noise()}])
    with pytest.raises(UserError, match="one image at a time"):
        recorder.example([(0.5, 0.5)])


# Checks ------------------------------------------------------------------------------------------


def test_what_cannot_be_drawn() -> None:
    model = PaddingModel()
    where = "blocks 1 of stage 1; 0 of stage 2; 0 of stage 3 have it"
    for stage, block in ((0, -1), (1, 0), (2, 1), (2, 2), (2, -3), (4, 0), (-1, 0)):
        with pytest.raises(UserError, match=where):
            SamplingRecorder(model, stage, block)
    with pytest.raises(UserError, match="no head 4: heads are 0 to 3"):
        SamplingRecorder(model, 2, 0, head=4)
    with pytest.raises(UserError, match="no group 2: groups are 0 to 1"):
        SamplingRecorder(model, 2, 0, group=2)
    with pytest.raises(UserError, match="Head 3 belongs to group 1, not to group 0"):
        SamplingRecorder(model, 2, 0, head=3, group=0)
    with pytest.raises(UserError, match="has no DAT"):
        SamplingRecorder(nn.Conv2d(3, 3, 3), 2)
    with pytest.raises(UserError, match="query 0.5 1.2 lies outside"):
        record(model, noise(), 3).example([(0.5, 1.2)])


def test_blocks_are_known_before_the_model_is_built() -> None:
    blocks = deformable_blocks_of_config(dat_backbone("dat_tiny"))
    assert blocks is not None
    assert blocks == [[False, False], [False, False], [False, True] * 3, [False, True]]
    assert check_deformable_block(blocks, 2, -1) == 5
    with pytest.raises(UserError) as error:
        check_deformable_block(blocks, 2, 0)
    assert str(error.value) == (
        "Block 0 of stage 2 has no deformed sampling points: blocks 1, 3, 5 of stage 2; 1 of "
        "stage 3 have it."
    )
    nested = L(PaddingModel)(input_format="???", bottom_up=dat_backbone("dat_plus_plus_tiny"))
    found = deformable_blocks_of_config(nested)
    assert found is not None and found[3] == [True, True]
    assert deformable_blocks_of_config(L(nn.Linear)(in_features=1, out_features=1)) is None


def test_a_saved_config_tells_the_same(tmp_path: Path) -> None:
    path = str(tmp_path / "config.yaml")
    LazyConfig.save(
        OmegaConf.create({"model": dat(STAGES, image_size=64)}, flags={"allow_objects": True}), path
    )
    blocks = deformable_blocks_of_config(LazyConfig.load(path).model)
    assert blocks == [[False], [False, True], [True, False], [True]]


# Files -------------------------------------------------------------------------------------------


def test_figure_and_file(tmp_path: Path) -> None:
    example = record(PaddingModel(), noise(), 2, 0).example([(0.2, 0.2), (0.8, 0.8)])
    figure = sampling_points_figure([example, example])
    texts = [text.get_text() for axis in figure.axes for text in (axis.title, *axis.texts)]
    assert texts.count("stage 2, block 0") == 2
    assert texts.count("attention of a query") == 4
    assert texts.count("3 x 4 keys; white: reference grid; a colour for each of 2 groups") == 2
    path = save_sampling_points([example], tmp_path / "new" / "points.png")
    assert PillowImage.open(path).size[0] > 1000
    assert [file.name for file in path.parent.iterdir()] == ["points.png"]
