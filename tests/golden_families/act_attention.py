"""Fixtures of clustered attention (ACT) by itself: hash keys, clusters, attention and gradients.

Rows of a fixture are those of (B, H), flattened; its queries are scaled already.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from efficient_detr.modeling.attention.clustered import (
    ClusteredAttention,
    TokenClustering,
    exact_attention,
)
from efficient_detr.ops import library
from efficient_detr.ops.lsh_clustering import (
    HashProjections,
    cluster_broadcast,
    cluster_mean,
    cluster_tokens,
    distinct_multipliers,
    group_by_key,
    hash_keys,
    published_multipliers,
)
from tests.golden_families.fixture import FORWARD, Comparison

# Tolerance of gradients, relative to the largest element.
GRADIENTS = 1e-4


@dataclass(frozen=True)
class Case:
    """One setting of a fixture.

    Attributes:
        comparison: the expected tensors.
        name: of the case.
    """

    comparison: Comparison
    name: str

    @property
    def info(self) -> dict[str, Any]:
        return self.comparison.fixture.info["cases"][self.name]

    @property
    def clustered(self) -> list[str]:
        """The sides that are clustered: queries, keys or both."""
        return [side for side in "qk" if self.info[f"group_{side.upper()}"]]

    def has(self, name: str) -> bool:
        return self.comparison.has(f"{self.name}/{name}")

    def expect(self, name: str) -> Tensor:
        return self.comparison.expect(f"{self.name}/{name}")

    def rows(self, name: str) -> Tensor:
        """A tensor with its rows split into B and H."""
        return self.expect(name).unflatten(0, (self.comparison.fixture.config["B"], -1))

    def close(self, name: str, actual: Tensor, atol: float, rtol: float) -> None:
        self.comparison.close(f"{self.name}/{name}", actual.flatten(0, 1), atol, rtol)

    def equal(self, name: str, actual: Tensor) -> None:
        self.comparison.equal(f"{self.name}/{name}", actual.flatten(0, 1))

    def projections(self, side: str, *, published: bool) -> HashProjections:
        directions, bias = self.expect(f"{side}_proj")[0], self.expect(f"{side}_bias")[0, :, 0]
        make = published_multipliers if published else distinct_multipliers
        return HashProjections(directions, bias, self.info["r"], make(directions.shape[1]))


def compare(comparison: Comparison) -> None:
    """Every case, with every implementation of the operators that this machine has."""
    for implementation in ("pytorch", "compiled"):
        if implementation == "pytorch" or not library.missing_reason(torch.device("cpu")):
            with mock.patch.dict(os.environ, {library.ENVIRONMENT_VARIABLE: implementation}):
                for name in comparison.fixture.info["cases"]:
                    case = Case(comparison, name)
                    for side in case.clustered:
                        compare_published_clusters(case, side)
                        compare_exact_clusters(case, side)
                    compare_attention(case)


def compare_published_clusters(case: Case, side: str) -> None:
    """Clusters by the published keys, which may mix cells."""
    points, projections = case.rows(side), case.projections(side, published=True)
    keys, cells = hash_keys(points, projections), hash_cells(points, projections)
    case.equal(f"{side}_floor", cells.transpose(2, 3))
    lowest = cells.amin(2, keepdim=True)  # published keys count from the lowest cells of a row
    case.equal(f"{side}_key", keys - (lowest * projections.multipliers).sum(-1))
    clusters = group_by_key(keys)
    case.equal(f"{side}_cluster_canonical", clusters.ids)
    assert clusters.num_clusters.flatten().tolist() == case.info[f"{side}_clusters_per_row"]
    # Theirs are numbered by key: let every token say what it sees of its own cluster.
    theirs = case.rows(f"{side}_cluster_official").long()
    counts = case.rows(f"{side}_counts_official").long()
    assert clusters.counts.shape == counts.shape
    assert clusters.counts.gather(2, clusters.ids).equal(counts.gather(2, theirs))
    prototypes = cluster_mean(points, clusters.ids, clusters.counts)
    expected = case.rows(f"{side}_prototypes_official")
    torch.testing.assert_close(
        cluster_broadcast(prototypes, clusters.ids),
        cluster_broadcast(expected, theirs),
        atol=1e-5,
        rtol=1e-5,
    )


def compare_exact_clusters(case: Case, side: str) -> None:
    """Clusters by keys that never mix cells."""
    clusters = cluster_tokens(case.rows(side), case.projections(side, published=False))
    expected = case.rows(f"{side}_cluster_exact")
    assert clusters.ids.equal(canonical(expected))
    assert clusters.num_clusters.flatten().tolist() == case.info[f"{side}_clusters_exact_per_row"]


def compare_attention(case: Case) -> None:
    """Attention between clusters, its gradients, and dense attention."""
    leaves = [case.rows(name).clone().requires_grad_() for name in "qkv"]
    attention = build_attention(case, num_heads=leaves[0].shape[1])
    padding = case.expect("key_padding_mask") if case.has("key_padding_mask") else None
    query = leaves[0] * leaves[0].shape[-1] ** 0.5  # the module scales by itself
    attend = attention.attend_heads_in_clusters
    output = attend(query, *leaves[1:], padding, padding)
    case.close("out", output, FORWARD, FORWARD)
    gradients = torch.autograd.grad(output, leaves, case.rows("upstream"), retain_graph=True)
    for name, gradient in zip("qkv", gradients, strict=True):
        largest = case.expect(f"grad_{name}").abs().max().item()
        case.close(f"grad_{name}", gradient, GRADIENTS * largest, 0.0)
    with exact_attention(attention):
        dense = attend(query, *leaves[1:], padding, padding)
    case.close("dense_out", dense, FORWARD, FORWARD)


def build_attention(case: Case, num_heads: int) -> ClusteredAttention:
    """Attention with the case's hashing, which clusters padded queries too, as published."""
    clusterings = {}
    for side in case.clustered:
        projections = case.projections(side, published=True)
        head_channels, rounds = projections.directions.shape
        clusterings[side] = TokenClustering(
            head_channels=head_channels,
            rounds=rounds,
            width=projections.width,
            multipliers=projections.multipliers,
            include_padding=True,
        )
        clusterings[side].set_projections(projections.directions, projections.bias)
    return ClusteredAttention(
        channels=num_heads * case.expect("q").shape[-1],
        num_heads=num_heads,
        query_clustering=clusterings.get("q"),
        key_clustering=clusterings.get("k"),
        temperature=case.info["softmax_temp"],
        min_tokens=0,
        max_cluster_ratio=1.0,
    )


def hash_cells(points: Tensor, projections: HashProjections) -> Tensor:
    """(B, H, N, T) cell of every token (B, H, N, D) in every round."""
    positions = points @ projections.directions + projections.bias
    return torch.floor(positions / projections.width).long()


def canonical(labels: Tensor) -> Tensor:
    """Labels of each row (the last dimension), numbered by first appearance."""
    rows = []
    for row in labels.reshape(-1, labels.shape[-1]).tolist():
        numbers: dict[int, int] = {}
        rows.append([numbers.setdefault(label, len(numbers)) for label in row])
    return torch.tensor(rows, dtype=torch.int64).reshape(labels.shape)
