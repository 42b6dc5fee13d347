"""The shared detector: a table of contents of the stages. Its config says which model it is."""

from __future__ import annotations

from torch import Tensor, nn

from efficient_detr.modeling.compatibility import check_parts
from efficient_detr.modeling.decoder import TransformerDecoder
from efficient_detr.modeling.encoder_heads import EncoderLayerHeads
from efficient_detr.modeling.neck import ChannelMapper
from efficient_detr.modeling.queries import ContrastiveDenoising, ProposalHead, QuerySource
from efficient_detr.modeling.selection import TokenSelector
from efficient_detr.modeling.tokenizer import FeatureTokenizer
from efficient_detr.structures import (
    DetectorOutput,
    EncoderOutput,
    FeatureTokens,
    Proposals,
    SetPrediction,
    Targets,
)


class Detector(nn.Module):
    """backbone -> neck -> tokens -> selection -> encoder -> proposals -> queries -> decoder.

    Args:
        backbone: a Detectron2 backbone, image -> dict of feature maps.
        neck: feature maps -> maps of one width.
        tokenizer: maps -> tokens.
        encoder: refines tokens.
        queries: memory and proposals -> decoder queries.
        decoder: queries -> predictions.
        proposals: predicts classes and a box from every token, or None without two stages. A
            selection of tokens needs its transform, without two stages too.
        selection: which tokens the encoder updates, or None for all.
        encoder_heads: predictions after each encoder layer but the last, in training; or None.
        denoising: extra queries in training, or None.

    Raises:
        ConfigError: if two parts do not fit together; it names both.
    """

    def __init__(
        self,
        *,
        backbone: nn.Module,
        neck: ChannelMapper,
        tokenizer: FeatureTokenizer,
        encoder: nn.Module,
        queries: QuerySource,
        decoder: TransformerDecoder,
        proposals: ProposalHead | None = None,
        selection: TokenSelector | None = None,
        encoder_heads: EncoderLayerHeads | None = None,
        denoising: ContrastiveDenoising | None = None,
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.neck = neck
        self.tokenizer = tokenizer
        self.selection = selection
        self.encoder = encoder
        self.encoder_heads = encoder_heads
        self.proposals = proposals
        self.queries = queries
        self.denoising = denoising
        self.decoder = decoder
        check_parts(self)

    def forward(
        self, images: Tensor, padding_mask: Tensor, targets: list[Targets] | None = None
    ) -> DetectorOutput:
        """Detect.

        Args:
            images: (B, 3, H, W) normalised images, zero on padding.
            padding_mask: (B, H, W) bool, True on padding.
            targets: ground truth, which makes denoising queries; None outside training.
        """
        return self.detect(self.tokenize(images, padding_mask), targets)

    def tokenize(self, images: Tensor, padding_mask: Tensor) -> FeatureTokens:
        """Backbone, neck and tokenizer; arguments as in `forward`."""
        return self.tokenizer(self.neck(self.backbone(images)), padding_mask)

    def detect(self, tokens: FeatureTokens, targets: list[Targets] | None = None) -> DetectorOutput:
        """Everything after the tokenizer; arguments as in `forward`."""
        encoded = self.encode(tokens)
        queries = self.queries(encoded.memory, self._propose(encoded.memory))
        if self.denoising is not None and targets is not None:
            queries = self.denoising(queries, targets)
        predictions = self.decoder(queries, encoded.memory)
        groups = queries.denoising
        denoising_queries = groups.num_queries if groups else 0
        return DetectorOutput(
            decoder=predictions.queries(slice(denoising_queries, None)),
            memory=encoded.memory,
            proposal=queries.proposal,
            encoder_layers=self._encoder_predictions(encoded, tokens),
            denoising=predictions.queries(slice(denoising_queries)) if groups else None,
            denoising_groups=groups,
            selection=encoded.selection,
        )

    def encode(self, tokens: FeatureTokens) -> EncoderOutput:
        """Selection and encoder."""
        selection = None if self.selection is None else self.selection(tokens, self.proposals)
        head = None if self.proposals is None else self.proposals.head
        return self.encoder(tokens, selection, head)

    def _propose(self, memory: FeatureTokens) -> Proposals | None:
        if self.proposals is None or not self.queries.needs_proposals:
            return None
        return self.proposals(memory)

    def _encoder_predictions(
        self, encoded: EncoderOutput, tokens: FeatureTokens
    ) -> list[SetPrediction]:
        """Predictions that only the losses need."""
        if self.encoder_heads is None or not self.training:
            return []
        return self.encoder_heads(encoded, self.proposals, tokens)
