"""Measuring clusters: against attention itself, on images with padding."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from efficient_detr.errors import ConfigError
from efficient_detr.evaluation.clusters import (
    ClusterMeasurement,
    Hashing,
    encoder_attentions,
    mean_measurements,
    measuring_clusters,
)
from efficient_detr.modeling.attention.clustered import (
    ClusteredEncoderAttention,
    clustered_attentions,
    exact_attention,
)
from efficient_detr.modeling.attention.dense import DenseEncoderAttention
from efficient_detr.modeling.attention.token_clustering import TokenClustering
from tests.tiny_models import random_tokens, randomised

CHANNELS, HEADS, D = 16, 2, 8
HASHING = Hashing(rounds=3, width=2.0, bias_range=2.0)


def build(**options: Any) -> ClusteredEncoderAttention:
    clustering = TokenClustering(head_channels=D, rounds=3, width=2.0, bias_range=2.0, seed=0)
    attention = ClusteredEncoderAttention(
        channels=CHANNELS, num_heads=HEADS, query_clustering=clustering, **options
    )
    randomised(attention, 0.5)
    return attention.eval()


def attend(attention: ClusteredEncoderAttention, tokens: Any) -> torch.Tensor:
    return attention(
        tokens.features,
        tokens.positions,
        tokens.reference_points,
        memory=tokens,
        padding_mask=tokens.padding_mask,
    )


def test_numbers_are_those_of_the_attention() -> None:
    attention = build(min_tokens=0, max_cluster_ratio=1.0, temperature=0.7)
    attention.out_proj.weight.data = torch.eye(CHANNELS)  # so that outputs are those of the heads
    torch.nn.init.zeros_(attention.out_proj.bias)
    tokens = random_tokens([(6, 8)], channels=CHANNELS)
    given: list[Any] = []
    clustering = attention.query_clustering
    assert clustering is not None
    clustering.register_forward_hook(lambda module, args, output: given.append(output))
    clustered = attend(attention, tokens).detach()
    with measuring_clusters(attention, [HASHING]) as found:
        dense = attend(attention, tokens).detach()
    with exact_attention(attention):
        assert dense.equal(attend(attention, tokens))
    assert len(found) == 1
    counts = given[0].num_clusters[0].tolist()
    one = found[0]
    assert (one.layer, one.hashing, one.tokens) == (0, HASHING, 48)
    assert one.clusters == sum(counts) / HEADS and one.most_clusters == max(counts)
    assert one.ratio == one.clusters / 48 and 0 < one.ratio < 1
    expected = float((clustered - dense).norm() / dense.norm())
    assert one.error == pytest.approx(expected, rel=1e-4) and expected > 0.01
    assert one.map_error is None
    # Afterwards it clusters again, and nobody measures.
    assert attend(attention, tokens).equal(clustered) and len(found) == 1


def test_error_of_attention_weights() -> None:
    """Values that are unit vectors make the output of a head the weights themselves."""
    attention = build()
    tokens = random_tokens([(2, 4)], channels=CHANNELS)
    with measuring_clusters(attention, [HASHING], attention_maps=True) as found:
        attend(attention, tokens)
    located = tokens.features + tokens.positions
    query, key, _ = attention.project(located, located, tokens.features)
    unit = torch.eye(8).expand(1, HEADS, 8, 8)  # eight tokens, eight channels
    attention.min_tokens, attention.max_cluster_ratio = 0, 1.0
    clustered = attention.attend_heads_in_clusters(query, key, unit)
    difference = clustered - attention.attend_heads(query, key, unit)
    assert found[0].map_error == pytest.approx(difference.square().mean().item(), rel=1e-4)
    assert found[0].map_error > 1e-6


def test_padding_does_not_count() -> None:
    attention = build()
    tokens = random_tokens([(6, 8)], channels=CHANNELS, sizes=[(48, 40), (48, 64)])
    with measuring_clusters(attention, [HASHING], attention_maps=True) as together:
        attend(attention, tokens)
    changed = tokens.with_features(
        torch.where(tokens.padding_mask[..., None], 100.0, tokens.features)
    )
    with measuring_clusters(attention, [HASHING], attention_maps=True) as again:
        attend(attention, changed)
    assert together == again and [one.tokens for one in together] == [30, 48]


def test_every_hashing_in_every_layer() -> None:
    layers = torch.nn.ModuleList([build(), build()])
    hashings = [HASHING, Hashing(24, 0.001)]
    with measuring_clusters(layers, hashings) as found:
        for layer in layers:
            attend(layer, random_tokens([(4, 4)], batch=2, channels=CHANNELS))
    assert [(one.layer, one.hashing) for one in found] == [
        (layer, hashing) for layer in (0, 1) for _image in (0, 1) for hashing in hashings
    ]
    # A cell for each token is exact.
    fine = [one for one in found if one.hashing.rounds == 24]
    assert all(one.ratio == 1 and one.error < 1e-5 for one in fine)


def test_an_error_leaves_the_model_as_it_was() -> None:
    attention = build()
    with pytest.raises(RuntimeError), measuring_clusters(attention, [HASHING]):
        raise RuntimeError
    assert not attention.exact and not attention._forward_hooks
    assert clustered_attentions(attention) == [attention]


def test_means() -> None:
    def measured(layer: int, tokens: int, error: float) -> ClusterMeasurement:
        return ClusterMeasurement(layer, HASHING, tokens, tokens / 2, tokens, 0.5, error)

    found = [measured(0, 10, 0.1), measured(1, 10, 0.2), measured(0, 20, 0.3)]
    first, second = mean_measurements(found)
    assert (first.layer, first.tokens, first.clusters) == (0, 15, 7.5)
    assert first.error == pytest.approx(0.2) and first.map_error is None
    assert second == found[1]
    assert first.as_row() == {
        **{"layer": 0, "rounds": 3, "width": 2.0, "bias_range": 2.0, "tokens": 15},
        **{"clusters": 7.5, "most_clusters": 15, "ratio": 0.5, "error": first.error},
        "map_error": None,
    }


def test_nothing_to_measure() -> None:
    with pytest.raises(ConfigError, match=r"configs/act_detr\.py"):
        encoder_attentions(DenseEncoderAttention(channels=CHANNELS, num_heads=HEADS))
