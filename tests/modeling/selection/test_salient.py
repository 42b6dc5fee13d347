"""Sparse DETR's selection: one network over all levels, the same tokens for all layers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from efficient_detr.modeling.heads import PredictionHead
from efficient_detr.modeling.queries import ProposalHead
from efficient_detr.modeling.selection import ForegroundScoreHead, SalientTokenSelector
from efficient_detr.modeling.selection.base import TokenSelector
from tests.tiny_models import FirstChannel, random_tokens

SHAPES = [(6, 8), (3, 4), (2, 2)]  # 48 + 12 + 4 = 64 tokens


def selector(**changes: Any) -> SalientTokenSelector:
    arguments: dict[str, Any] = dict(
        score_head=ForegroundScoreHead(channels=8), num_layers=3, keep_ratio=0.3
    )
    return SalientTokenSelector(**{**arguments, **changes})


def proposal_head() -> ProposalHead:
    return ProposalHead(channels=8, head=PredictionHead(channels=8, num_classes=3))


def test_every_layer_updates_the_best_tokens() -> None:
    """64 valid tokens: int(0.3 * 64) + 1 = 20."""
    selection = selector()(random_tokens(SHAPES, batch=2), proposal_head())
    assert selection.counts.tolist() == [20, 20]
    assert [indices.shape for indices in selection.indices] == [(2, 20)] * 3
    best = selection.scores.topk(20, dim=1).indices
    assert all(torch.equal(indices, best) for indices in selection.indices)


def test_all_levels_are_scored_together() -> None:
    """The logits are those of one call with all tokens, cut into levels."""
    tokens, proposals, module = random_tokens(SHAPES, batch=2), proposal_head(), selector()
    selection = module(tokens, proposals)
    transformed = proposals.transform(tokens, tokens.features + tokens.positions)
    logits = module.score_head(transformed)
    assert [level.shape for level in selection.level_logits] == [(2, 48), (2, 12), (2, 4)]
    torch.testing.assert_close(torch.cat(selection.level_logits, dim=1), logits)
    torch.testing.assert_close(selection.scores, logits)


def test_a_coarse_token_changes_the_scores_of_the_finest_level() -> None:
    module, tokens = selector(), random_tokens(SHAPES)
    features = torch.randn(1, 64, 8)
    changed = features.clone()
    changed[0, 63] += torch.randn(8)
    before, after = module.score_levels(features, tokens), module.score_levels(changed, tokens)
    assert (before[0] != after[0]).all()


def test_counts_are_rounded_in_single_precision() -> None:
    """0.29 * 100 is 28.999999999999996 in double precision, but 29 in single; one is added."""
    selection = selector(keep_ratio=0.29)(random_tokens([(10, 10)]), proposal_head())
    assert selection.counts.tolist() == [30]


def test_the_smaller_image_of_a_batch_keeps_fewer_tokens() -> None:
    """The second image, 32 x 40 of 48 x 64 pixels, has 20 + 6 + 4 tokens: int(9) + 1 are kept."""
    tokens = random_tokens(SHAPES, sizes=[(48, 64), (32, 40)])
    selection = selector(score_head=FirstChannel())(tokens, proposal_head())
    assert (~tokens.padding_mask).sum(1).tolist() == [64, 30]
    assert selection.kept_tokens().tolist() == [[20, 10]] * 3
    kept = tokens.padding_mask[1][selection.indices[0][1, :10]]
    assert not kept.any(), "padding ranks last"
    lowest = torch.cat(selection.level_logits, dim=1).min()
    assert selection.scores[tokens.padding_mask].eq(lowest).all()


def test_every_parameter_of_the_score_head_learns_from_the_scores() -> None:
    tokens, module = random_tokens(SHAPES, sizes=[(48, 64), (32, 40)]), selector()
    selection = module(tokens, proposal_head())
    nn.functional.softplus(selection.scores).sum().backward()
    for name, parameter in module.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(keep_ratio=0.0), r"selection.keep_ratio must be in \(0, 1\], not 0.0"),
        (dict(keep_ratio=30), r"selection.keep_ratio must be in \(0, 1\], not 30"),
        (dict(num_layers=0), "selection.num_layers must be at least 1, not 0"),
    ],
)
def test_wrong_arguments(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        selector(**changes)


def test_the_base_scores_nothing() -> None:
    base = TokenSelector(keep_ratio=0.5, layer_keep_ratios=[1.0])
    with pytest.raises(NotImplementedError, match="TokenSelector does not define score_levels"):
        base(random_tokens(SHAPES), proposal_head())
