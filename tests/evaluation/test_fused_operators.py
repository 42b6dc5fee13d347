"""A fused operator counts what its written-out form counts: multiply-adds and activations.

Every form of one computation is a line of the table `FORMS`, and every expected number is derived
by hand, with 1 for a multiply-add.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from efficient_detr.evaluation import FlopCount, count_flops
from efficient_detr.evaluation.activation_handlers import ACTIVATION_HANDLERS
from efficient_detr.evaluation.flop_handlers import registered_handlers
from efficient_detr.modeling.backbones.neighborhood_attention import NeighborhoodAttention
from efficient_detr.ops import (
    cluster_broadcast,
    cluster_mean,
    cluster_tokens,
    draw_projections,
    fused_multi_scale_deformable_attention,
    library,
    multi_scale_deformable_attention,
)
from efficient_detr.ops.deformable_attention_pytorch import (
    sample_by_embedding_bag,
    sample_by_grid_sample,
)
from efficient_detr.structures import SpatialShapes
from tests.tiny_models import tiny_model

B, LENGTH, C, H, HIDDEN = 2, 5, 8, 2, 24
HEIGHT, WIDTH, NEIGHBOURS = 4, 5, 9

no_kernels = library.missing_reason(torch.device("cpu"))
needs_kernels = pytest.mark.skipif(
    bool(no_kernels), reason=f"needs the compiled kernels, but {no_kernels}"
)


class OnImage(nn.Module):
    """Runs a module on the image of the first input, whatever its shape."""

    def __init__(self, part: nn.Module) -> None:
        super().__init__()
        self.part = part

    def forward(self, batched_inputs: list[dict[str, Any]]) -> Tensor:
        return self.part(batched_inputs[0]["image"])


class Call(nn.Module):
    """A function as a module."""

    def __init__(self, function: Callable[..., Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, image: Tensor) -> Tensor:
        return self.function(image)


# Dense attention of (B, LENGTH, C) tokens ---------------------------------------------------------


class TorchAttention(nn.Module):
    """nn.MultiheadAttention; another key tensor keeps it off its fused inference path."""

    def __init__(self, *, need_weights: bool, fused: bool = False, mask: str = "") -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(C, H, batch_first=True)
        self.need_weights, self.fused, self.mask = need_weights, fused, mask

    def forward(self, tokens: Tensor) -> Tensor:
        key = tokens if self.fused else tokens + 1
        shape = {"padding": (B, LENGTH), "pairs": (LENGTH, LENGTH), "": ()}[self.mask]
        mask = torch.zeros(shape, dtype=torch.bool)
        masks = {"padding": {"key_padding_mask": mask}, "pairs": {"attn_mask": mask}, "": {}}
        output = self.attention(
            tokens, key, key, need_weights=self.need_weights, **masks[self.mask]
        )
        return output[0]


class ProjectedAttention(nn.Module):
    """Four linear layers around an attention given as a function of (B, H, LENGTH, C / H)."""

    def __init__(self, attend: Callable[..., Tensor]) -> None:
        super().__init__()
        self.projections = nn.ModuleList(nn.Linear(C, C) for _ in range(4))
        self.attend = attend

    def forward(self, tokens: Tensor) -> Tensor:
        query, key, value = (
            layer(tokens).unflatten(-1, (H, C // H)).transpose(1, 2)
            for layer in self.projections[:3]
        )
        return self.projections[3](self.attend(query, key, value).transpose(1, 2).flatten(2))


def attend_by_matmul(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return (query @ key.transpose(-1, -2) / 2).softmax(-1) @ value


def attend_by_einsum(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    weights = torch.einsum("...qd,...kd->...qk", query, key).softmax(-1)
    return torch.einsum("bhqk,bhkd->bhqd", weights, value)


def attend_by_baddbmm(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    bias = torch.zeros(LENGTH, LENGTH)
    scores = torch.baddbmm(bias, query.flatten(0, 1), key.flatten(0, 1).transpose(1, 2))
    return torch.bmm(scores.softmax(-1), value.flatten(0, 1)).unflatten(0, (B, H))


# A whole encoder layer --------------------------------------------------------------------------


def encoder_layer() -> nn.TransformerEncoderLayer:
    layer = nn.TransformerEncoderLayer(C, H, HIDDEN, batch_first=True)
    return layer.eval().requires_grad_(False)


class FusedEncoderLayer(nn.Module):
    """What torch makes of nn.TransformerEncoderLayer on its inference path."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = encoder_layer()

    def forward(self, tokens: Tensor) -> Tensor:
        layer, attention = self.layer, self.layer.self_attn
        return torch._transformer_encoder_layer_fwd(
            tokens, C, H,
            attention.in_proj_weight, attention.in_proj_bias,
            attention.out_proj.weight, attention.out_proj.bias,
            False, False, 1e-5,
            layer.norm1.weight, layer.norm1.bias, layer.norm2.weight, layer.norm2.bias,
            layer.linear1.weight, layer.linear1.bias, layer.linear2.weight, layer.linear2.bias,
        )  # fmt: skip


