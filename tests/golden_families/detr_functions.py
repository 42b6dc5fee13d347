"""Fixtures of single functions of DETR, Deformable DETR and Sparse DETR."""

from __future__ import annotations

from collections.abc import Callable

import torch
from detectron2.data.transforms import ResizeShortestEdge
from detectron2.structures import Boxes, pairwise_iou
from torch import Tensor

from efficient_detr.boxes import generalized_iou, inverse_sigmoid
from efficient_detr.losses import (
    FocalClassCost,
    FocalClassLoss,
    HungarianMatcher,
    SoftmaxClassCost,
)
from efficient_detr.losses.token_attention import TokenAttentionLoss
from efficient_detr.modeling.attention.deformable import MultiScaleDeformableAttention
from efficient_detr.modeling.attention.token_attention import token_attention_map
from efficient_detr.modeling.heads import PredictionHead
from efficient_detr.modeling.position import SinePositionEmbedding, sine_embedding
from efficient_detr.modeling.queries import ProposalHead
from efficient_detr.modeling.queries.two_stage import box_embedding
from efficient_detr.modeling.tokenizer import FeatureTokenizer, resize_mask
from efficient_detr.structures import (
    DecoderOutput,
    DetectorOutput,
    FeatureTokens,
    SetPrediction,
    SpatialShapes,
    Targets,
    TokenSelection,
)
from tests.golden_families.fixture import Comparison
from tests.tiny_models import padding_mask

EXACT = 1e-5
TEMPERATURE = 10000.0


def compare(comparison: Comparison) -> None:
    for part in (
        compare_matchers,
        compare_positions,
        compare_resizing,
        compare_boxes,
        compare_proposals,
        compare_class_loss,
        compare_initial_offsets,
        compare_token_attention,
    ):
        part(comparison)


def compare_matchers(comparison: Comparison) -> None:
    """Costs of all pairs, and the pairs that are chosen."""
    logits, boxes = (comparison.expect(f"matcher/{name}") for name in ("logits", "boxes"))
    count = len(list(comparison.matches(r"matcher/target\.(\d+)\.labels")))
    targets = [
        Targets(
            labels=comparison.expect(f"matcher/target.{image}.labels"),
            boxes=comparison.expect(f"matcher/target.{image}.boxes"),
            image_size=(1, 1),
        )
        for image in range(count)
    ]
    prediction = SetPrediction(logits, boxes)
    matchers = {
        ("detr_softmax_cost", "detr_match"): HungarianMatcher(
            class_cost=SoftmaxClassCost(), class_weight=1.0
        ),
        ("deformable_focal_cost", "deformable_match"): HungarianMatcher(
            class_cost=FocalClassCost(), class_weight=2.0
        ),
    }
    for (cost, match), matcher in matchers.items():
        costs = matcher.cost(prediction, targets).split([len(t.labels) for t in targets], dim=2)
        matching = matcher(prediction, targets)
        for image in range(count):
            comparison.close(f"matcher/{cost}.{image}", costs[image][image], EXACT, EXACT)
            comparison.equal(f"matcher/{match}.{image}", torch.stack(matching[image]))


def compare_positions(comparison: Comparison) -> None:
    """Sine embeddings of maps and of boxes; n features for each axis."""
    mask = comparison.expect("pos/mask")

    def unnormalised(num_features: int) -> Tensor:
        counts = [(~mask).float().cumsum(dim) for dim in (1, 2)]
        axes = [sine_embedding(count, num_features, TEMPERATURE) for count in counts]
        return torch.cat(axes, dim=-1).permute(0, 3, 1, 2)

    def embed(offset: float) -> Callable[[int], Tensor]:
        return lambda n: SinePositionEmbedding(channels=2 * n, offset=offset)(mask)

    boxes = comparison.expect("proposal_pos/unact").sigmoid()
    comparison.read(
        {
            r"pos/detr_sine_n(\d+)": embed(0.0),
            r"pos/detr_sine_n(\d+)_unnormalised": unnormalised,
            r"pos/deformable_sine_n(\d+)": embed(-0.5),
            r"proposal_pos/embed_(\d+)": lambda n: box_embedding(boxes, 4 * n, TEMPERATURE),
        },
        EXACT,
        EXACT,
    )


def compare_resizing(comparison: Comparison) -> None:
    """Masks, and the size of resized images by Detectron2's rule, which this project follows.

    The official rule truncates where Detectron2 rounds and so is at most a few pixels off.
    """
    image = comparison.expect("mask/image")
    comparison.read(
        {r"mask/nearest_(\d+)x(\d+)": lambda height, width: resize_mask(image, (height, width))}
    )
    name = "resize/w_h_short_max__official_oh_ow__d2_oh_ow"
    different = []
    for row in comparison.expect(name).tolist():
        width, height, short, longest, *official = row[:6]
        ours = ResizeShortestEdge.get_output_shape(height, width, short, longest)
        assert list(ours) == row[6:], row
        if list(ours) != official:
            different.append(row)
    info = comparison.fixture.info
    assert different == info["resize_rows_where_official_differs_from_detectron2"]


