"""Foreground token selection: top-down modulation, counts, nested prefixes."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from efficient_detr.modeling.heads import PredictionHead
from efficient_detr.modeling.queries import ProposalHead
from efficient_detr.modeling.selection import ForegroundScoreHead, ForegroundTokenSelector
from tests.tiny_models import FirstChannel, random_tokens

SHAPES = [(6, 8), (3, 4), (2, 2)]  # 48 + 12 + 4 = 64 tokens


def selector(**changes: Any) -> ForegroundTokenSelector:
    arguments: dict[str, Any] = dict(
        score_head=ForegroundScoreHead(channels=8),
        num_levels=3,
        keep_ratio=0.5,
        layer_keep_ratios=[1.0, 0.6, 0.2],
    )
    return ForegroundTokenSelector(**{**arguments, **changes})


def proposal_head() -> ProposalHead:
    return ProposalHead(channels=8, head=PredictionHead(channels=8, num_classes=3))


def test_scores_are_modulated_top_down() -> None:
    """Level 1 of shape 1 x 2 with scores 2 and 5 enlarges to 2, 3, 4, 5 on level 0 of 1 x 4 tokens.

    With corners aligned, the outer cells keep their values and the others are thirds of the way. A
    token z becomes z + alpha z s: with alpha = 0.5 and z = 10 it is 20, 25, 30, 35.
    """
    module = selector(score_head=FirstChannel(), num_levels=2)
    with torch.no_grad():
        module.modulation.fill_(0.5)
    tokens = random_tokens([(1, 4), (1, 2)])
    features = torch.zeros(1, 6, 8)
    features[0, :, 0] = torch.tensor([10.0, 10, 10, 10, 2, 5])
    fine, coarse = module.score_levels(features, tokens)
    assert coarse.tolist() == [[2, 5]]
    torch.testing.assert_close(fine, torch.tensor([[20.0, 25, 30, 35]]))


def test_each_transition_has_its_own_scale_coarsest_first() -> None:
    """One token a level: s2 = 2; s1 = 3 + a0 * 3 * 2; s0 = 5 + a1 * 5 * s1."""
    module = selector(score_head=FirstChannel())
    with torch.no_grad():
        module.modulation.copy_(torch.tensor([0.5, -0.1]))
    tokens = random_tokens([(1, 1)] * 3)
    features = torch.zeros(1, 3, 8)
    features[0, :, 0] = torch.tensor([5.0, 3.0, 2.0])
    scores = torch.cat(module.score_levels(features, tokens), dim=1)
    torch.testing.assert_close(scores, torch.tensor([[5 - 0.1 * 5 * 6, 6.0, 2.0]]))
    assert module.modulation.shape == (2,)


def test_modulation_acts_by_the_sign_of_its_factor() -> None:
    """The score head norms each token first, which undoes a scale: as published, and trained so.

    z + alpha z s = (1 + alpha s) z has the norm of z where 1 + alpha s > 0, that of -z elsewhere;
    only the norm's epsilon knows more. So weak scales leave the scores as they are.
    """
    module, tokens = selector(num_levels=2), random_tokens([(3, 4), (1, 1)])
    features = torch.randn(1, 13, 8)
    coarse = module.score_head(features[:, 12:]).item()
    fine = features[:, :12]
    for factor, expected in ((1.0, fine), (1.3, fine), (-0.7, -fine)):
        with torch.no_grad():
            module.modulation.fill_((factor - 1) / coarse)
        scores = module.score_levels(features, tokens)[0]
        torch.testing.assert_close(scores, module.score_head(expected), atol=1e-3, rtol=0)


def test_modulation_starts_small() -> None:
    assert selector(num_levels=300).modulation.abs().max() <= 0.3
    assert selector(num_levels=300).modulation.std() > 0.1


def test_counts_and_nested_prefixes() -> None:
    """64 valid tokens: int(0.5 * 64) + 1 = 33 kept, of them 33, int(19.8) and int(6.6)."""
    module, tokens = selector(), random_tokens(SHAPES, batch=2)
    selection = module(tokens, proposal_head())
    assert selection.counts.tolist() == [33, 33]
    assert [i.shape for i in selection.indices] == [(2, 33), (2, 19), (2, 6)]
    first = selection.indices[0]
    assert torch.equal(selection.indices[1], first[:, :19])
    assert torch.equal(selection.indices[2], first[:, :6])
    ranked = selection.scores.gather(1, first)
    assert (ranked[:, :-1] >= ranked[:, 1:]).all(), "best first"
    assert ranked[:, -1:].ge(selection.scores.topk(33).values[:, -1:]).all()


def test_the_smaller_image_of_a_batch_keeps_fewer_tokens() -> None:
    """The second image covers 32 x 40 of 48 x 64 pixels and has 30 tokens: int(15) + 1 are kept.

    Level 0: 4 x 5 = 20. Level 1: rows 0, 16 and columns 0, 16, 32 are image: 6. Level 2, whose
    2 x 2 cells read pixels 0 and 24 down and 0 and 32 across: 4.
    """
    tokens = random_tokens(SHAPES, sizes=[(48, 64), (32, 40)])
    assert (~tokens.padding_mask).sum(1).tolist() == [64, 30]
    selection = selector()(tokens, proposal_head())
    assert selection.counts.tolist() == [33, 16]
    assert selection.kept_tokens().tolist() == [[33, 16], [19, 16], [6, 6]]
    kept = tokens.padding_mask[1][selection.indices[0][1, :16]]
    assert not kept.any(), "padding ranks last"


def test_padding_gets_the_lowest_score_of_the_batch() -> None:
    tokens = random_tokens(SHAPES, sizes=[(48, 64), (32, 40)])
    selection = selector()(tokens, proposal_head())
    raw = torch.cat(selection.level_logits, dim=1)
    assert selection.scores[tokens.padding_mask].eq(raw.min()).all()
    assert torch.equal(selection.scores[~tokens.padding_mask], raw[~tokens.padding_mask])


def test_layer_sizes_are_rounded_in_single_precision() -> None:
    """0.29 * 100 is 28.999999999999996 in double precision, but 29 in single.

    float32(0.29) * 100 = 28.99999917, between 28.99999809 and 29.0, and nearer to 29.
    """
    module = selector(layer_keep_ratios=[0.29], keep_ratio=1.0)
    (indices,) = module._nested_indices(torch.randn(1, 200), 100)
    assert indices.shape == (1, 29)
    assert int(0.29 * 100) == 28


def test_a_layer_always_has_a_token() -> None:
    module = selector(keep_ratio=0.01, layer_keep_ratios=[1.0, 0.01])
    selection = module(random_tokens(SHAPES), proposal_head())
    assert [i.shape[1] for i in selection.indices] == [1, 1]
    assert selection.counts.tolist() == [1]


def test_keeping_everything_keeps_no_padding() -> None:
    tokens = random_tokens(SHAPES, sizes=[(48, 64), (32, 40)])
    selection = selector(keep_ratio=1.0)(tokens, proposal_head())
    assert selection.counts.tolist() == [64, 30]


def test_scores_come_from_the_shared_transform_of_features_plus_positions() -> None:
    tokens, proposals, module = random_tokens(SHAPES), proposal_head(), selector()
    with torch.no_grad():
        module.modulation.zero_()
    selection = module(tokens, proposals)
    transformed = proposals.transform(tokens, tokens.features + tokens.positions)
    for level, logits in enumerate(selection.level_logits):
        expected = module.score_head(tokens.split(transformed)[level])
        torch.testing.assert_close(logits, expected)


def test_gradients_flow_through_the_logits_from_fine_to_coarse() -> None:
    tokens, module = random_tokens(SHAPES), selector()
    selection = module(tokens, proposal_head())
    selection.level_logits[0].square().sum().backward()
    for name, parameter in module.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(keep_ratio=0.0), r"selection.keep_ratio must be in \(0, 1\], not 0.0"),
        (dict(keep_ratio=1.5), r"selection.keep_ratio must be in \(0, 1\], not 1.5"),
        (dict(layer_keep_ratios=[1.0, -0.1]), "selection.layer_keep_ratios must be .* not -0.1"),
    ],
)
def test_wrong_ratios(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        selector(**changes)


def test_autocast() -> None:
    tokens = random_tokens(SHAPES)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        selection = selector()(tokens, proposal_head())
    assert selection.scores.isfinite().all()
    assert selection.indices[0].shape == (1, 33)
