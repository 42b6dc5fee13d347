"""The shared detector: a table of contents of the stages. Its config says which model it is."""

from __future__ import annotations

from torch import Tensor, nn

from efficient_detr.modeling.decoder import TransformerDecoder
from efficient_detr.modeling.encoder import TransformerEncoder
from efficient_detr.modeling.neck import ChannelMapper
from efficient_detr.modeling.queries import ContrastiveDenoising, ProposalHead, TwoStageQueries
from efficient_detr.modeling.selection import ForegroundTokenSelector
from efficient_detr.modeling.tokenizer import FeatureTokenizer
from efficient_detr.structures import DetectorOutput, Targets


class Detector(nn.Module):
    """backbone -> neck -> tokens -> selection -> encoder -> proposals -> queries -> decoder.

    Args:
        backbone: a Detectron2 backbone, image -> dict of feature maps.
        neck: feature maps -> maps of one width.
        tokenizer: maps -> tokens.
        encoder: refines tokens.
        proposals: predicts classes and a box from every token.
        queries: proposals -> decoder queries.
        decoder: queries -> predictions.
        selection: which tokens the encoder updates, or None for all.
        denoising: extra queries in training, or None.
    """

    def __init__(
        self,
        *,
        backbone: nn.Module,
        neck: ChannelMapper,
        tokenizer: FeatureTokenizer,
        encoder: TransformerEncoder,
        proposals: ProposalHead,
        queries: TwoStageQueries,
        decoder: TransformerDecoder,
        selection: ForegroundTokenSelector | None = None,
        denoising: ContrastiveDenoising | None = None,
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.neck = neck
        self.tokenizer = tokenizer
        self.selection = selection
        self.encoder = encoder
        self.proposals = proposals
        self.queries = queries
        self.denoising = denoising
        self.decoder = decoder

    def forward(
        self, images: Tensor, padding_mask: Tensor, targets: list[Targets] | None = None
    ) -> DetectorOutput:
        """Detect.

        Args:
            images: (B, 3, H, W) normalised images, zero on padding.
            padding_mask: (B, H, W) bool, True on padding.
            targets: ground truth, which makes denoising queries; None outside training.
        """
        features = self.neck(self.backbone(images))
        tokens = self.tokenizer(features, padding_mask)
        selection = self.selection(tokens, self.proposals) if self.selection else None
        encoded = self.encoder(tokens, selection, self.proposals.head)
        queries = self.queries(self.proposals(encoded.memory))
        if self.denoising is not None and targets is not None:
            queries = self.denoising(queries, targets)
        predictions = self.decoder(queries, encoded.memory)
        groups = queries.denoising
        denoised, matched = predictions.split_queries(groups.num_queries if groups else 0)
        return DetectorOutput(
            decoder=matched,
            spatial_shapes=tokens.spatial_shapes,
            proposal=queries.proposal,
            denoising=denoised if groups else None,
            denoising_groups=groups,
            selection=selection,
        )
