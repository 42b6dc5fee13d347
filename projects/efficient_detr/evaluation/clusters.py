"""How many clusters hashing makes of real queries, and what they do to attention, layer by layer.

The number of clusters follows from the length and the directions of the queries, which only trained
weights on real images have. So rounds and width of the hashing are chosen by measuring.
"""

from __future__ import annotations

import dataclasses
import inspect
import statistics
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from efficient_detr.errors import ConfigError
from efficient_detr.modeling.attention.clustered import (
    ClusteredAttention,
    ClusteredEncoderAttention,
    exact_attention,
)
from efficient_detr.modeling.attention.token_clustering import TokenClustering, hashed_queries
from efficient_detr.ops.lsh_clustering import ClusterAssignment, cluster_broadcast, cluster_mean
from efficient_detr.structures import FeatureTokens


@dataclass(frozen=True)
class Hashing:
    """One way to hash.

    Attributes:
        rounds: rounds of hashing.
        width: of a cell.
        bias_range: of the hash biases.
    """

    rounds: int
    width: float
    bias_range: float = 1.0

    def clustering(self, head_channels: int, device: torch.device, seed: int) -> TokenClustering:
        """A clustering that hashes so, for heads of this many channels."""
        clustering = TokenClustering(
            head_channels=head_channels,
            rounds=self.rounds,
            width=self.width,
            bias_range=self.bias_range,
            seed=seed,
        )
        return clustering.to(device)


@dataclass(frozen=True)
class ClusterMeasurement:
    """Clusters of the queries of one encoder layer, of one image or the mean of several.

    Attributes:
        layer: index of the layer among those with clustered attention.
        hashing: how the queries were hashed.
        tokens: queries without padding.
        clusters: mean over the heads.
        most_clusters: of the head that has most of them.
        ratio: C / N, clusters divided by tokens.
        error: Euclidean distance of the output of all heads from that of dense attention, divided
            by the length of the latter.
        map_error: mean squared error of the attention weights, or None if it was not asked for.
    """

    layer: int
    hashing: Hashing
    tokens: float
    clusters: float
    most_clusters: float
    ratio: float
    error: float
    map_error: float | None = None

    def as_row(self) -> dict[str, Any]:
        """A flat dict, for tables and files."""
        row = dataclasses.asdict(self)
        return {"layer": row.pop("layer"), **row.pop("hashing"), **row}


@dataclass(frozen=True)
class EncoderInput:
    """What an encoder layer's attention is called with.

    Attributes:
        heads: queries (B, H, N, D), keys and values (B, H, S, D).
        padding_mask: (B, N) bool, True on queries that nobody reads.
        memory: the tokens attended to.
    """

    heads: tuple[Tensor, Tensor, Tensor]
    padding_mask: Tensor
    memory: FeatureTokens

    @classmethod
    def of_call(cls, attention: ClusteredEncoderAttention, args: Any, kwargs: Any) -> EncoderInput:
        """What the attention makes of the arguments of its `forward`."""
        given = inspect.signature(attention.forward).bind(*args, **kwargs).arguments
        memory: FeatureTokens = given["memory"]
        heads = attention.project(
            given["query"] + given["position"],
            memory.features + memory.positions,
            memory.features,
        )
        return cls(heads, given["padding_mask"], memory)


def encoder_attentions(model: nn.Module) -> list[ClusteredEncoderAttention]:
    """The clustered attention of the encoder layers.

    Raises:
        ConfigError: if there is none.
    """
    found = [part for part in model.modules() if isinstance(part, ClusteredEncoderAttention)]
    if not found:
        raise ConfigError(
            "model.detector.encoder has no clustered attention to measure: use a config such as "
            "configs/act_detr.py, which takes the weights of dense DETR"
        )
    return found