def compare_boxes(comparison: Comparison) -> None:
    first, second = (comparison.expect(f"giou/boxes{number}_xyxy") for number in (1, 2))
    giou = generalized_iou(first[:, None], second[None])
    comparison.close("giou/giou", giou, EXACT)
    comparison.close("giou/iou", pairwise_iou(Boxes(first), Boxes(second)), EXACT)
    values = comparison.expect("inverse_sigmoid/x")
    comparison.close("inverse_sigmoid/y", inverse_sigmoid(values, eps=1e-5), EXACT, EXACT)


def compare_proposals(comparison: Comparison) -> None:
    """Tokens of wide images, their reference points and proposal boxes."""
    sizes = comparison.expect("proposals/image_mask_hw")
    shapes = spatial_shapes(comparison.expect("proposals/spatial_shapes"))
    mask = padding_mask([(h, w) for h, w in sizes.tolist()], tuple(sizes.amax(0).tolist()))
    tokenizer = FeatureTokenizer(
        position_embedding=SinePositionEmbedding(channels=4), num_levels=len(shapes)
    )
    tokens = tokenizer([torch.zeros(len(sizes), 4, *shape) for shape in shapes], mask)
    head = ProposalHead(channels=4, head=PredictionHead(channels=4, num_classes=1))
    prefix = "proposals/encoder_reference_points_first_"
    comparison.read(
        {
            r"proposals/mask_flatten": lambda: tokens.padding_mask,
            r"proposals/unact": lambda: head.anchor_logits(tokens),
            r"proposals/valid_ratios": lambda: tokens.valid_ratios,
            prefix + r"(\d+)": lambda count: tokens.reference_points[:, :count],
        },
        EXACT,
        EXACT,
    )


def compare_class_loss(comparison: Comparison) -> None:
    """The focal loss of the matcher's logits."""
    logits, one_hot = comparison.expect("matcher/logits"), comparison.expect("focal/targets_onehot")
    matching, targets = [], []
    for image in one_hot:
        queries, labels = image.nonzero().unbind(1)
        matching.append((queries, torch.arange(len(queries))))
        targets.append(Targets(labels, torch.zeros(len(labels), 4), (1, 1)))
    comparison.read(
        {
            r"focal/loss_num_boxes_(\d+)": lambda num_boxes: FocalClassLoss()(
                logits, matching, targets, num_boxes
            )
        },
        EXACT,
        EXACT,
    )


def compare_initial_offsets(comparison: Comparison) -> None:
    def bias(heads: int, levels: int, points: int) -> Tensor:
        attention = MultiScaleDeformableAttention(
            channels=8 * heads, num_heads=heads, num_levels=levels, num_points=points
        )
        return attention.sampling_offsets.bias

    comparison.read({r"init/sampling_offsets_bias_h(\d+)_l(\d+)_p(\d+)": bias}, EXACT, EXACT)


def compare_token_attention(comparison: Comparison) -> None:
    """The decoder's attention to tokens (DAM), and the loss that it makes."""
    locations = comparison.expect("dam/sampling_locations_NLQHlp2")
    weights = comparison.expect("dam/attention_weights")
    shapes = spatial_shapes(comparison.expect("dam/spatial_shapes"))
    sizes = torch.tensor([height * width for height, width in shapes])
    layers = zip(locations.unbind(1), weights.unbind(1), strict=True)
    maps = torch.stack([token_attention_map(*layer, shapes) for layer in layers], dim=1)
    target = comparison.expect("dam/target")
    comparison.read(
        {
            r"dam/level_start_index": lambda: sizes.cumsum(0) - sizes,
            r"dam/flat_grid_NLH": lambda: maps,
            r"dam/summed": lambda: maps.sum((1, 2)),
            r"dam/loss": lambda: token_loss(comparison.expect("dam/pred"), target),
        },
        EXACT,
        EXACT,
    )


def token_loss(scores: Tensor, target: Tensor) -> Tensor:
    """The loss of token scores (B, S) if the decoder attends to just the tokens marked 1."""
    tokens = FeatureTokens(
        features=scores[..., None],
        positions=scores[..., None],
        padding_mask=torch.zeros_like(target, dtype=torch.bool),
        spatial_shapes=[(1, target.shape[1])],
        image_sizes=torch.ones(len(target), 2),
        valid_ratios=torch.ones(len(target), 1, 2),
        reference_points=torch.zeros(*target.shape, 1, 2),
    )
    counts = target.sum(1).long()
    indices = target.topk(int(counts.max()), dim=1).indices
    nothing = torch.zeros(1, len(target), 1, 4)
    output = DetectorOutput(
        decoder=DecoderOutput(logits=nothing, boxes=nothing, token_attention=target),
        memory=tokens,
        selection=TokenSelection([indices], counts, scores, [scores]),
    )
    (loss,) = TokenAttentionLoss()(output, []).values()
    return loss


def spatial_shapes(shapes: Tensor) -> SpatialShapes:
    return [(height, width) for height, width in shapes.tolist()]
