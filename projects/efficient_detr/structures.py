"""The data that flows through the shared detector, as typed dataclasses.

Shape letters, the same everywhere: B images, S tokens over all levels, L levels, H heads,
P sampling points, C channels, Q queries, T ground-truth boxes, K classes, N active tokens.
Boxes are (cx, cy, w, h), normalised to the unpadded image; points are (x, y); spatial shapes are
Python integers (H_l, W_l), finest level first. Padding masks are True on padding.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor

SpatialShapes = list[tuple[int, int]]


@dataclass(frozen=True)
class Targets:
    """Ground truth of one image.

    Attributes:
        labels: (T,) int64 class indices in [0, K).
        boxes: (T, 4) boxes (cx, cy, w, h) in [0, 1] of the unpadded image.
        image_size: (height, width) of the unpadded network input, in pixels.
    """

    labels: Tensor
    boxes: Tensor
    image_size: tuple[int, int]


@dataclass(frozen=True)
class ActiveTokens:
    """The tokens that one encoder layer updates.

    Attributes:
        features: (B, N, C) token features.
        positions: (B, N, C) position embeddings.
        reference_points: (B, N, L, 2) points (x, y), scaled by the valid ratio of each level.
        padding_mask: (B, N) bool, True on padding and on rows that fill up a smaller selection.
        foreground_logits: (B, N) score of the token selection, or None if all tokens are active.
        object_scores: (B, N) ranking used by object self-attention, or None.
    """

    features: Tensor
    positions: Tensor
    reference_points: Tensor
    padding_mask: Tensor
    foreground_logits: Tensor | None = None
    object_scores: Tensor | None = None


@dataclass(frozen=True)
class FeatureTokens:
    """Feature maps of all levels as one token sequence.

    Attributes:
        features: (B, S, C) token features, level after level, row-major inside a level.
        positions: (B, S, C) position embeddings.
        padding_mask: (B, S) bool, True on padding.
        spatial_shapes: (H_l, W_l) of each level.
        image_sizes: (B, 2) unpadded (width, height) of the network input, in pixels.
        valid_ratios: (B, L, 2) unpadded fraction (width, height) of each level, in (0, 1].
        reference_points: (B, S, L, 2) token centres (x, y) as seen from each level; above 1 on
            padding.
    """

    features: Tensor
    positions: Tensor
    padding_mask: Tensor
    spatial_shapes: SpatialShapes
    image_sizes: Tensor
    valid_ratios: Tensor
    reference_points: Tensor

    @property
    def level_sizes(self) -> list[int]:
        """Number of tokens of each level."""
        return [height * width for height, width in self.spatial_shapes]

    def split(self, tensor: Tensor | None = None) -> list[Tensor]:
        """Cut a (B, S, ...) tensor, by default the features, into one (B, S_l, ...) a level."""
        return list((self.features if tensor is None else tensor).split(self.level_sizes, dim=1))

    def level(self, index: int) -> Tensor:
        """Features of one level as a map (B, C, H_l, W_l)."""
        height, width = self.spatial_shapes[index]
        return self.split()[index].transpose(1, 2).unflatten(2, (height, width))

    def with_features(self, features: Tensor) -> FeatureTokens:
        """The same tokens with other features (B, S, C)."""
        return dataclasses.replace(self, features=features)

    def all_active(self) -> ActiveTokens:
        """Every token, to be updated by a layer."""
        return ActiveTokens(self.features, self.positions, self.reference_points, self.padding_mask)

    def gather(self, indices: Tensor, counts: Tensor) -> ActiveTokens:
        """The tokens at `indices` (B, N), in that order.

        Args:
            indices: (B, N) token indices.
            counts: (B,) number of leading rows of each image that belong to it; later rows fill up
                the batch and are marked as padding.
        """
        rows = torch.arange(indices.shape[1], device=indices.device)
        return ActiveTokens(
            gather_tokens(self.features, indices),
            gather_tokens(self.positions, indices),
            gather_tokens(self.reference_points, indices),
            gather_tokens(self.padding_mask, indices) | (rows >= counts[:, None]),
        )

    def scatter(self, indices: Tensor, features: Tensor, counts: Tensor) -> FeatureTokens:
        """Write updated features back.

        Args:
            indices: (B, N) token indices, best first, without repetition in an image.
            features: (B, N, C) their new features.
            counts: (B,) number of leading rows of each image that are written; later rows are
                dropped and their tokens keep the present features.
        """
        rows = torch.arange(indices.shape[1], device=indices.device)
        kept = (rows < counts[:, None]).unsqueeze(-1)  # (B, N, 1)
        features = features.to(self.features.dtype)
        features = torch.where(kept, features, gather_tokens(self.features, indices))
        index = indices.unsqueeze(-1).expand_as(features)
        return self.with_features(self.features.scatter(1, index, features))


def gather_tokens(tensor: Tensor, indices: Tensor) -> Tensor:
    """Pick rows of a (B, S, ...) tensor by indices (B, N); returns (B, N, ...)."""
    index = indices.reshape(indices.shape + (1,) * (tensor.dim() - 2))
    return tensor.gather(1, index.expand(-1, -1, *tensor.shape[2:]))


@dataclass(frozen=True)
class TokenSelection:
    """Which tokens each encoder layer updates, and the scores behind the choice.

    Attributes:
        indices: for each encoder layer (B, N_i) token indices, best first.
        counts: (B,) number of leading rows that belong to an image; rows beyond are fillers that
            keep the batch rectangular and are never written back.
        scores: (B, S) foreground logits with padding at the lowest score of the batch.
        level_logits: for each level the raw foreground logits (B, S_l), to be supervised.
    """

    indices: list[Tensor]
    counts: Tensor
    scores: Tensor
    level_logits: list[Tensor]

    def kept_tokens(self) -> Tensor:
        """(layers, B) number of tokens that each layer updates in each image."""
        limits = torch.tensor([i.shape[1] for i in self.indices], device=self.counts.device)
        return torch.minimum(limits[:, None], self.counts[None])


@dataclass(frozen=True)
class EncoderOutput:
    """Refined tokens and the selection that led to them.

    Attributes:
        memory: the tokens that the decoder attends to.
        selection: the token selection, or None if every token is updated.
        layer_features: for each layer of an encoder with a selection the updated tokens
            (B, N_i, C), in the order of the selection's indices; else empty.
    """

    memory: FeatureTokens
    selection: TokenSelection | None = None
    layer_features: list[Tensor] = dataclasses.field(default_factory=list)


@dataclass(frozen=True)
class Proposals:
    """Predictions of the proposal head for every token.

    Attributes:
        features: (B, S, C) transformed tokens, the same constant vector on invalid tokens.
        logits: (B, S, K) class logits.
        box_logits: (B, S, 4) boxes before the sigmoid; +inf on invalid tokens.
    """

    features: Tensor
    logits: Tensor
    box_logits: Tensor


@dataclass(frozen=True)
class SetPrediction:
    """One set of predictions that is matched to the ground truth as a whole.

    Attributes:
        logits: (B, Q, K) class logits.
        boxes: (B, Q, 4) boxes (cx, cy, w, h) in [0, 1].
        class_agnostic: the classifier only tells objects from background, in class 0; it is
            supervised with label 0 for every box.
    """

    logits: Tensor
    boxes: Tensor
    class_agnostic: bool = False


@dataclass(frozen=True)
class DenoisingGroups:
    """How denoising queries are laid out: G groups of M positive and M negative slots.

    Attributes:
        num_groups: G.
        slots: M, the largest number of boxes in an image of the batch.
    """

    num_groups: int
    slots: int

    @property
    def num_queries(self) -> int:
        """Number of denoising queries an image, 2 G M."""
        return 2 * self.num_groups * self.slots


@dataclass(frozen=True)
class Queries:
    """Decoder queries.

    Attributes:
        content: (B, Q, C) content embeddings.
        position: (B, Q, C) position embeddings, or None where they follow from the references.
        reference_boxes: (B, Q, 4) start boxes (cx, cy, w, h) or (B, Q, 2) start points (x, y), in
            [0, 1], or None.
        attention_mask: (Q, Q) bool, True where self-attention is blocked, or None.
        proposal: encoder predictions to be supervised, or None for learned queries.
        denoising: layout of the leading denoising queries, or None outside training.
    """

    content: Tensor
    position: Tensor | None = None
    reference_boxes: Tensor | None = None
    attention_mask: Tensor | None = None
    proposal: SetPrediction | None = None
    denoising: DenoisingGroups | None = None


@dataclass(frozen=True)
class DecoderOutput:
    """What the decoder predicts after each layer.

    Attributes:
        logits: (layers, B, Q, K) class logits.
        boxes: (layers, B, Q, 4) boxes (cx, cy, w, h) in [0, 1].
        references: (layers, B, Q, 4|2) what each layer hands to the next, or None without any.
        token_attention: (B, S) attention that each token got from all queries, heads and layers,
            or None unless the decoder maps it.
    """

    logits: Tensor
    boxes: Tensor
    references: Tensor | None = None
    token_attention: Tensor | None = None

    def layer(self, index: int) -> SetPrediction:
        """Predictions of one layer."""
        return SetPrediction(self.logits[index], self.boxes[index])

    def queries(self, part: slice) -> DecoderOutput:
        """Predictions of some of the queries; the attention of the tokens stays that of all."""
        references = None if self.references is None else self.references[:, :, part]
        return dataclasses.replace(
            self,
            logits=self.logits[:, :, part],
            boxes=self.boxes[:, :, part],
            references=references,
        )


@dataclass(frozen=True)
class DetectorOutput:
    """Everything the detector predicts for a batch.

    Attributes:
        decoder: predictions of the matching queries after each decoder layer.
        memory: the tokens that the decoder attended to.
        proposal: encoder predictions of proposals, or None.
        encoder_layers: predictions from the tokens that each encoder layer but the last updated, in
            training of a detector with encoder heads; else empty.
        denoising: predictions of the denoising queries, or None outside training.
        denoising_groups: their layout, or None.
        selection: the token selection of the encoder, or None if every token is updated.
        student: what the same weights predict with clustered attention, in distillation; else None.
    """

    decoder: DecoderOutput
    memory: FeatureTokens
    proposal: SetPrediction | None = None
    encoder_layers: list[SetPrediction] = dataclasses.field(default_factory=list)
    denoising: DecoderOutput | None = None
    denoising_groups: DenoisingGroups | None = None
    selection: TokenSelection | None = None
    student: DecoderOutput | None = None

    @property
    def prediction(self) -> SetPrediction:
        """Predictions of the last decoder layer."""
        return self.decoder.layer(-1)