@contextmanager
def measuring_clusters(
    model: nn.Module, hashings: Sequence[Hashing], *, attention_maps: bool = False
) -> Iterator[list[ClusterMeasurement]]:
    """Measures, within the `with` block, every image that the model sees.

    Attention itself is dense within the block, so that the queries of a layer do not suffer from
    the clusters of the layers before it. Layer i hashes with the seed i.

    Args:
        model: a model with `ClusteredEncoderAttention`.
        hashings: ways to hash the queries, all of which are tried. Keys are not clustered.
        attention_maps: compare the attention weights as well, which takes as long as the rest.

    Yields:
        The list to which measurements are added: for each image, layer and hashing one.
    """
    found: list[ClusterMeasurement] = []
    with ExitStack() as stack:
        stack.enter_context(exact_attention(model))
        for layer, attention in enumerate(encoder_attentions(model)):
            meter = _Meter(layer, hashings, attention_maps, found)
            handle = attention.register_forward_hook(meter, with_kwargs=True)
            stack.callback(handle.remove)
        yield found


def mean_measurements(measurements: Sequence[ClusterMeasurement]) -> list[ClusterMeasurement]:
    """The mean over images for each layer and hashing, in the order of their first occurrence."""
    groups: dict[tuple[int, Hashing], list[ClusterMeasurement]] = {}
    for measurement in measurements:
        groups.setdefault((measurement.layer, measurement.hashing), []).append(measurement)
    return [_mean(group) for group in groups.values()]


def _mean(group: Sequence[ClusterMeasurement]) -> ClusterMeasurement:
    def mean(name: str) -> float:
        return statistics.fmean(getattr(one, name) for one in group)

    return ClusterMeasurement(
        layer=group[0].layer,
        hashing=group[0].hashing,
        tokens=mean("tokens"),
        clusters=mean("clusters"),
        most_clusters=mean("most_clusters"),
        ratio=mean("ratio"),
        error=mean("error"),
        map_error=None if group[0].map_error is None else mean("map_error"),
    )


class _Meter:
    """Forward hook of one layer's attention."""

    def __init__(
        self,
        layer: int,
        hashings: Sequence[Hashing],
        attention_maps: bool,
        found: list[ClusterMeasurement],
    ) -> None:
        self.layer, self.hashings = layer, hashings
        self.attention_maps, self.found = attention_maps, found

    @torch.no_grad()
    def __call__(
        self, attention: ClusteredEncoderAttention, args: Any, kwargs: Any, output: Tensor
    ) -> None:
        call = EncoderInput.of_call(attention, args, kwargs)
        for image in range(len(call.padding_mask)):
            # Without padding, which is no part of the image.
            queries, keys = ~call.padding_mask[image], ~call.memory.padding_mask[image]
            heads = [
                part[image : image + 1, :, kept]
                for part, kept in zip(call.heads, (queries, keys, keys), strict=True)
            ]
            self.found += self._measure(attention, *heads)

    def _measure(
        self, attention: ClusteredAttention, query: Tensor, key: Tensor, value: Tensor
    ) -> Iterator[ClusterMeasurement]:
        dense = attention.attend_heads(query, key, value)
        for hashing in self.hashings:
            clustering = hashing.clustering(query.shape[-1], query.device, self.layer)
            clusters: ClusterAssignment = clustering(hashed_queries(query))
            prototypes = cluster_mean(query, clusters.ids, clusters.counts)
            attended = attention.attend_heads(prototypes, key, value)
            difference = cluster_broadcast(attended, clusters.ids) - dense
            count = float(clusters.num_clusters.double().mean())
            tokens = query.shape[2]
            yield ClusterMeasurement(
                layer=self.layer,
                hashing=hashing,
                tokens=tokens,
                clusters=count,
                most_clusters=int(clusters.num_clusters.max()),
                ratio=count / tokens,
                error=float(difference.norm() / dense.norm()),
                map_error=self._map_error(query, prototypes, key, clusters.ids, attention),
            )

    def _map_error(
        self,
        query: Tensor,
        prototypes: Tensor,
        key: Tensor,
        ids: Tensor,
        attention: ClusteredAttention,
    ) -> float | None:
        """Mean squared difference of attention weights, head by head to save memory."""
        if not self.attention_maps:
            return None
        scale = attention.temperature * query.shape[-1] ** -0.5
        errors = []
        for head in range(query.shape[1]):
            exact = (scale * query[0, head] @ key[0, head].T).softmax(-1)
            clustered = (scale * prototypes[0, head] @ key[0, head].T).softmax(-1)
            errors.append(float((clustered[ids[0, head]] - exact).square().mean()))
        return statistics.fmean(errors)