# Deformable sampling of Q queries, 2 levels, P points, heads of D channels ------------------------

Q, P, D = 3, 5, 4


def sampling(sample: Callable[..., Tensor]) -> Call:
    def run(image: Tensor) -> Tensor:
        value = torch.rand(B, 30, H, D)
        locations = torch.rand(B, Q, H, 2, P, 2)
        weights = torch.rand(B, Q, H, 2, P)
        return sample(value, [(4, 6), (2, 3)], locations, weights)

    return Call(run)


def compiled_sampling(value: Tensor, shapes: SpatialShapes, *sampling: Tensor) -> Tensor:
    return multi_scale_deformable_attention(value, shapes, *sampling, implementation="compiled")


def through_fused(implementation: str) -> Callable[..., Tensor]:
    """The fused function, fed with references and logits instead of locations and weights."""

    def sample(value: Tensor, shapes: SpatialShapes, points: Tensor, weights: Tensor) -> Tensor:
        reference = torch.rand(*points.shape[:2], len(shapes), 2)
        return fused_multi_scale_deformable_attention(
            value, shapes, reference, points, weights, implementation=implementation
        )

    return sample


# Clusters of 7 points of 4 channels, 3 heads, 6 rounds --------------------------------------------


def clustering(implementation: str) -> Call:
    projections = draw_projections(4, 6)

    def run(image: Tensor) -> Tensor:
        points = torch.rand(B, 3, 7, 4)
        assignment = cluster_tokens(points, projections, implementation=implementation)
        prototypes = cluster_mean(
            points, assignment.ids, assignment.counts, implementation=implementation
        )
        return cluster_broadcast(prototypes, assignment.ids, implementation=implementation)

    return Call(run)


# Neighbourhood attention of maps (B, HEIGHT, WIDTH, C), 3 x 3 neighbours --------------------------


class WrittenOutNeighborhoodAttention(NeighborhoodAttention):
    """The same with plain operators, from a table of the neighbours of each cell."""

    def forward(self, features: Tensor) -> Tensor:
        heads = self.projection(features.flatten(1, 2)).unflatten(-1, (3, H, -1))
        query, key, value = (part.transpose(1, 2) for part in heads.unbind(2))  # (B, H, cells, D)
        rows, columns = (
            (torch.arange(size) - 1).clamp(0, size - 3)[:, None] + torch.arange(3)
            for size in (HEIGHT, WIDTH)
        )
        cells = rows[:, None, :, None] * WIDTH + columns[None, :, None]
        index = cells.flatten(0, 1).flatten(1)  # (cells, 9)
        weights = (query.unsqueeze(-2) @ key[:, :, index].transpose(-1, -2)).softmax(-1)
        attended = (weights @ value[:, :, index]).squeeze(-2)
        return self.output(attended.transpose(1, 2).flatten(2)).unflatten(1, (HEIGHT, WIDTH))


