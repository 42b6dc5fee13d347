"""FLOPs and parameters. One multiply-add counts as 1; every expected number is derived by hand."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from detectron2.utils.analysis import FlopCountAnalysis
from fvcore.nn import ActivationCountAnalysis
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


def test_cross_attention_with_other_value_width() -> None:
    # 3 queries, 7 keys of 4 channels, values of 6 channels, 2 heads, 1 image:
    # 2 * 3 * 7 * (4 + 6) = 420.
    def attend(tokens: Tensor) -> Tensor:
        query, key, value = torch.ones(1, 2, 3, 4), torch.ones(1, 2, 7, 4), torch.ones(1, 2, 7, 6)
        return F.scaled_dot_product_attention(query, key, value)

    assert count(Call(attend)).total == 420


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
            self.attention = nn.MultiheadAttention(C, H, batch_first=True)

        def forward(self, tokens: Tensor) -> Tensor:
            self.layer(tokens)
            self.attention(tokens, tokens, tokens, need_weights=False)
            return tokens

    # 10 tokens through 8 x 8 weights; four such projections of the attention, and two products of
    # 5 x 5 tokens of 8 channels for both images.
    assert count(Wasteful()).total == 640 + 4 * 640 + 2 * 2 * 25 * 8


def test_activations_are_those_of_fvcore() -> None:
    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.reduce = nn.Linear(C, 3)
            self.filter = nn.Conv1d(LENGTH, 4, 3)

        def forward(self, tokens: Tensor) -> Tensor:
            filtered = self.filter(tokens).relu()  # (2, 4, 6)
            return self.reduce(tokens).softmax(-1).sum() + filtered @ filtered.transpose(1, 2)

    tokens = torch.rand(B, LENGTH, C)
    # The linear layer 2 * 5 * 3, the convolution 2 * 4 * 6, the product 2 * 4 * 4.
    assert count(Plain(), tokens).activations == {"part": 30 + 48 + 32}
    assert ActivationCountAnalysis(Plain(), tokens).total() == 110


class DecoderWithHeads(nn.Module):
    """A decoder whose second head is also that of the proposals, and a layer of its own."""

    def __init__(self, shared: nn.Module) -> None:
        super().__init__()
        self.layer = nn.Linear(C, C, bias=False)  # 64
        self.heads = nn.ModuleList([nn.Sequential(nn.Linear(C, 2, bias=False)), shared])

    def forward(self, tokens: Tensor) -> Tensor:
        tokens = self.layer(tokens)
        return self.heads[0](tokens).sum() + self.heads[1](tokens).sum() + self.layer(tokens).sum()


class DetectorWithHeads(nn.Module):
    """Proposals and decoder share a head."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Linear(C, C, bias=False)
        self.proposals = nn.Sequential(nn.Linear(C, 3, bias=False))
        self.decoder = DecoderWithHeads(self.proposals)
        self.later = nn.Linear(C, 1, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        tokens = self.encoder(tokens)
        return self.proposals(tokens).sum() + self.decoder(tokens) + self.later(tokens).sum()


class ModelWithHeads(FakeModel):
    def __init__(self) -> None:
        super().__init__()
        self.detector: Any = DetectorWithHeads()


def test_heads_are_a_stage_beside_the_decoder() -> None:
    model = ModelWithHeads()
    names = ["encoder", "proposals", "decoder", "heads", "later"]
    assert list(stage_modules(model)) == names
    assert stage_modules(model)["heads"] is model.detector.decoder.heads
    result = count_flops(model, [{"image": torch.rand(1, 10, C)}])
    # 10 tokens; the decoder runs its layer twice, and a head of 2 and one of 3 channels.
    assert result.stages == dict(zip(names, [640, 240, 2 * 640, 10 * 8 * (2 + 3), 80], strict=True))
    assert list(result.stages) == names
    assert result.activations == dict(zip(names, [80, 30, 160, 50, 10], strict=True))
    # The head that proposals and decoder share belongs to the first of them.
    parameters = count_parameters(model).stages
    assert [parameters[name] for name in names] == [64, 24, 64, 16, 8]


class BorrowingEncoder(nn.Module):
    def __init__(self, head: nn.Module) -> None:
        super().__init__()
        self.head = head

    def forward(self, tokens: Tensor) -> Tensor:
        return tokens + self.head(tokens).sum()


def test_a_head_of_the_decoder_that_the_encoder_calls_is_charged_to_the_encoder() -> None:
    model = ModelWithHeads()
    detector = model.detector
    detector.encoder = BorrowingEncoder(detector.decoder.heads[0])
    stages = count_flops(model, [{"image": torch.rand(1, 10, C)}]).stages
    assert stages["encoder"] == 10 * 8 * 2
    assert stages["heads"] == 10 * 8 * (2 + 3)


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
