"""Tokens and clusters that a pass itself had, for single images, batches and traced models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from detectron2.config import LazyCall as L
from detectron2.config import LazyConfig, instantiate
from detectron2.evaluation import inference_on_dataset

from efficient_detr.evaluation import (
    DataRecorder,
    DataStatistics,
    FlopsEvaluator,
    count_flops,
    describe_data,
)
from efficient_detr.meta_arch import EfficientDETR
from efficient_detr.modeling.attention.clustered import clustered_attentions, exact_attention
from efficient_detr.ops.lsh_clustering import ClusterAssignment
from tests.tiny_models import PatchBackbone, image_input, tiny_model, with_noise

ACT = Path(__file__).parents[2] / "configs" / "common" / "models" / "act_detr.py"
# 64 x 96 pixels at stride 32.
IMAGE, TOKENS, HEADS = (64, 96), 6, 2


def clustered_model(**arguments: Any) -> EfficientDETR:
    """A tiny DETR whose two encoder layers cluster whatever they get, unless told otherwise."""
    sizes: dict[str, Any] = dict(
        backbone=L(PatchBackbone)(widths=[8, 12, 16]),
        in_channels=(16,),
        num_classes=5,
        channels=16,
        num_heads=HEADS,
        hidden_channels=24,
        encoder_layers=2,
        decoder_layers=1,
        num_queries=4,
        rounds=2,
        width=2.0,
        min_tokens=0,
        max_cluster_ratio=1.0,
    )
    config = LazyConfig.load(str(ACT), "act_detr")(**{**sizes, **arguments})
    model: EfficientDETR = with_noise(instantiate(config), 0.5).eval()
    return model


def hashed(model: EfficientDETR) -> list[ClusterAssignment]:
    """What the clusterings of the queries return from now on."""
    found: list[ClusterAssignment] = []
    for attention in clustered_attentions(model):
        assert attention.query_clustering is not None
        attention.query_clustering.register_forward_hook(
            lambda module, inputs, clusters: found.append(clusters)
        )
    return found


def test_clusters_are_those_of_the_counted_pass() -> None:
    model = clustered_model()
    found = hashed(model)
    data = count_flops(model, [image_input(*IMAGE)]).data
    assert len(found) == 2
    for layer, clusters in enumerate(found):
        number = float(clusters.num_clusters.double().mean())
        assert 1 <= number <= TOKENS
        assert data[f"clusters-encoder-{layer}"] == pytest.approx(number)
        assert data[f"most-clusters-encoder-{layer}"] == int(clusters.num_clusters.max())
        assert data[f"cluster-ratio-encoder-{layer}"] == pytest.approx(number / TOKENS)
        assert data[f"dense-encoder-{layer}"] == 0
    assert data["tokens-total"] == TOKENS
    assert len(data) == 9


@pytest.mark.parametrize(
    ("arguments", "is_hashed"),
    [({"min_tokens": TOKENS + 1}, False), ({"max_cluster_ratio": 0.0}, True)],
)
def test_dense_layers_say_so(arguments: dict[str, Any], is_hashed: bool) -> None:
    """The encoder costs what exact attention costs, plus the hashing if there was any."""
    model, image = clustered_model(**arguments), image_input(*IMAGE)
    count = count_flops(model, [image])
    assert [count.data[f"dense-encoder-{layer}"] for layer in (0, 1)] == [1, 1]
    assert ("clusters-encoder-0" in count.data) is is_hashed
    hashing = 2 * TOKENS * 16 * 2 if is_hashed else 0  # layers, tokens, channels, rounds
    with exact_attention(model):
        exact = count_flops(model, [image])
    assert exact.data["dense-encoder-0"] == 1
    assert count.stages["encoder"] == exact.stages["encoder"] + hashing


def test_gflops_follow_from_the_head_with_most_clusters() -> None:
    model, image = clustered_model(rounds=2, width=0.5), image_input(128, 192)
    tokens, channels, rounds = 24, 16, 2
    count = count_flops(model, [image])
    with exact_attention(model):
        expected = count_flops(model, [image]).stages["encoder"]
    data = count.data
    assert data["most-clusters-encoder-1"] > data["clusters-encoder-1"]  # or the mean would do
    for layer in (0, 1):
        most = data[f"most-clusters-encoder-{layer}"]
        # Hashing, adding up the members, and both products of attention for fewer rows.
        expected += tokens * channels * (rounds + 1 + 2 * (most - tokens))
    assert count.stages["encoder"] == expected
    assert count.uncounted["efficient_detr::lsh_group"] == 2


def test_clustered_keys_have_names_of_their_own() -> None:
    data = count_flops(clustered_model(key_rounds=1), [image_input(*IMAGE)]).data
    assert 0 < data["key-cluster-ratio-encoder-1"] <= 1
    assert data["key-clusters-encoder-1"] == pytest.approx(
        TOKENS * data["key-cluster-ratio-encoder-1"]
    )


def test_each_image_of_a_batch_counts_once() -> None:
    """Padding joins no cluster, so an image has the same clusters alone and in a batch."""
    model = clustered_model()
    images = [image_input(64, 96), image_input(32, 64)]

    def means(batches: list[list[dict[str, Any]]]) -> dict[str, float]:
        recorder = DataRecorder(model)
        recorder.start()
        with torch.no_grad():
            for batch in batches:
                model(batch)
        recorder.stop()
        return recorder.statistics().means()

    together, alone = means([images]), means([[image] for image in images])
    assert together.pop("tokens-total") == TOKENS
    assert alone.pop("tokens-total") == (TOKENS + 2) / 2
    assert together.keys() == alone.keys()
    assert together["cluster-ratio-encoder-0"] == pytest.approx(alone["cluster-ratio-encoder-0"])


def test_kept_tokens_are_those_of_the_counted_pass() -> None:
    # 8 x 12 + 4 x 6 + 2 x 3 + 1 x 2 tokens; the last layer updates half as many as the first.
    data = count_flops(tiny_model("focus_detr"), [image_input(*IMAGE)]).data
    assert data["tokens-total"] == 128
    assert 0 < data["tokens-encoder-1"] < data["tokens-encoder-0"] <= 128
    assert set(data) == {"tokens-total", "tokens-encoder-0", "tokens-encoder-1"}


def test_evaluation_reports_clusters_and_heads() -> None:
    model = clustered_model()
    batches = [[image_input(*IMAGE)], [image_input(*IMAGE)]]
    flops = inference_on_dataset(model, batches, FlopsEvaluator(model, num_images=1))["flops"]
    assert flops["GFLOPs-heads"] > 0
    assert flops["dense-encoder-0"] == 0
    assert 0 < flops["cluster-ratio-encoder-0"] <= 1
    assert not any(
        attention.query_clustering._forward_hooks  # type: ignore[union-attr]
        for attention in clustered_attentions(model)
    )


def test_means_are_of_the_images_that_have_a_value() -> None:
    """An image that was not hashed has no clusters."""
    first, second = DataStatistics(), DataStatistics()
    first.add("clusters-encoder-0", [2.5, 3.5])
    first.add("dense-encoder-0", [0, 0])
    second.add("dense-encoder-0", [1, 1])
    first.merge(second)
    means = first.means()
    assert means == {"clusters-encoder-0": 3, "dense-encoder-0": 0.5}
    assert describe_data(means) == "clusters-encoder-0 3.0, dense-encoder-0 0.5"