def neighborhood(kind: type[NeighborhoodAttention]) -> NeighborhoodAttention:
    torch.manual_seed(0)
    attention = kind(channels=C, num_heads=H, kernel_size=3).eval().requires_grad_(False)
    attention.relative_position_bias_table.zero_()  # the written-out form has none
    attention.projection.weight[:C] *= (C // H) ** -0.5 if kind is not NeighborhoodAttention else 1
    attention.projection.bias.zero_()
    return attention


def test_the_written_out_neighborhood_attention_is_the_same() -> None:
    maps = torch.rand(B, HEIGHT, WIDTH, C)
    fused, written_out = map(neighborhood, (NeighborhoodAttention, WrittenOutNeighborhoodAttention))
    torch.testing.assert_close(written_out(maps), fused(maps))


# ------------------------------------------------------------------------------------------------


class Cost(NamedTuple):
    """Expected multiply-adds and activations."""

    flops: int
    activations: int


TOKENS = B * LENGTH
# Four projections of C x C, then scores and weighted sum of C / H channels in each of H heads.
# Activations: four projected tensors, scores of each head, and the weighted sum.
ATTENTION = Cost(4 * TOKENS * C * C + 2 * TOKENS * LENGTH * C, 5 * TOKENS * C + H * TOKENS * LENGTH)
# Two linear layers, and two norms with 5 an element.
ENCODER_LAYER = Cost(
    ATTENTION.flops + 2 * TOKENS * C * HIDDEN + 2 * 5 * TOKENS * C,
    ATTENTION.activations + TOKENS * (HIDDEN + C),
)
# 4 corners of each sample of D channels. The sum over points is elementwise in one form and part of
# the corners' weights in the other; softmax and the arithmetic of locations are not counted.
SAMPLING = Cost(4 * B * Q * H * 2 * P * D, 0)
# Hashing projects 42 tokens of 4 channels to 6 directions; the mean adds up 42 * 4 numbers.
CLUSTERING = Cost(42 * 4 * 6 + 42 * 4, 42 * 6)
# Three projections and one; then query times key and weight times value.
CELLS = B * HEIGHT * WIDTH
NEIGHBORHOOD = Cost(
    4 * CELLS * C * C + 2 * CELLS * NEIGHBOURS * C, 5 * CELLS * C + H * CELLS * NEIGHBOURS
)

TOKENS_SHAPE, MAP_SHAPE = (B, LENGTH, C), (B, HEIGHT, WIDTH, C)


class Form(NamedTuple):
    """One way to compute something, and an operator that shows that it is this way."""

    make: Callable[[], nn.Module]
    operator: str
    expected: Cost
    shape: tuple[int, ...] = TOKENS_SHAPE
    kernels: bool = False


FORMS = {
    "attention by matmul": Form(
        lambda: ProjectedAttention(attend_by_matmul), "aten::matmul", ATTENTION
    ),
    "attention by einsum": Form(
        lambda: ProjectedAttention(attend_by_einsum), "aten::einsum", ATTENTION
    ),
    "attention by baddbmm": Form(
        lambda: ProjectedAttention(attend_by_baddbmm), "aten::baddbmm", ATTENTION
    ),
    "attention by SDPA": Form(
        lambda: ProjectedAttention(F.scaled_dot_product_attention),
        "aten::scaled_dot_product_attention",
        ATTENTION,
    ),
    "MultiheadAttention, slow": Form(
        lambda: TorchAttention(need_weights=True), "aten::bmm", ATTENTION
    ),
    "MultiheadAttention, slow, masked pairs": Form(
        lambda: TorchAttention(need_weights=True, mask="pairs"), "aten::baddbmm", ATTENTION
    ),
    "MultiheadAttention, slow, padding": Form(
        lambda: TorchAttention(need_weights=True, mask="padding"), "aten::baddbmm", ATTENTION
    ),
    "MultiheadAttention, SDPA": Form(
        lambda: TorchAttention(need_weights=False),
        "aten::scaled_dot_product_attention",
        ATTENTION,
    ),
    "MultiheadAttention, SDPA, padding": Form(
        lambda: TorchAttention(need_weights=False, mask="padding"),
        "aten::scaled_dot_product_attention",
        ATTENTION,
    ),
    "MultiheadAttention, fast": Form(
        lambda: TorchAttention(need_weights=False, fused=True),
        "aten::_native_multi_head_attention",
        ATTENTION,
    ),
    "MultiheadAttention, fast, padding": Form(
        lambda: TorchAttention(need_weights=False, fused=True, mask="padding"),
        "aten::_native_multi_head_attention",
        ATTENTION,
    ),
    "TransformerEncoderLayer": Form(encoder_layer, "aten::linear", ENCODER_LAYER),
    "TransformerEncoderLayer, fast": Form(
        FusedEncoderLayer, "aten::_transformer_encoder_layer_fwd", ENCODER_LAYER
    ),
    "sampling by grid_sample": Form(
        lambda: sampling(sample_by_grid_sample), "aten::grid_sampler", SAMPLING
    ),
    "sampling by embedding_bag": Form(
        lambda: sampling(sample_by_embedding_bag), "aten::embedding_bag", SAMPLING
    ),
    "sampling from logits": Form(
        lambda: sampling(through_fused("pytorch")), "aten::embedding_bag", SAMPLING
    ),
    "sampling, compiled": Form(
        lambda: sampling(compiled_sampling),
        "efficient_detr::multi_scale_deformable_attention",
        SAMPLING,
        kernels=True,
    ),
    "sampling from logits, compiled": Form(
        lambda: sampling(through_fused("compiled")),
        "efficient_detr::fused_multi_scale_deformable_attention",
        SAMPLING,
        kernels=True,
    ),
    "clustering": Form(lambda: clustering("pytorch"), "aten::index_add", CLUSTERING),
    "clustering, compiled": Form(
        lambda: clustering("compiled"), "efficient_detr::lsh_hash", CLUSTERING, kernels=True
    ),
    "neighbourhoods by matmul": Form(
        lambda: neighborhood(WrittenOutNeighborhoodAttention),
        "aten::matmul",
        NEIGHBORHOOD,
        MAP_SHAPE,
    ),
    "neighbourhoods": Form(
        lambda: neighborhood(NeighborhoodAttention),
        "efficient_detr::neighborhood_attention",
        NEIGHBORHOOD,
        MAP_SHAPE,
    ),
}


@pytest.mark.parametrize(
    "form",
    [
        pytest.param(form, id=name, marks=[needs_kernels] if form.kernels else [])
        for name, form in FORMS.items()
    ],
)
def test_all_forms_count_the_same(form: Form) -> None:
    result = count_flops(OnImage(form.make()), [{"image": torch.rand(form.shape)}])
    assert form.operator in result.operators
    assert Cost(result.total, sum(result.activations.values())) == form.expected


def test_every_operator_with_activations_has_multiply_adds() -> None:
    assert ACTIVATION_HANDLERS.keys() <= registered_handlers().keys()


@needs_kernels
def test_a_detector_counts_the_same_with_and_without_kernels(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = tiny_model("dino")
    counts: list[FlopCount] = []
    for implementation in ("pytorch", "compiled"):
        monkeypatch.setenv(library.ENVIRONMENT_VARIABLE, implementation)
        counts.append(count_flops(model, [{"image": torch.zeros(3, 64, 96)}]))
    without, with_kernels = counts
    assert without.stages == with_kernels.stages
    assert without.activations == with_kernels.activations
    name = "efficient_detr::fused_multi_scale_deformable_attention"
    assert with_kernels.operators[name] > 0
    assert name not in without.operators
