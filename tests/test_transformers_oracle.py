"""The detectors against Hugging Face's `transformers`, which has code of its own for them.

Our random weights are renamed for the other library; both then see the same two padded images at
full size. `transformers` is needed by this file only.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from detectron2.config import LazyConfig, instantiate
from torch import Tensor, nn
from transformers.models.deformable_detr.configuration_deformable_detr import DeformableDetrConfig
from transformers.models.deformable_detr.modeling_deformable_detr import (
    DeformableDetrForObjectDetection,
)
from transformers.models.detr.configuration_detr import DetrConfig
from transformers.models.detr.modeling_detr import DetrForObjectDetection
from transformers.models.resnet.configuration_resnet import ResNetConfig

from efficient_detr.modeling.detector import Detector
from efficient_detr.modeling.queries import ProposalHead
from tests.tiny_models import padding_mask

CONFIGS = Path(__file__).parents[1] / "configs"
SIZES = [(200, 320), (256, 235)]
"""(height, width) of the images: each is padded on one side, by no multiple of a stride."""

# Parts of our names -> parts of theirs (release 5), applied one after the other.
RENAMED = [
    (r"^backbone\.stem\.conv1", "model.backbone.model.embedder.embedder"),
    (r"^backbone\.res(\d)\.(\d+)", lambda m: f"{_STAGES}.{int(m[1]) - 2}.layers.{m[2]}"),
    (r"\.conv(\d)\.", lambda m: f".layer.{int(m[1]) - 1}."),
    (r"^(model\.backbone.*)\.norm\.", r"\1.normalization."),
    (r"^(model\.backbone.*)(\.\d|embedder|shortcut)\.weight$", r"\1\2.convolution.weight"),
    (r"^neck\.(convs|extra_convs)\.(\d)\.(?=weight|bias)", r"model.input_proj.\1.\2.0."),
    (r"^neck\.(convs|extra_convs)\.(\d)\.norm\.", r"model.input_proj.\1.\2.1."),
    (r"\.extra_convs\.(\d)", lambda m: f".{int(m[1]) + 3}"),  # after those of res3, res4, res5
    (r"\.input_proj\.convs\.", ".input_proj."),
    (r"^tokenizer\.level_embedding", "model.level_embed"),
    (r"^(encoder|decoder)\.", r"model.\1."),
    (r"\.(attention|self_attention)\.", ".self_attn."),
    (r"\.cross_attention\.", ".encoder_attn."),
    (r"\.(attention|self_attention)_norm\.", ".self_attn_layer_norm."),
    (r"\.cross_attention_norm\.", ".encoder_attn_layer_norm."),
    (r"\.feedforward_norm\.", ".final_layer_norm."),
    (r"\.feedforward\.expand\.", ".mlp.fc1."),
    (r"\.feedforward\.contract\.", ".mlp.fc2."),
    (r"\.out_proj\.", ".o_proj."),
    (r"\.(value|output)_projection\.", r".\1_proj."),
    (r"^queries\.(position|embedding)$", "model.query_position_embeddings.weight"),
    (r"^queries\.reference_points\.", "model.reference_points."),
    (r"^queries\.projection\.", "model.pos_trans."),
    (r"^queries\.norm\.", "model.pos_trans_norm."),
    (r"^proposals\.projection\.", "model.enc_output."),
    (r"^proposals\.norm\.", "model.enc_output_norm."),
    (r"^proposals\.head\.", "model.decoder.heads.6."),  # after those of the six decoder layers
    (r"^model\.decoder\.norm\.", "model.decoder.layernorm."),
    (r"^model\.decoder\.heads\.(\d)\.class_layer\.", r"class_embed.\1."),
    (r"^model\.decoder\.heads\.(\d)\.box_layers\.", r"bbox_embed.\1."),
]
_STAGES = "model.backbone.model.encoder.stages"
# DETR has one head and one input projection, with names of their own.
RENAMED_DETR = [
    (r"^class_embed\.0\.", "class_labels_classifier."),
    (r"^bbox_embed\.0\.", "bbox_predictor."),
    (r"^model\.input_proj\.0\.0\.", "model.input_projection."),
]
# What release 5 calls otherwise than release 4.
RENAMED_RELEASE_4 = [
    (r"^model\.backbone\.model\.", "model.backbone.conv_encoder.model."),
    (r"\.o_proj\.", ".out_proj."),
    (r"\.mlp\.", "."),
]
RELEASE_4 = transformers.__version__.startswith("4.")


def renamed(weights: dict[str, Tensor], *tables: list[tuple[str, Any]]) -> dict[str, Tensor]:
    """Our weights under the other library's names, packed projections taken apart."""
    result = {}
    for name, tensor in unpacked(weights).items():
        for table in tables:
            for pattern, replacement in table:
                name = re.sub(pattern, replacement, name)
        result[name] = tensor
    return result


