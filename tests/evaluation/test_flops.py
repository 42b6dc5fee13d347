"""FLOPs and parameters. One multiply-add counts as 1; every expected number is derived by hand."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from detectron2.utils.analysis import FlopCountAnalysis
from torch import Tensor, nn

from efficient_detr.evaluation import (
    FlopCount,
    count_flops,
    count_parameters,
    flop_handlers,
    register_flop_handler,
    stage_modules,
    tensor_shape,
)
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

B, LENGTH, C, H = 2, 5, 8, 2


class OnTokens(nn.Module):
    """Runs a module on the image of the first input, read as (B, tokens, C)."""

    def __init__(self, part: nn.Module) -> None:
        super().__init__()
        self.part = part

    def forward(self, batched_inputs: list[dict]) -> Tensor:
        return self.part(batched_inputs[0]["image"])


def count(part: nn.Module, tokens: Tensor | None = None) -> FlopCount:
    """Counts a module that takes (B, tokens, C)."""
    return count_flops(
        OnTokens(part), [{"image": torch.rand(B, LENGTH, C) if tokens is None else tokens}]
    )


class Call(nn.Module):
    """A function as a module."""

    def __init__(self, function) -> None:
        super().__init__()
        self.function = function

    def forward(self, tokens: Tensor) -> Tensor:
        return self.function(tokens)


class TorchAttention(nn.Module):
    """nn.MultiheadAttention; another key tensor keeps it off its fused inference path."""

    def __init__(self, *, need_weights: bool, fused: bool = False, mask: bool = False) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(C, H, batch_first=True)
        self.need_weights, self.fused, self.mask = need_weights, fused, mask

    def forward(self, tokens: Tensor) -> Tensor:
        key = tokens if self.fused else tokens + 1
        mask = torch.zeros(LENGTH, LENGTH, dtype=torch.bool) if self.mask else None
        return self.attention(tokens, key, key, need_weights=self.need_weights, attn_mask=mask)[0]


class ProjectedAttention(nn.Module):
    """Four linear layers around an attention given as a function of (B, H, tokens, C / H)."""

    def __init__(self, attend) -> None:
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


# Four projections of B * LENGTH tokens, C x C each: 4 * 10 * 64 = 2560.
# Scores and weighted sum, C / H channels in each of H heads: 2 * B * LENGTH^2 * C = 800.
ATTENTION = 2560 + 800


@pytest.mark.parametrize(
    ("form", "operator"),
    [
        (ProjectedAttention(attend_by_matmul), "aten::matmul"),
        (ProjectedAttention(attend_by_einsum), "aten::einsum"),
        (ProjectedAttention(attend_by_baddbmm), "aten::baddbmm"),
        (
            ProjectedAttention(F.scaled_dot_product_attention),
            "aten::scaled_dot_product_attention",
        ),
        (TorchAttention(need_weights=True), "aten::bmm"),
        (TorchAttention(need_weights=True, mask=True), "aten::baddbmm"),
        (TorchAttention(need_weights=False), "aten::scaled_dot_product_attention"),
        (TorchAttention(need_weights=False, fused=True), "aten::_native_multi_head_attention"),
    ],
)
def test_all_forms_of_one_attention_cost_the_same(form: nn.Module, operator: str) -> None:
    result = count(form)
    assert operator in result.operators
    assert result.total == ATTENTION


def test_cross_attention_with_other_value_width() -> None:
    # 3 queries, 7 keys of 4 channels, values of 6 channels, 2 heads, 1 image:
    # 2 * 3 * 7 * (4 + 6) = 420.
    def attend(tokens: Tensor) -> Tensor:
        query, key, value = torch.ones(1, 2, 3, 4), torch.ones(1, 2, 7, 4), torch.ones(1, 2, 7, 6)
        return F.scaled_dot_product_attention(query, key, value)

    assert count(Call(attend)).total == 420


def test_fused_encoder_layer_costs_what_its_parts_cost() -> None:
    layer = nn.TransformerEncoderLayer(C, H, 3 * C, batch_first=True).eval().requires_grad_(False)
    attention, norms = layer.self_attn, (layer.norm1, layer.norm2)

    def fused(tokens: Tensor) -> Tensor:
        return torch._transformer_encoder_layer_fwd(
            tokens, C, H,
            attention.in_proj_weight, attention.in_proj_bias,
            attention.out_proj.weight, attention.out_proj.bias,
            False, False, 1e-5,
            norms[0].weight, norms[0].bias, norms[1].weight, norms[1].bias,
            layer.linear1.weight, layer.linear1.bias, layer.linear2.weight, layer.linear2.bias,
        )  # fmt: skip

    # Two affine norms of 10 tokens, 5 an element: 2 * 5 * 80 = 800.
    # Two linear layers between 8 and 24 channels: 2 * 10 * 8 * 24 = 3840.
    expected = ATTENTION + 800 + 3840
    assert count(Call(fused)).operators == {"aten::_transformer_encoder_layer_fwd": expected}
    assert count(layer).total == expected


def plain_compiled(value: Tensor, shapes: SpatialShapes, *sampling: Tensor) -> Tensor:
    return multi_scale_deformable_attention(value, shapes, *sampling, implementation="compiled")


def through_fused(implementation: str) -> Callable[..., Tensor]:
    """The fused function, fed with references and logits instead of locations and weights."""

    def sample(value: Tensor, shapes: SpatialShapes, points: Tensor, weights: Tensor) -> Tensor:
        reference = torch.rand(*points.shape[:2], len(shapes), 2)
        return fused_multi_scale_deformable_attention(
            value, shapes, reference, points, weights, implementation=implementation
        )

    return sample


no_kernels = library.missing_reason(torch.device("cpu"))
needs_kernels = pytest.mark.skipif(
    bool(no_kernels), reason=f"needs the compiled kernels, but {no_kernels}"
)


@pytest.mark.parametrize(
    "sample",
    [
        pytest.param(sample_by_grid_sample, id="grid_sample"),
        pytest.param(sample_by_embedding_bag, id="embedding_bag"),
        pytest.param(through_fused("pytorch"), id="fused"),
        pytest.param(plain_compiled, id="compiled", marks=needs_kernels),
        pytest.param(through_fused("compiled"), id="compiled_fused", marks=needs_kernels),
    ],
)
def test_all_forms_of_deformable_sampling_cost_the_same(sample: Callable[..., Tensor]) -> None:
    images, queries, heads, channels, points = 2, 3, 2, 4, 5
    shapes = [(4, 6), (2, 3)]

    def run(tokens: Tensor) -> Tensor:
        value = torch.rand(images, 30, heads, channels)
        locations = torch.rand(images, queries, heads, 2, points, 2)
        weights = torch.rand(images, queries, heads, 2, points)
        return sample(value, shapes, locations, weights)

    # 4 corners for each of B * Q * H * L * P * D = 2 * 3 * 2 * 2 * 5 * 4 = 480 samples. The sum
    # over points is elementwise in one form and part of the corner weights in the other; softmax
    # and the arithmetic of locations are not counted.
    assert count(Call(run)).total == 4 * 480


@pytest.mark.parametrize(
    "implementation", ["pytorch", pytest.param("compiled", marks=needs_kernels)]
)
def test_both_forms_of_clustering_cost_the_same(implementation: str) -> None:
    projections = draw_projections(4, 6)

    def run(tokens: Tensor) -> Tensor:
        points = torch.rand(2, 3, 7, 4)
        assignment = cluster_tokens(points, projections, implementation=implementation)
        prototypes = cluster_mean(
            points, assignment.ids, assignment.counts, implementation=implementation
        )
        return cluster_broadcast(prototypes, assignment.ids, implementation=implementation)

    # Hashing projects B * H * N = 42 tokens of D = 4 channels to T = 6 directions: 42 * 4 * 6.
    # The mean adds up 42 * 4 numbers.
    assert count(Call(run)).total == 42 * 4 * 6 + 42 * 4


@needs_kernels
def test_a_detector_costs_the_same_with_and_without_kernels(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = tiny_model("dino")
    counts = []
    for implementation in ("pytorch", "compiled"):
        monkeypatch.setenv(library.ENVIRONMENT_VARIABLE, implementation)
        counts.append(count_flops(model, [{"image": torch.zeros(3, 64, 96)}]))
    without, with_kernels = counts
    assert without.stages == with_kernels.stages
    name = "efficient_detr::fused_multi_scale_deformable_attention"
    assert with_kernels.operators[name] > 0
    assert name not in without.operators


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        # One output of (2, 5, 3), each summing over 8.
        (lambda x: F.linear(x, torch.ones(3, 8)), 240),
        (lambda x: x @ torch.ones(8, 3), 240),
        (lambda x: torch.ones(3, 8) @ x.transpose(1, 2), 240),  # the batch is on the right only
        (lambda x: torch.addmm(torch.ones(3), x[0], torch.ones(8, 3)), 120),
        (lambda x: torch.addbmm(torch.ones(5, 5), x, x.transpose(1, 2)), 400),
        (lambda x: torch.addmv(torch.ones(5), x[0], torch.ones(8)), 40),
        (lambda x: x[0] @ torch.ones(8), 40),
        (lambda x: torch.dot(x[0, 0], x[0, 0]), 8),
        (lambda x: torch.einsum("btc,dc->btd", x, torch.ones(3, 8)), 240),
        (lambda x: torch.einsum("btc,dc", x, torch.ones(3, 8)), 240),  # implicit output
        (lambda x: torch.einsum("btc,btd->btcd", x, x), 640),  # an outer product multiplies too
        # As an image of 2 channels, 5 x 8: 3x3 kernels in 2 groups, 4 output channels of 3 x 6.
        (lambda x: F.conv2d(x[None], torch.ones(4, 1, 3, 3), groups=2), 4 * 18 * 9),
        (lambda x: F.conv2d(x[None], torch.ones(4, 2, 3, 3), padding="same"), 4 * 40 * 18),
        # Transposed: each of 2 * 40 inputs touches 4 output channels of a 2 x 2 kernel.
        (lambda x: F.conv_transpose2d(x[None], torch.ones(2, 4, 2, 2), stride=2), 80 * 16),
        (lambda x: F.layer_norm(x, (8,), torch.ones(8), torch.ones(8)), 5 * 80),
        (lambda x: F.interpolate(x[None], scale_factor=2, mode="bilinear"), 4 * 320),
        # Two bags of three weighted rows of 8.
        (
            lambda x: F.embedding_bag(
                torch.tensor([[0, 1, 2], [2, 3, 4]]),
                x[0],
                per_sample_weights=torch.ones(2, 3),
                mode="sum",
            ),
            48,
        ),
    ],
)  # fmt: skip
def test_operators(function, expected: int) -> None:
    assert count(Call(function)).total == expected


@pytest.mark.parametrize(
    ("function", "operator"),
    [
        (lambda x: x.softmax(-1), "aten::softmax"),
        (lambda x: x + 1, "aten::add"),
        (lambda x: x.topk(3).values, "aten::topk"),
        (lambda x: x.gather(1, torch.zeros(2, 5, 8, dtype=torch.long)), "aten::gather"),
        (lambda x: x.relu(), "aten::relu"),
        (lambda x: torch.einsum("btc->bc", x), "aten::einsum"),
        (
            lambda x: F.embedding_bag(torch.tensor([[0, 1]]), x[0], mode="sum"),
            "aten::embedding_bag",
        ),
        (
            lambda x: F.grid_sample(x[None], torch.zeros(1, 2, 2, 2), "nearest", "zeros", False),
            "aten::grid_sampler",
        ),
    ],
)
def test_operators_without_a_count_are_listed(function, operator: str) -> None:
    result = count(Call(function))
    assert result.total == 0
    assert result.uncounted[operator] == 1


def test_views_and_copies_are_not_listed() -> None:
    result = count(Call(lambda x: x.transpose(1, 2).reshape(2, 40).clone().unsqueeze(0)))
    assert result.uncounted == {}


def test_nothing_that_fvcore_or_detectron2_ignore_is_hidden() -> None:
    analysis = FlopCountAnalysis(nn.Linear(1, 1), (torch.ones(1),))
    analysis.clear_op_handles()
    ignored = analysis._ignored_ops
    known = flop_handlers.FREE_OPERATORS | set(flop_handlers.registered_handlers())
    assert ignored
    assert ignored <= known


def test_einsum_of_three_asks_for_products_of_two() -> None:
    with pytest.raises(ValueError, match="ab,bc,cd->ad.*products of two"):
        count(Call(lambda x: torch.einsum("ab,bc,cd->ad", x[0], x[0].T, x[0])))


@torch.library.custom_op("efficient_detr_test::row_products", mutates_args=())
def row_products(left: Tensor, right: Tensor) -> Tensor:
    return (left * right).sum(-1)


def test_neighborhood_attention_is_counted() -> None:
    """Query times key and weight times value for 3 x 3 neighbours, however they are computed."""
    attention = NeighborhoodAttention(channels=C, num_heads=H, kernel_size=3)
    result = count(attention, torch.rand(B, 4, LENGTH, C))
    cells = B * 4 * LENGTH
    assert result.operators == {
        "aten::linear": cells * C * (3 * C + C),
        "efficient_detr::neighborhood_attention": 2 * cells * 3 * 3 * C,
    }
    assert result.total == sum(result.operators.values())


@pytest.fixture
def handlers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flop_handlers, "_HANDLERS", flop_handlers.registered_handlers())


@pytest.mark.usefixtures("handlers")
def test_custom_operator_is_counted_once_it_has_a_handler() -> None:
    operator = "efficient_detr_test::row_products"
    part = Call(lambda x: row_products(x, x))
    before = count(part)
    register_flop_handler(operator, lambda inputs, _: 80 if tensor_shape(inputs[0]) else 0)
    after = count(part)
    assert (before.total, before.uncounted) == (0, {operator: 1})
    assert (after.total, after.uncounted) == (80, {})


@pytest.mark.usefixtures("handlers")
def test_handler_names_are_checked() -> None:
    with pytest.raises(ValueError, match="namespace"):
        register_flop_handler("row_products", lambda inputs, outputs: 1)
    with pytest.raises(ValueError, match="aten::linear.*already"):
        register_flop_handler("aten::linear", lambda inputs, outputs: 1)


class Neck(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.reduce = nn.Linear(C, C, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.reduce(tokens)


class Encoder(nn.Module):
    """Calls a head that belongs to another stage."""

    def __init__(self, head: nn.Linear) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(C, C), nn.Linear(C, C)])
        self.shared_head = head

    def forward(self, tokens: Tensor, neck: nn.Module) -> Tensor:
        for layer in self.layers:
            tokens = layer(tokens)
        return neck(tokens) + self.shared_head(tokens).sum()


class FakeDetector(nn.Module):
    """Stages: one shared, one nested, one idle, one mere container; and a product outside."""

    def __init__(self) -> None:
        super().__init__()
        self.proposals = nn.Linear(C, 3)  # 24 weights + 3 biases
        self.neck = Neck()  # 64
        self.encoder = Encoder(self.proposals)  # 2 * (64 + 8), the head counts above
        self.denoising = nn.Embedding(4, C)  # 32
        self.heads = nn.ModuleList([nn.Linear(C, 1)])  # 9

    def forward(self, tokens: Tensor) -> Tensor:
        tokens = self.encoder(self.neck(tokens), self.neck)
        loose = tokens @ torch.ones(C, 2)
        return self.heads[0](tokens) + loose.sum() + self.proposals(tokens)


class FakeModel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.detector = FakeDetector()
        self.scale = nn.Parameter(torch.ones(5), requires_grad=False)

    def forward(self, batched_inputs: list[dict]) -> Tensor:
        return self.detector(torch.stack([item["image"] for item in batched_inputs])[0])


def test_stages_add_up_and_nested_stages_count_once() -> None:
    image = torch.rand(1, 10, C)  # 10 tokens
    result = count_flops(FakeModel(), [{"image": image}])
    assert result.stages == {
        "proposals": 10 * 8 * 3,
        "neck": 10 * 64,
        # Two layers, then the neck and the head, both called by the encoder: 1280 + 640 + 240.
        "encoder": 2160,
        "denoising": 0,
        "heads": 80,
        "other": 160,
    }
    assert list(result.stages) == ["proposals", "neck", "encoder", "denoising", "heads", "other"]
    assert result.total == sum(result.stages.values()) == 3280
    assert result.image_sizes == [(10, 8)]


def test_modules_whose_output_is_thrown_away_are_counted() -> None:
    class Wasteful(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(C, C)
            self.attention = TorchAttention(need_weights=False, fused=True)

        def forward(self, tokens: Tensor) -> Tensor:
            self.layer(tokens)
            self.attention(tokens)
            return tokens

    # 10 tokens through 8 x 8 weights, and the attention of the tests above.
    assert count(Wasteful()).total == 640 + ATTENTION


def test_shared_parameters_count_once() -> None:
    model = FakeModel()
    model.detector.neck.requires_grad_(False)
    result = count_parameters(model)
    assert result.stages == {
        "proposals": 27,
        "neck": 64,
        "encoder": 144,
        "denoising": 32,
        "heads": 9,
        "other": 5,
    }
    assert result.total == 281 == sum(p.numel() for p in model.parameters())
    assert result.trainable == 281 - 64 - 5
    assert result.trainable_stages["neck"] == result.trainable_stages["other"] == 0


def test_model_without_detector_is_split_into_its_children() -> None:
    model = OnTokens(nn.Linear(C, C))
    assert list(stage_modules(model)) == ["part"]
    assert count_flops(model, [{"image": torch.rand(1, 3, C)}]).stages == {"part": 192}


def test_counting_leaves_no_trace() -> None:
    class Noisy(FakeModel):
        def forward(self, batched_inputs: list[dict]) -> Tensor:
            self.seen = (self.training, self.detector.training, torch.is_grad_enabled())
            return super().forward(batched_inputs) * torch.rand(1)

    model = Noisy().train()
    model.detector.neck.eval()
    flags = [module.training for module in model.modules()]
    torch.manual_seed(0)
    random.seed(0)
    expected = (torch.rand(3).tolist(), random.random())
    torch.manual_seed(0)
    random.seed(0)
    count_flops(
        nn.DataParallel(model), [{"image": torch.rand(1, 2, C, generator=torch.Generator())}]
    )
    assert model.seen == (False, False, False)
    assert [module.training for module in model.modules()] == flags
    assert (torch.rand(3).tolist(), random.random()) == expected
    assert torch.is_grad_enabled()
    assert not any(module._forward_hooks for module in model.modules())


def test_autocast_changes_nothing() -> None:
    model, inputs = FakeModel(), [{"image": torch.rand(1, 4, C)}]
    plain = count_flops(model, inputs)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert count_flops(model, inputs) == plain
