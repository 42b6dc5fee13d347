"""Attention between clusters of similar tokens: the Adaptive Clustering Transformer (ACT).

Zheng et al., "End-to-End Object Detection with Adaptive Clustering Transformer", BMVC 2021.
The queries of each head are clustered by locality-sensitive hashing
(`efficient_detr.ops.lsh_clustering`), the mean of a cluster attends to all keys, and what it finds
is handed to every member. N queries in C clusters cost C / N of dense attention, plus the hashing.
Keys can be clustered as well: a mean key then stands for as many keys as its cluster has members.

The parameters are those of dense attention, so the weights of a trained DETR fit. What may differ
from image to image is decided for each image on its own, never by the batch it is part of.

Shape letters as everywhere, but in shapes with heads C counts clusters, as in `lsh_clustering`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from efficient_detr.errors import ConfigError
from efficient_detr.modeling.attention.dense import MultiHeadAttention, SelfAttention
from efficient_detr.modeling.attention.interface import EncoderAttention
from efficient_detr.modeling.attention.token_clustering import TokenClustering, hashed_queries
from efficient_detr.ops.lsh_clustering import ClusterAssignment, cluster_broadcast, cluster_mean
from efficient_detr.structures import FeatureTokens

# Where clustering pays on a CPU; measured by `tools/bench_clustered_attention.py`, see docs/act.md.
MIN_TOKENS = 500
MAX_CLUSTER_RATIO = 0.8


@dataclasses.dataclass(frozen=True)
class _Clusters:
    """Clusters of queries and of keys; None for a side that is not clustered."""

    queries: ClusterAssignment | None
    keys: ClusterAssignment | None

    def fraction_of_dense(self) -> Tensor:
        """(B,) share of the query-key products that is left, by the head with most clusters."""
        fraction = torch.ones(())
        for side in (self.queries, self.keys):
            if side is not None:
                tokens = side.ids[:, 0].ge(0).sum(1).clamp(min=1)
                fraction = fraction.to(tokens.device) * side.num_clusters.amax(1) / tokens
        return fraction

    def of_images(self, images: Tensor) -> _Clusters:
        """The clusters of the images with these indices (b,)."""
        return _Clusters(_of_images(self.queries, images), _of_images(self.keys, images))


def _of_images(clusters: ClusterAssignment | None, images: Tensor) -> ClusterAssignment | None:
    if clusters is None:
        return None
    num_clusters = clusters.num_clusters[images]
    most = int(num_clusters.max().clamp(min=1))  # other images may have had more
    return ClusterAssignment(
        clusters.ids[images], clusters.counts[images][..., :most], num_clusters
    )


class ClusteredAttention(MultiHeadAttention):
    """Multi-head attention that clusters queries, keys or both, where that is cheaper than dense.

    An image falls back to dense attention if it has fewer than `min_tokens` query tokens without
    padding, or if more than `max_cluster_ratio` of the query-key products would be left.

    Args:
        channels: C, a multiple of `num_heads`.
        num_heads: H.
        dropout: probability on the attention weights.
        query_clustering: clusters queries; None leaves them alone.
        key_clustering: clusters keys and averages their values; None leaves them alone. Padded
            keys join no cluster.
        temperature: factor of the logits. A multiplier, as in the published code: 2 is sharper.
        min_tokens: below it, nothing is hashed.
        max_cluster_ratio: clusters per token (if both sides are clustered, the product of the two
            ratios) up to which clustering is used. 1 always clusters.

    Attributes:
        exact: attend densely whatever the above says; see `exact_attention`.

    Raises:
        ConfigError: if nothing is clustered, or a clustering is made for another size of heads.
    """

    def __init__(
        self,
        *,
        channels: int,
        num_heads: int = 8,
        dropout: float = 0.0,
        query_clustering: TokenClustering | None = None,
        key_clustering: TokenClustering | None = None,
        temperature: float = 1.0,
        min_tokens: int = MIN_TOKENS,
        max_cluster_ratio: float = MAX_CLUSTER_RATIO,
    ) -> None:
        super().__init__(channels=channels, num_heads=num_heads, dropout=dropout)
        self.query_clustering = query_clustering
        self.key_clustering = key_clustering
        self.temperature = temperature
        self.min_tokens = min_tokens
        self.max_cluster_ratio = max_cluster_ratio
        self.exact = False
        if query_clustering is None and key_clustering is None:
            raise ConfigError(
                f"{type(self).__name__} clusters nothing: set query_clustering or key_clustering, "
                "or use dense attention"
            )
        for name, clustering in (("query", query_clustering), ("key", key_clustering)):
            if clustering is not None and clustering.head_channels * num_heads != channels:
                raise ConfigError(
                    f"{name}_clustering.head_channels={clustering.head_channels}, but a head has "
                    f"channels / num_heads = {channels // num_heads}: set them to the same number"
                )

    def attend_clusters(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        query_padding: Tensor | None = None,
        key_padding: Tensor | None = None,
    ) -> Tensor:
        """Attention of features (B, N, C) to (B, S, C); masks as in `attend_heads_in_clusters`."""
        heads = self.project(query, key, value)
        return self.merge(self.attend_heads_in_clusters(*heads, query_padding, key_padding))

    def attend_heads(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None
    ) -> Tensor:
        """Dense attention of heads, with the temperature; as of `MultiHeadAttention`."""
        if self.temperature != 1:
            query = query * self.temperature
        return super().attend_heads(query, key, value, mask)

    def attend_heads_in_clusters(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        query_padding: Tensor | None = None,
        key_padding: Tensor | None = None,
    ) -> Tensor:
        """Attention of heads, clustered for the images for which that pays.

        Args:
            query: (B, H, N, D), unscaled.
            key: (B, H, S, D).
            value: (B, H, S, D).
            query_padding: (B, N) bool, True on queries that nobody reads, or None.
            key_padding: (B, S) bool, True on keys that nobody sees, or None.

        Returns:
            (B, H, N, D); zero for padded queries, unless they are clustered or an image is dense.
        """
        if self.exact or query.shape[2] < self.min_tokens:
            return self._attend_densely(query, key, value, key_padding)
        clusters = self._cluster(query, key, query_padding, key_padding)
        pays = self._pays(clusters, query, query_padding)
        if all(pays):
            return self._attend_clusters(query, key, value, key_padding, clusters)
        if not any(pays):
            return self._attend_densely(query, key, value, key_padding)
        return self._attend_images(query, key, value, key_padding, clusters, pays)

    def _cluster(
        self,
        query: Tensor,
        key: Tensor,
        query_padding: Tensor | None,
        key_padding: Tensor | None,
    ) -> _Clusters:
        queries = keys = None
        if self.query_clustering is not None:
            queries = self.query_clustering(hashed_queries(query), query_padding)
        if self.key_clustering is not None:
            keys = self.key_clustering(key.detach(), key_padding)
        return _Clusters(queries, keys)

    def _pays(self, clusters: _Clusters, query: Tensor, query_padding: Tensor | None) -> list[bool]:
        """Whether to cluster, for each image."""
        tokens = torch.full(query.shape[:1], query.shape[2], device=query.device)
        if query_padding is not None:
            tokens = tokens - query_padding.sum(1)
        fraction = clusters.fraction_of_dense()
        pays = (tokens >= self.min_tokens) & (fraction <= self.max_cluster_ratio)
        flags: list[bool] = pays.tolist()
        return flags

    def _attend_densely(
        self, query: Tensor, key: Tensor, value: Tensor, key_padding: Tensor | None
    ) -> Tensor:
        visible = None if key_padding is None else ~key_padding[:, None, None]  # (B, 1, 1, S)
        return self.attend_heads(query, key, value, visible)

    def _attend_clusters(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding: Tensor | None,
        clusters: _Clusters,
    ) -> Tensor:
        mask = None if key_padding is None else ~key_padding[:, None, None]
        if clusters.keys is not None:
            ids, counts = clusters.keys.ids, clusters.keys.counts
            key, value = cluster_mean(key, ids, counts), cluster_mean(value, ids, counts)
            mask = log_shares(counts, query.dtype).unsqueeze(2)  # (B, H, 1, C)
        if clusters.queries is None:
            return self.attend_heads(query, key, value, mask)
        ids, counts = clusters.queries.ids, clusters.queries.counts
        prototypes = cluster_mean(query, ids, counts)
        return cluster_broadcast(self.attend_heads(prototypes, key, value, mask), ids)

    def _attend_images(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding: Tensor | None,
        clusters: _Clusters,
        pays: list[bool],
    ) -> Tensor:
        """Some images clustered, the others densely."""
        chosen = torch.tensor(pays, device=query.device)
        images, others = chosen.nonzero().squeeze(1), (~chosen).nonzero().squeeze(1)
        padding = (
            (None, None) if key_padding is None else (key_padding[images], key_padding[others])
        )
        attended = self._attend_clusters(
            query[images], key[images], value[images], padding[0], clusters.of_images(images)
        )
        dense = self._attend_densely(query[others], key[others], value[others], padding[1])
        order = torch.cat([images, others]).argsort()
        return torch.cat([attended, dense.to(attended.dtype)])[order]


class ClusteredEncoderAttention(ClusteredAttention, EncoderAttention):
    """Tokens attend in clusters to the unpadded tokens of all levels; see `EncoderAttention`.

    Args: as of `ClusteredAttention`.
    """

    def forward(
        self,
        query: Tensor,
        position: Tensor,
        reference_points: Tensor,
        memory: FeatureTokens,
        padding_mask: Tensor,
    ) -> Tensor:
        """Attend from tokens (B, N, C) to `memory`; returns (B, N, C)."""
        return self.attend_clusters(
            query + position,
            memory.features + memory.positions,
            memory.features,
            padding_mask,
            memory.padding_mask,
        )


class ClusteredSelfAttention(ClusteredAttention, SelfAttention):
    """Self-attention among decoder queries, in clusters; see `SelfAttention`.

    Denoising queries, whose groups must not see each other, come with an attention mask: clusters
    would mix the groups, so attention is dense then. It is dense as well below `min_tokens`
    queries, which is where most decoders are: set `min_tokens` to cluster a few hundred of them.

    Args: as of `ClusteredAttention`.
    """

    def forward(
        self, query: Tensor, position: Tensor, attention_mask: Tensor | None = None
    ) -> Tensor:
        """Attend; arguments and result as of `SelfAttention`."""
        if attention_mask is not None:
            return super().forward(query, position, attention_mask)
        located = query + position
        return self.attend_clusters(located, located, query)


def log_shares(counts: Tensor, dtype: torch.dtype) -> Tensor:
    """What makes a mean key weigh as much as its members: exp(logit + log n) = n exp(logit).

    Args:
        counts: (B, H, C) members of each cluster.
        dtype: of the result.

    Returns:
        (B, H, C) logarithms of n / max n, -inf for no members. The softmax does not see the
        constant, and half precision is finest near 0, where the largest clusters are.
    """
    members = counts.to(torch.promote_types(dtype, torch.float32))
    return (members / members.amax(-1, keepdim=True).clamp(min=1)).log().to(dtype)


@contextmanager
def exact_attention(module: nn.Module) -> Iterator[None]:
    """Within the `with` block, all clustered attention below `module` is dense.

    Blocks may be nested; an exception leaves the module as it was.

    Args:
        module: any module, such as a detector.
    """
    attentions = clustered_attentions(module)
    before = [attention.exact for attention in attentions]
    for attention in attentions:
        attention.exact = True
    try:
        yield
    finally:
        for attention, exact in zip(attentions, before, strict=True):
            attention.exact = exact


def clustered_attentions(module: nn.Module) -> list[ClusteredAttention]:
    """All clustered attention in a module, in the order of its definition."""
    return [part for part in module.modules() if isinstance(part, ClusteredAttention)]