def unpacked(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Three matrices for query, key and value instead of one."""
    result = {}
    for name, tensor in weights.items():
        if ".in_proj_" in name:
            for letter, part in zip("qkv", tensor.chunk(3), strict=True):
                result[name.replace(".in_proj_", f".{letter}_proj.")] = part
        else:
            result[name] = tensor
    return result


def with_copies(weights: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """The heads once more wherever the other library keeps a copy of them.

    A head that our layers share is repeated for each of its layers, and refinement has the heads
    inside the decoder besides.
    """
    result = dict(weights)
    for name in model.state_dict():
        head = name.removeprefix("model.decoder.")
        if name not in result and head.startswith(("class_embed.", "bbox_embed.")):
            first = re.sub(r"^(\w+)\.\d+", r"\1.0", head)
            result[name] = weights[head if head in weights else first]
    return result


def our_detector(name: str) -> Detector:
    """The detector of a config, with weights off their start values, where queries look alike."""
    torch.manual_seed(1)
    model: Any = LazyConfig.load(str(CONFIGS / name)).model
    detector: Detector = instantiate(model).detector
    for key, parameter in detector.named_parameters():
        if not key.startswith("backbone."):
            parameter.add_(0.02 * torch.randn_like(parameter))
        if key.endswith("cross_attention.in_proj_weight"):  # some tokens are much preferred
            parameter[: 2 * parameter.shape[1]].mul_(4)
        if key.endswith("box_layers.layers.2.weight"):
            parameter.mul_(4)
    for key, buffer in detector.backbone.named_buffers():
        if key.endswith(("running_mean", "bias")):
            buffer.normal_(std=0.1)
        else:
            buffer.uniform_(0.8, 1.2)
        if key.endswith("conv3.norm.weight"):
            buffer.mul_(0.3)  # sixteen blocks add up
    if detector.proposals is not None:
        rank_invalid_tokens_last(detector.proposals)
    return detector.eval()


def rank_invalid_tokens_last(proposals: ProposalHead) -> None:
    """All invalid tokens have the same score, so which of them is selected would be open."""
    constant = proposals.norm(proposals.projection.bias)
    proposals.head.class_layer.weight[0].mul_(5).sub_(constant)


def their_arguments(detector: Detector) -> dict[str, Any]:
    stages = [f"stage{int(feature[-1]) - 1}" for feature in detector.neck.in_features]
    arguments: dict[str, Any] = {
        "backbone_config": ResNetConfig(out_features=stages),
        "num_labels": 80,
        # Heads of their own for every layer: they get equal weights where ours are shared.
        "tie_word_embeddings": False,
    }
    if RELEASE_4:
        arguments |= {"use_timm_backbone": False, "backbone": None}
        arguments |= {"use_pretrained_backbone": False}
    return arguments


def their_model(detector: Detector, **arguments: Any) -> nn.Module:
    """The other library's detector with our weights; all of its weights come from ours."""
    dense = not hasattr(detector.tokenizer, "level_embedding")
    config = DetrConfig if dense else DeformableDetrConfig
    build = DetrForObjectDetection if dense else DeformableDetrForObjectDetection
    model = build(config(**their_arguments(detector), **arguments))
    tables = [RENAMED, RENAMED_DETR if dense else [], RENAMED_RELEASE_4 if RELEASE_4 else []]
    weights = with_copies(renamed(detector.state_dict(), *tables), model)
    model.load_state_dict(weights)
    return model.eval()


def dilate(model: nn.Module) -> None:
    """Make the last stage that of DC5; the library has DC5 in another backbone library only."""
    stages = [module for name, module in model.named_modules() if name.endswith("encoder.stages")]
    first, *others = stages[0][-1].layers
    first.shortcut.convolution.stride = first.layer[1].convolution.stride = (1, 1)
    for block in others:
        block.layer[1].convolution.dilation = block.layer[1].convolution.padding = (2, 2)


def batch() -> tuple[Tensor, Tensor]:
    """Two images, zero on padding, and their padding mask."""
    mask = padding_mask(SIZES, (256, 320))
    images = torch.randn(2, 3, 256, 320, generator=torch.Generator().manual_seed(2))
    return images.masked_fill(mask[:, None], 0), mask


@torch.no_grad()
def test_the_selection_of_proposals_is_unambiguous() -> None:
    """Otherwise the order of the two-stage queries would be a matter of rounding."""
    detector = our_detector("deformable_detr_two_stage.py")
    memory = detector.encode(detector.tokenize(*batch())).memory
    proposals = detector.proposals(memory)
    scores, order = proposals.logits[..., 0].sort(descending=True)
    selected = slice(detector.queries.num_queries)
    assert (scores[:, :-1] - scores[:, 1:])[:, selected].min() > 4e-5
    assert (
        proposals.box_logits.gather(1, order[:, selected, None].expand(-1, -1, 4)).isfinite().all()
    )


@pytest.mark.parametrize(
    ("config", "arguments"),
    [
        ("detr.py", {}),
        ("detr_dc5.py", {}),
        ("deformable_detr_single_scale.py", {"num_feature_levels": 1}),
        ("deformable_detr.py", {}),
        ("deformable_detr_refine.py", {"with_box_refine": True}),
        ("deformable_detr_two_stage.py", {"with_box_refine": True, "two_stage": True}),
    ],
)
@torch.no_grad()
def test_same_predictions(config: str, arguments: dict[str, Any]) -> None:
    detector = our_detector(config)
    images, mask = batch()
    ours = detector(images, mask).prediction
    model = their_model(detector, **arguments)
    if "dc5" in config:
        dilate(model)
    theirs = model(images, pixel_mask=(~mask).long())
    spread = ours.logits.std(dim=1).mean()  # of the queries of an image
    assert spread > 0.01, "queries that look alike would hide a wrong part"
    torch.testing.assert_close(ours.logits, theirs.logits, rtol=0, atol=1e-4)
    torch.testing.assert_close(ours.boxes, theirs.pred_boxes, rtol=0, atol=1e-4)
