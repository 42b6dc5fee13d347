"""Channel mapper: widths, extra levels, what each level is computed from."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from efficient_detr.modeling.neck import ChannelMapper


def maps() -> dict[str, Tensor]:
    return {
        "res3": torch.randn(2, 6, 16, 20),
        "res4": torch.randn(2, 10, 8, 10),
        "res5": torch.randn(2, 14, 4, 5),
    }


def mapper(**changes: Any) -> ChannelMapper:
    arguments: dict[str, Any] = dict(
        in_features=["res3", "res4", "res5"],
        in_channels=[6, 10, 14],
        channels=8,
        num_levels=5,
        num_groups=2,
    )
    return ChannelMapper(**{**arguments, **changes})


def test_shapes() -> None:
    outputs = mapper()(maps())
    # A 3x3 convolution of stride 2 with padding 1 halves and rounds up: 4x5 -> 2x3 -> 1x2.
    expected = [(16, 20), (8, 10), (4, 5), (2, 3), (1, 2)]
    assert [tuple(m.shape) for m in outputs] == [(2, 8, *shape) for shape in expected]


@pytest.mark.parametrize("num_levels", [3, 4, 6])
def test_number_of_levels(num_levels: int) -> None:
    assert len(mapper(num_levels=num_levels)(maps())) == num_levels


def test_every_level_is_normalised_by_group() -> None:
    for output in mapper(num_levels=4)(maps()):
        groups = output.unflatten(1, (2, 4)).flatten(2)
        torch.testing.assert_close(groups.mean(-1), torch.zeros(2, 2), atol=1e-5, rtol=0)
        torch.testing.assert_close(
            groups.var(-1, unbiased=False), torch.ones(2, 2), atol=2e-2, rtol=0
        )


def test_first_extra_level_reads_the_last_backbone_map_and_the_next_reads_it() -> None:
    neck: Any = mapper()
    features = maps()
    before = neck(features)
    with torch.no_grad():
        neck.convs[2].weight.normal_()  # the mapped res5, which no extra level reads
    after = neck(features)
    assert not torch.equal(before[2], after[2])
    assert torch.equal(before[3], after[3])
    assert neck.extra_convs[0].weight.shape == (8, 14, 3, 3)
    assert neck.extra_convs[1].weight.shape == (8, 8, 3, 3)
    torch.testing.assert_close(neck.extra_convs[1](after[3]), after[4])


def test_order_follows_in_features() -> None:
    features = maps()
    neck = mapper(in_features=["res4", "res5"], in_channels=[10, 14], num_levels=2)
    torch.testing.assert_close(neck(features)[0], neck.convs[0](features["res4"]))


def test_wrong_arguments() -> None:
    with pytest.raises(ValueError, match=r"neck.in_features names 3 .* neck.in_channels has 2"):
        mapper(in_channels=[6, 10])
    with pytest.raises(ValueError, match=r"neck.num_levels=2 .* name fewer in_features"):
        mapper(num_levels=2)


def test_without_a_norm() -> None:
    """DETR's input projection: a plain 1x1 convolution, started as torch starts one."""
    features = maps()
    neck: Any = mapper(in_features=["res5"], in_channels=[14], num_levels=1, num_groups=None)
    assert set(neck.state_dict()) == {"convs.0.weight", "convs.0.bias"}
    weight, bias = neck.convs[0].weight, neck.convs[0].bias
    expected = torch.einsum("bihw,oi->bohw", features["res5"], weight[:, :, 0, 0])
    (output,) = neck(features)
    torch.testing.assert_close(output, expected + bias[:, None, None], rtol=1e-4, atol=1e-5)


def test_start_with_and_without_a_norm() -> None:
    """Torch: weights and biases within 1 / sqrt(fan in). Before a norm: Xavier, no bias.

    A 1x1 convolution from 100 to 800 channels: 1/10, and sqrt(6 / 900).
    """
    sizes = dict(in_features=["res5"], in_channels=[100], channels=800, num_levels=1)
    plain: Any = mapper(**sizes, num_groups=None).convs[0]
    for tensor in (plain.weight, plain.bias):
        assert 0.9 < tensor.abs().max() * 10 <= 1
    normed: Any = mapper(**sizes, num_groups=2).convs[0]
    assert 0.9 < normed.weight.abs().max() / (6 / 900) ** 0.5 <= 1
    assert normed.bias.eq(0).all()


def test_extra_levels_without_a_norm() -> None:
    neck: Any = mapper(num_groups=None)
    outputs = neck(maps())
    assert [tuple(m.shape[2:]) for m in outputs[3:]] == [(2, 3), (1, 2)]
    assert not any("norm" in name for name in neck.state_dict())
