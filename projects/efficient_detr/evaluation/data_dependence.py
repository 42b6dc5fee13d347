"""What a model's cost depends on besides the size of the image: kept tokens and clusters.

They are read where they arise, by hooks, in whatever forward pass the model makes.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from efficient_detr.modeling.attention.clustered import ClusteredAttention, clustered_attentions
from efficient_detr.ops.lsh_clustering import ClusterAssignment
from efficient_detr.structures import DetectorOutput


@dataclass
class DataStatistics:
    """Sums over images; means are taken after adding up all processes.

    Names are ``tokens-total`` (tokens of all levels, padding of the batch included),
    ``tokens-encoder-<layer>`` (those that a layer updated), and for the i-th clustered attention of
    a stage ``clusters-<stage>-<i>`` (mean over the heads), ``most-clusters-<stage>-<i>`` (of the
    head that has most of them: all heads are padded to it, so it decides what attention costs),
    ``cluster-ratio-<stage>-<i>`` (C / N, clusters divided by tokens, mean over the heads) and
    ``dense-<stage>-<i>`` (1 if the image fell back to dense attention, else 0). Where nothing was
    hashed, there are no clusters. If queries and keys are clustered, the names of keys are
    ``key-clusters-...``, ``key-most-clusters-...`` and ``key-cluster-ratio-...``.

    Attributes:
        sums: name -> sum over images.
        images: name -> number of images in the sum.
    """

    sums: Counter[str] = field(default_factory=Counter)
    images: Counter[str] = field(default_factory=Counter)

    def add(self, name: str, values: list[float]) -> None:
        """Adds one value an image."""
        self.sums[name] += sum(values)  # type: ignore[assignment]  # a Counter of floats
        self.images[name] += len(values)

    def merge(self, other: DataStatistics) -> None:
        """Adds what another process has seen."""
        self.sums.update(other.sums)
        self.images.update(other.images)

    def means(self) -> OrderedDict[str, float]:
        """Means per image, in the order of the first occurrence; empty without images."""
        return OrderedDict(
            (name, float(self.sums[name]) / number)
            for name, number in self.images.items()
            if number
        )


class DataRecorder:
    """Listens to a model between `start` and `stop`.

    Args:
        model: a meta-architecture; without a ``detector`` there is nothing to hear.

    Attributes:
        paused: do not listen for now.
    """

    def __init__(self, model: nn.Module) -> None:
        detector = getattr(model, "detector", None)
        self._detector = detector if isinstance(detector, nn.Module) else None
        self.paused = False
        self._statistics = DataStatistics()
        self._hooks: list[Any] = []
        # Tensors of the present pass. They are read after it, because reading them earlier would
        # add to the graph of a model that is being traced.
        self._hashed: dict[nn.Module, ClusterAssignment] = {}
        self._attended: list[_Attended] = []
        self._detected: list[DetectorOutput] = []

    def start(self) -> None:
        """Starts to listen, with empty statistics."""
        self.stop()
        self._statistics = DataStatistics()
        self._hashed, self._attended, self._detected = {}, [], []
        if self._detector is None:
            return
        for name, attention in _named_attentions(self._detector):
            for clustering in (attention.query_clustering, attention.key_clustering):
                if clustering is not None:
                    self._hooks.append(clustering.register_forward_hook(self._hear_clustering))
            hear = partial(self._hear_attention, name)
            self._hooks.append(attention.register_forward_hook(hear))
        self._hooks.append(self._detector.register_forward_hook(self._hear_detector))

    def stop(self) -> None:
        """Stops to listen; what was heard stays."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    def statistics(self) -> DataStatistics:
        """What was heard since `start`; not to be called while the model is traced."""
        for output in self._detected:
            for name, values in _token_numbers(output):
                self._statistics.add(name, values)
        for attended in self._attended:
            for name, values in attended.measurements():
                self._statistics.add(name, values)
        self._attended, self._detected = [], []
        return self._statistics

    def _hear_clustering(self, clustering: nn.Module, inputs: Any, found: Any) -> None:
        if not self.paused:
            self._hashed[clustering] = found

    def _hear_attention(
        self, name: str, attention: ClusteredAttention, inputs: Any, output: Tensor
    ) -> None:
        if self.paused:
            return
        sides = {"": attention.query_clustering, "key-": attention.key_clustering}
        hashed = {
            side: self._hashed.pop(clustering)
            for side, clustering in sides.items()
            if clustering is not None and clustering in self._hashed
        }
        self._attended.append(_Attended(name, attention, output, hashed))

    def _hear_detector(self, detector: nn.Module, inputs: Any, output: Any) -> None:
        if isinstance(output, DetectorOutput) and not self.paused:
            self._detected.append(output)
        if not torch.jit.is_tracing():
            self.statistics()  # rather than keep tensors


@dataclass(frozen=True)
class _Attended:
    """One call of a clustered attention.

    Attributes:
        name: of the attention.
        attention: that was called.
        output: (B, N, C).
        hashed: the clusters of "" (queries) and "key-" (keys), where they were hashed.
    """

    name: str
    attention: ClusteredAttention
    output: Tensor
    hashed: dict[str, ClusterAssignment]

    def measurements(self) -> Iterator[tuple[str, list[float]]]:
        """Names as of `DataStatistics`, and a value for each image."""
        for side, clusters in self.hashed.items():
            number = clusters.num_clusters.double()  # (B, H)
            yield f"{side}clusters-{self.name}", number.mean(1).tolist()
            yield f"{side}most-clusters-{self.name}", number.amax(1).tolist()
            ratio = number / _hashed_tokens(clusters)[:, None]
            yield f"{side}cluster-ratio-{self.name}", ratio.mean(1).tolist()
        yield f"dense-{self.name}", self._is_dense().double().tolist()

    def _is_dense(self) -> Tensor:
        """(B,) bool: what `ClusteredAttention` decides by the head with most clusters."""
        batch = len(self.output)
        if not self.hashed:
            return torch.ones(batch, dtype=torch.bool)
        fraction = torch.ones(batch, dtype=torch.double)
        dense = torch.zeros(batch, dtype=torch.bool)
        for side, clusters in self.hashed.items():
            tokens = _hashed_tokens(clusters).cpu()
            fraction *= clusters.num_clusters.amax(1).cpu() / tokens
            dense |= (tokens < self.attention.min_tokens) & (side == "")
        return dense | (fraction > self.attention.max_cluster_ratio)


def _hashed_tokens(clusters: ClusterAssignment) -> Tensor:
    """(B,) number of tokens that could join a cluster, at least 1."""
    return clusters.ids[:, 0].ge(0).sum(1).clamp(min=1)


def _token_numbers(output: DetectorOutput) -> Iterator[tuple[str, list[float]]]:
    batch = len(output.prediction.logits)
    tokens = sum(int(height) * int(width) for height, width in output.memory.spatial_shapes)
    yield "tokens-total", [tokens] * batch
    kept = [] if output.selection is None else output.selection.kept_tokens().tolist()
    for layer, numbers in enumerate(kept):
        yield f"tokens-encoder-{layer}", numbers


def _named_attentions(detector: nn.Module) -> Iterator[tuple[str, ClusteredAttention]]:
    """Clustered attentions with the name and number within their stage."""
    for stage, module in detector.named_children():
        for index, attention in enumerate(clustered_attentions(module)):
            yield f"{stage}-{index}", attention
