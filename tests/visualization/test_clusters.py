"""Pictures of clusters: what is coloured, what stays grey, and the numbers behind the curves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image as PillowImage

from efficient_detr.errors import UserError
from efficient_detr.evaluation.clusters import ClusterMeasurement, Hashing
from efficient_detr.modeling.attention.clustered import (
    ClusteredEncoderAttention,
)
from efficient_detr.modeling.attention.token_clustering import TokenClustering
from efficient_detr.visualization.clusters import (
    ClusterExample,
    ClusterRecorder,
    cluster_curves_figure,
    clusters_figure,
    draw_clusters,
    save_cluster_curves,
    save_clusters,
)
from tests.tiny_models import random_tokens

IDS = np.array([[0, 0, 1], [2, 1, 3]])  # 2 and 3 are alone
GREY_IMAGE = np.full((20, 30, 3), 100, dtype=np.uint8)


def test_tokens_of_a_cluster_share_a_colour() -> None:
    picture = draw_clusters(GREY_IMAGE, IDS, longer_side=300)
    assert picture.shape == (200, 300, 3)
    cells = picture.reshape(2, 100, 3, 100, 3).transpose(0, 2, 1, 3, 4).reshape(6, -1, 3)
    assert (cells == cells[:, :1]).all()  # each cell has one colour
    colours = [tuple(cell[0].tolist()) for cell in cells]
    assert colours[0] == colours[1] and colours[2] == colours[4] != colours[0]
    for alone in (colours[3], colours[5]):
        assert alone == (40, 40, 40)
    assert len(set(colours[0])) > 1  # not grey


def test_all_alone() -> None:
    picture = draw_clusters(GREY_IMAGE, np.arange(6).reshape(2, 3), longer_side=300)
    assert (picture == 40).all()


def test_figure_and_file(tmp_path: Path) -> None:
    examples = [ClusterExample(GREY_IMAGE, IDS, layer=2, head=5)] * 2
    texts = [
        text.get_text()
        for axis in clusters_figure(examples).axes
        for text in (axis.title, *axis.texts)
    ]
    assert texts.count("layer 2, head 5") == 2
    assert "4 clusters of 6 tokens, 2 of one token (grey)" in texts
    path = save_clusters(examples, tmp_path / "new" / "clusters.png")
    assert PillowImage.open(path).size[0] > 500
    assert [file.name for file in path.parent.iterdir()] == ["clusters.png"]


# From a model ------------------------------------------------------------------------------------


def attention_of(part: str = "query_clustering") -> ClusteredEncoderAttention:
    clustering = TokenClustering(head_channels=8, rounds=2, width=2.0)
    parts: dict[str, Any] = {part: clustering}
    attention = ClusteredEncoderAttention(channels=16, num_heads=2, **parts).eval()
    torch.nn.init.normal_(attention.in_proj_weight, std=0.5)
    return attention


def test_recorded_clusters_are_those_of_the_image() -> None:
    """Of 6 x 8 cells, the image covers 5 x 7; the rest is padding."""
    attention = attention_of()
    tokens = random_tokens([(6, 8), (3, 4)], channels=16, sizes=[(40, 56)])
    given = []
    assert attention.query_clustering is not None
    attention.query_clustering.register_forward_hook(lambda m, a, output: given.append(output))
    with ClusterRecorder(attention, 0, 1) as recorder:
        attention(
            tokens.features, tokens.positions, tokens.reference_points, tokens, tokens.padding_mask
        )
        assert attention.exact
    example = recorder.example(GREY_IMAGE)
    expected = given[0].ids[0, 1, :48].reshape(6, 8)[:5, :7]
    assert np.array_equal(example.ids, expected.numpy())
    assert (example.layer, example.head) == (0, 1)
    assert not attention.exact and not attention._forward_hooks


def test_what_cannot_be_drawn() -> None:
    attention = attention_of()
    with pytest.raises(UserError, match="no layer 1: clustered layers are 0 to 0"):
        ClusterRecorder(attention, 1, 0)
    with pytest.raises(UserError, match="no head 2: heads are 0 to 1"):
        ClusterRecorder(attention, 0, 2)
    with pytest.raises(UserError, match="keys only"):
        ClusterRecorder(attention_of("key_clustering"), 0, 0)
    with pytest.raises(UserError, match="No clusters to draw"):
        ClusterRecorder(attention, 0, 0).example(GREY_IMAGE)


# Curves ------------------------------------------------------------------------------------------


def measured(layer: int, rounds: int, width: float, ratio: float) -> ClusterMeasurement:
    return ClusterMeasurement(layer, Hashing(rounds, width), 100, 50, 60, ratio, 1 - ratio)


def test_curves_are_means_over_layers(tmp_path: Path) -> None:
    found = [
        *(measured(0, 16, 8.0, 0.2), measured(1, 16, 8.0, 0.4)),
        *(measured(0, 8, 8.0, 0.1), measured(0, 8, 4.0, 0.9)),
    ]
    ratio, error = cluster_curves_figure(found).axes
    lines = {str(line.get_label()): line.get_xydata().tolist() for line in ratio.get_lines()}
    assert lines.keys() == {"width 4, bias up to 1", "width 8, bias up to 1"}
    np.testing.assert_allclose(lines["width 8, bias up to 1"], [[8, 0.1], [16, 0.3]])
    np.testing.assert_allclose(error.get_lines()[1].get_xydata(), [[8, 0.9], [16, 0.7]])
    path = save_cluster_curves(found, tmp_path / "curves.png")
    assert PillowImage.open(path).size[0] > 500
