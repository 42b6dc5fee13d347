"""The shared detector: a table of contents of the stages. Its config says which model it is."""

from __future__ import annotations

from detectron2.modeling import Backbone
from torch import Tensor, nn

from efficient_detr.errors import ConfigError
from efficient_detr.modeling.decoder import TransformerDecoder
from efficient_detr.modeling.encoder import DualAttentionEncoderLayer, TransformerEncoder
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

    Raises:
        ConfigError: if two parts do not fit together; it names both.
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
        _check_backbone(backbone, neck)
        _check_levels(self, neck.num_levels)
        _check_selection(encoder, selection)

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


def _check_backbone(backbone: nn.Module, neck: ChannelMapper) -> None:
    if not isinstance(backbone, Backbone):
        return
    shapes = backbone.output_shape()
    for name, channels in zip(neck.in_features, neck.in_channels, strict=True):
        if name not in shapes:
            raise ConfigError(
                f"neck.in_features names '{name}', but the backbone gives {', '.join(shapes)}: "
                "change neck.in_features or backbone.out_features"
            )
        if shapes[name].channels != channels:
            raise ConfigError(
                f"neck.in_channels says {channels} for '{name}', but the backbone gives "
                f"{shapes[name].channels}: change neck.in_channels"
            )


def _check_levels(detector: nn.Module, expected: int) -> None:
    """Every part that is built for a number of levels must be built for that of the neck."""
    for name, module in detector.named_modules():
        num_levels = getattr(module, "num_levels", expected)
        if num_levels != expected:
            raise ConfigError(
                f"{name}.num_levels={num_levels}, but neck.num_levels={expected}: "
                "set them to the same number"
            )


def _check_selection(
    encoder: TransformerEncoder, selection: ForegroundTokenSelector | None
) -> None:
    count = len(encoder.layers)
    if selection is not None and len(selection.layer_keep_ratios) != count:
        raise ConfigError(
            f"selection.layer_keep_ratios has {len(selection.layer_keep_ratios)} entries for "
            f"{count} encoder.layers: give one for each layer"
        )
    dual = any(isinstance(layer, DualAttentionEncoderLayer) for layer in encoder.layers)
    if dual and (selection is None or encoder.object_score is None):
        missing = "selection" if selection is None else "encoder.object_score"
        raise ConfigError(
            f"encoder.layers holds DualAttentionEncoderLayer, which needs {missing}: "
            f"set {missing} or use EncoderLayer"
        )
