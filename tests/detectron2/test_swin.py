"""Swin Transformer: names, shapes, numbers and freezing that configs and checkpoints rely on."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from detectron2.layers import ShapeSpec
from detectron2.modeling import SwinTransformer
from detectron2.modeling.backbone import swin
from torch import Tensor, nn
from torch.nn import functional as F

# 32 channels at stride 8, 64 at 16, 128 at 32.
TINY: dict[str, Any] = dict(
    embed_dim=16, depths=(2, 2, 4, 2), num_heads=(1, 2, 4, 8), window_size=4, drop_path_rate=0.0
)


def model(seed: int = 0, **arguments: Any) -> SwinTransformer:
    """A tiny Swin in evaluation mode, whose norms, biases and tables are not at their start."""
    torch.manual_seed(seed)
    try:
        made = SwinTransformer(**{**TINY, **arguments})
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] != "timm":
            raise
        pytest.skip("drop path needs timm")
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if parameter.dim() == 1 or name.endswith("table"):
                parameter.add_(0.3 * torch.randn_like(parameter))
    return made.eval()


def same_weights(**arguments: Any) -> tuple[SwinTransformer, SwinTransformer]:
    """A model as in `TINY` and one with other arguments, with equal weights."""
    other = model(**arguments)
    plain = model(**{**arguments, "drop_path_rate": 0.0, "use_checkpoint": False})
    plain.load_state_dict(other.state_dict())
    return plain, other


def test_features() -> None:
    shapes = model(out_indices=(1, 3)).output_shape()
    assert shapes == {"p1": ShapeSpec(channels=32, stride=8), "p3": ShapeSpec(128, stride=32)}
    assert swin.SwinTransformer is SwinTransformer


@pytest.mark.parametrize(("height", "width"), [(64, 64), (61, 75), (33, 1)])
@torch.no_grad()
def test_sides_are_rounded_up(height: int, width: int) -> None:
    features = model()(torch.randn(2, 3, height, width))
    sizes = {name: tuple(feature.shape) for name, feature in features.items()}
    assert sizes == {
        f"p{stage}": (2, 16 * 2**stage, math.ceil(height / stride), math.ceil(width / stride))
        for stage, stride in enumerate((4, 8, 16, 32))
    }
    assert all(feature.is_contiguous() for feature in features.values())


def expected_keys() -> set[str]:
    """Those of the official classification models, and a norm for each output."""
    keys = {
        f"patch_embed.{part}.{kind}" for part in ("proj", "norm") for kind in ("weight", "bias")
    }
    layers = ("norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2")
    for stage, depth in enumerate(TINY["depths"]):
        for block in range(depth):
            prefix = f"layers.{stage}.blocks.{block}"
            keys |= {f"{prefix}.{layer}.{kind}" for layer in layers for kind in ("weight", "bias")}
            keys |= {f"{prefix}.attn.relative_position_{end}" for end in ("bias_table", "index")}
        keys |= {f"norm{stage}.weight", f"norm{stage}.bias"}
    for stage in range(3):
        names = ("norm.weight", "norm.bias", "reduction.weight")
        keys |= {f"layers.{stage}.downsample.{name}" for name in names}
    return keys


def test_keys() -> None:
    assert set(model().state_dict()) == expected_keys()
    with_position = model(ape=True, pretrain_img_size=64)
    assert set(with_position.state_dict()) == expected_keys() | {"absolute_pos_embed"}
    assert with_position.state_dict()["absolute_pos_embed"].shape == (1, 16, 16, 16)
    without = {"patch_embed.norm.weight", "patch_embed.norm.bias"}
    assert set(model(patch_norm=False).state_dict()) == expected_keys() - without
    biases = {key for key in expected_keys() if key.endswith("qkv.bias")}
    assert set(model(qkv_bias=False).state_dict()) == expected_keys() - biases


def cells(height: int, width: int) -> Tensor:
    """(y, x) of every cell, row by row."""
    return torch.tensor(list(itertools.product(range(height), range(width))))


def attention_by_definition(
    state: dict[str, Tensor], block: str, maps: Tensor, heads: int, window: int, shift: int
) -> Tensor:
    """Every cell of (B, H, W, C) attends to the cells of its window, found by comparing cells."""
    height, width, channels = maps.shape[1:]
    padded = F.pad(maps, (0, 0, 0, -width % window, 0, -height % window))
    size = torch.tensor(padded.shape[1:3])
    place = cells(int(size[0]), int(size[1]))
    # Windows start at `shift`; the cells before it go round to the other side, where they share a
    # window with cells that are no neighbours of theirs and must not see them.
    moved = (place - shift) % size
    home = torch.cat([moved // window, place < shift], 1)
    visible = (home[:, None] == home).all(-1)
    offset = (moved[:, None] - moved).clamp(1 - window, window - 1) + window - 1
    table = state[f"{block}.attn.relative_position_bias_table"]
    bias = table[offset[..., 0] * (2 * window - 1) + offset[..., 1]].permute(2, 0, 1)
    projected = linear(state, f"{block}.attn.qkv", padded.flatten(1, 2))
    q, k, v = projected.unflatten(2, (3, heads, -1)).permute(2, 0, 3, 1, 4)
    logits = q @ k.transpose(2, 3) / math.sqrt(channels // heads) + bias
    attended = logits.masked_fill(~visible, -math.inf).softmax(-1) @ v
    output = linear(state, f"{block}.attn.proj", attended.transpose(1, 2).flatten(2))
    return output.unflatten(1, tuple(size.tolist()))[:, :height, :width]


def merging_by_definition(state: dict[str, Tensor], name: str, maps: Tensor) -> Tensor:
    """Cells (0, 0), (1, 0), (0, 1), (1, 1) of each 2 x 2, in (row, column)."""
    padded = F.pad(maps, (0, 0, 0, maps.shape[2] % 2, 0, maps.shape[1] % 2))
    rows = []
    for y in range(0, padded.shape[1], 2):
        row = [
            padded[:, y : y + 2, x : x + 2].transpose(1, 2) for x in range(0, padded.shape[2], 2)
        ]
        rows.append(torch.stack([patch.flatten(1) for patch in row], 1))
    merged = torch.stack(rows, 1)
    return norm(state, f"{name}.norm", merged) @ state[f"{name}.reduction.weight"].T


def norm(state: dict[str, Tensor], name: str, maps: Tensor) -> Tensor:
    weight, bias = state[f"{name}.weight"], state[f"{name}.bias"]
    return F.layer_norm(maps, maps.shape[-1:], weight, bias, eps=1e-5)


def linear(state: dict[str, Tensor], name: str, maps: Tensor) -> Tensor:
    return maps @ state[f"{name}.weight"].T + state[f"{name}.bias"]


def swin_by_definition(
    state: dict[str, Tensor], images: Tensor, depths: list[int], heads: list[int], window: int
) -> dict[str, Tensor]:
    height, width = images.shape[2:]
    images = F.pad(images, (0, -width % 4, 0, -height % 4))
    weight, bias = state["patch_embed.proj.weight"], state["patch_embed.proj.bias"]
    maps = F.conv2d(images, weight, bias, stride=4).permute(0, 2, 3, 1)
    maps = norm(state, "patch_embed.norm", maps)
    if "absolute_pos_embed" in state:
        position = state["absolute_pos_embed"]
        stretched = F.interpolate(position, maps.shape[1:3], mode="bicubic", align_corners=False)
        maps = maps + stretched.permute(0, 2, 3, 1)
    outputs = {}
    for stage, depth in enumerate(depths):
        if stage:
            maps = merging_by_definition(state, f"layers.{stage - 1}.downsample", maps)
        for index in range(depth):
            block, shift = f"layers.{stage}.blocks.{index}", window // 2 * (index % 2)
            normed = norm(state, f"{block}.norm1", maps)
            maps = maps + attention_by_definition(state, block, normed, heads[stage], window, shift)
            hidden = linear(state, f"{block}.mlp.fc1", norm(state, f"{block}.norm2", maps))
            maps = maps + linear(state, f"{block}.mlp.fc2", F.gelu(hidden))
        outputs[f"p{stage}"] = norm(state, f"norm{stage}", maps).permute(0, 3, 1, 2)
    return outputs


@pytest.mark.parametrize(
    "options",
    [dict(window_size=3), dict(window_size=4), dict(ape=True, pretrain_img_size=(16, 24))],
)
@torch.no_grad()
def test_numbers(options: dict[str, Any]) -> None:
    """Maps of 7 x 9, 4 x 5 and 2 x 3 cells: none is a multiple of the window, two are odd."""
    sizes: dict[str, Any] = dict(depths=[2, 3, 2], num_heads=[2, 4, 8], out_indices=(0, 1, 2))
    network = model(**{**sizes, "window_size": 4, **options}).double()
    images = torch.randn(2, 3, 26, 35, dtype=torch.float64)
    found = network(images)
    window = options.get("window_size", 4)
    expected = swin_by_definition(network.state_dict(), images, [2, 3, 2], [2, 4, 8], window)
    assert found.keys() == expected.keys()
    for name, feature in found.items():
        torch.testing.assert_close(feature, expected[name], rtol=1e-9, atol=1e-9)


def test_index_into_the_table() -> None:
    index = model(window_size=3).state_dict()["layers.0.blocks.0.attn.relative_position_index"]
    assert index.shape == (9, 9)
    assert index.dtype == torch.int64
    # Cell (0, 0) to itself is the middle of 5 x 5; (2, 1) from (0, 2) is two rows down, one left.
    assert index[0, 0] == 2 * 5 + 2
    assert index[7, 2] == (2 + 2) * 5 + (-1 + 2)


@torch.no_grad()
def test_outputs_have_norms_of_their_own() -> None:
    some = model(out_indices=(2,))
    every = model()
    every.load_state_dict(some.state_dict(), strict=False)
    images = torch.randn(1, 3, 64, 64)
    assert list(some(images)) == ["p2"]
    torch.testing.assert_close(some(images)["p2"], every(images)["p2"])
    # The norm of an output does not change what later stages see.
    before = every(images)["p3"]
    nn.init.zeros_(every.get_parameter("norm2.weight"))
    nn.init.zeros_(every.get_parameter("norm2.bias"))
    assert every(images)["p2"].eq(0).all()
    assert torch.equal(every(images)["p3"], before)


def trained(network: nn.Module) -> set[str]:
    return {name for name, parameter in network.named_parameters() if parameter.requires_grad}


@pytest.mark.parametrize(
    ("frozen_stages", "prefixes"),
    [
        (-1, ()),
        (0, ("patch_embed.",)),
        (1, ("patch_embed.", "absolute_pos_embed")),
        (3, ("patch_embed.", "absolute_pos_embed", "layers.0.", "layers.1.")),
    ],
)
def test_freezing(frozen_stages: int, prefixes: tuple[str, ...]) -> None:
    options: dict[str, Any] = dict(ape=True, pretrain_img_size=64, drop_path_rate=0.0)
    network = SwinTransformer(**{**TINY, **options}, frozen_stages=frozen_stages)
    names = {name for name, _ in network.named_parameters()}
    assert trained(network) == {name for name in names if not name.startswith(prefixes or "none")}
    in_evaluation = {name for name, part in network.named_modules() if not part.training}
    folders = tuple(prefix.rstrip(".") for prefix in prefixes if prefix.endswith("."))
    dropout = {"pos_drop"} if frozen_stages > 1 else set()
    assert in_evaluation - dropout == {
        name for name, _ in network.named_modules() if name.startswith(folders or "none")
    }


@torch.no_grad()
def test_drop_path_is_off_in_evaluation() -> None:
    plain, other = same_weights(drop_path_rate=0.9)
    images = torch.randn(2, 3, 32, 32)
    for name, feature in plain(images).items():
        assert torch.equal(feature, other(images)[name])


def scaled(network: SwinTransformer, attention: float, feedforward: float) -> SwinTransformer:
    """A copy whose last block has its two branches multiplied."""
    state = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    for kind in ("weight", "bias"):
        state[f"layers.1.blocks.0.attn.proj.{kind}"] *= attention
        state[f"layers.1.blocks.0.mlp.fc2.{kind}"] *= feedforward
    copy = model(depths=(1, 1), num_heads=(1, 2), out_indices=(1,))
    copy.load_state_dict(state)
    return copy


@torch.no_grad()
def test_drop_path_in_training() -> None:
    """At a rate of 0.75 a branch of an image is dropped, or else taken 4 times.

    The rate rises from 0 in the first block to the given one in the last.
    """
    network = model(depths=(1, 1), num_heads=(1, 2), out_indices=(1,), drop_path_rate=0.75)
    images = torch.randn(64, 3, 8, 8)
    found = network.train()(images)["p1"]
    factors = list(itertools.product((0, 4), (0, 4)))
    choices = [scaled(network, *pair)(images)["p1"] for pair in factors]
    errors = torch.stack([(choice - found).abs().amax((1, 2, 3)) for choice in choices])
    assert errors.amin(0).max() < 1e-4, "every image is one of the four"
    # Of 128 branches, 32 are expected, and 5 standard deviations are 25.
    kept = torch.tensor(factors).ne(0)[errors.argmin(0)].sum(0)
    assert 7 < kept.sum() < 57
    assert kept.min() > 0, "both branches are drawn for"


def gradients(network: SwinTransformer, images: Tensor) -> dict[str, Tensor]:
    torch.manual_seed(1)
    features = network.train()(images)
    torch.stack([feature.square().sum() for feature in features.values()]).sum().backward()
    return {name: p.grad for name, p in network.named_parameters() if p.grad is not None}


# The one in Detectron2 leaves the choice of PyTorch's two ways to PyTorch, which warns.
@pytest.mark.filterwarnings("ignore:.*use_reentrant")
def test_recomputation_changes_no_gradient() -> None:
    plain, other = same_weights(use_checkpoint=True, drop_rate=0.1)
    images = torch.randn(2, 3, 40, 48)
    expected, found = gradients(plain, images), gradients(other, images)
    assert expected.keys() == found.keys() == {name for name, _ in plain.named_parameters()}
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient)


@torch.no_grad()
def test_absolute_positions_are_stretched() -> None:
    """A constant stays constant, so it can as well be in the bias of the norm before."""
    network = model(ape=True, pretrain_img_size=64)
    constant = torch.linspace(-1, 1, 16)
    network.absolute_pos_embed.copy_(constant[None, :, None, None].expand(1, 16, 16, 16))
    plain = model()
    state = network.state_dict()
    del state["absolute_pos_embed"]
    state["patch_embed.norm.bias"] = state["patch_embed.norm.bias"] + constant
    plain.load_state_dict(state)
    for size in ((64, 64), (30, 90)):
        images = torch.randn(1, 3, *size)
        torch.testing.assert_close(network(images)["p3"], plain(images)["p3"], rtol=0, atol=1e-4)


def test_initial_weights() -> None:
    torch.manual_seed(5)
    network = SwinTransformer(drop_path_rate=0.0, out_indices=(3,), depths=(1, 1, 1, 1))
    for name, parameter in network.named_parameters():
        if name == "patch_embed.proj.weight":
            # PyTorch's own: uniform up to 1 / sqrt(3 * 4 * 4).
            assert 0.95 / math.sqrt(48) < parameter.abs().max() <= 1 / math.sqrt(48)
        elif parameter.dim() == 2:
            assert parameter.std().item() == pytest.approx(0.02, rel=0.1)
            assert abs(parameter.mean().item()) < 0.003
        elif name != "patch_embed.proj.bias":
            assert parameter.eq(1.0 if "norm" in name and "weight" in name else 0.0).all(), name


def test_images_need_no_padding() -> None:
    """In Detectron2 the attribute raises AttributeError, so callers ask for it with a default."""
    network = model()
    assert getattr(network, "size_divisibility", 0) == 0
    assert network.padding_constraints == {}
