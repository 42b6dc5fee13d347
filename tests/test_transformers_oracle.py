"""The detectors against Hugging Face's `transformers`, which has code of its own for them.

Our random weights are written in the layout of the other library and fill its models; both then see
the same two padded images. Its weights are read back from its models and from the files that it
saves. `transformers` is needed by this file only.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from detectron2.config import LazyCall as L
from detectron2.config import LazyConfig, instantiate
from detectron2.modeling import ResNet
from detectron2.modeling.backbone.resnet import BasicStem, BottleneckBlock
from torch import Tensor, nn

from efficient_detr.checkpoint.conversion import write_keys
from efficient_detr.checkpoint.convert import convert_checkpoint, export_checkpoint
from efficient_detr.checkpoint.files import read_checkpoint
from efficient_detr.checkpoint.hugging_face import huggingface_resnet
from efficient_detr.meta_arch import EfficientDETR
from efficient_detr.modeling.queries import ProposalHead
from tests.tiny_models import padding_mask

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

MODELS = Path(__file__).parents[1] / "configs" / "common" / "models"
IMAGE_SIZES = [(200, 320), (256, 235)]
"""(height, width) of the images: each is padded on one side, by no multiple of a stride."""

STEM_CHANNELS = 8
STAGE_CHANNELS = {"res2": 16, "res3": 32, "res4": 64, "res5": 128}
BLOCKS = {"res2": 1, "res3": 2, "res4": 1, "res5": 2}

SIZES: dict[str, Any] = dict(
    num_classes=7,
    channels=64,
    num_heads=8,
    hidden_channels=48,
    encoder_layers=2,
    decoder_layers=3,
    num_queries=20,
)

THREE_MAPS = ["res3", "res4", "res5"]
# Variant -> function of the models' configs, maps of the backbone, and what the configuration in
# the other library differs in from the default.
VARIANTS: dict[str, tuple[str, list[str], dict[str, Any]]] = {
    "detr": ("detr", ["res5"], {}),
    "single_scale": ("deformable_detr", ["res5"], {"num_feature_levels": 1}),
    "deformable": ("deformable_detr", THREE_MAPS, {}),
    # Untied, or the classes of all layers would be one: what was trained has them apart.
    "refine": (
        "deformable_detr_refine",
        THREE_MAPS,
        {"with_box_refine": True, "tie_word_embeddings": False},
    ),
    "two_stage": (
        "deformable_detr_two_stage",
        THREE_MAPS,
        {"with_box_refine": True, "two_stage": True},
    ),
}
RELEASE_4 = transformers.__version__.startswith("4.")
OUR_BACKBONE = "detector.backbone."
THEIR_BACKBONE = "model.backbone.conv_encoder.model." if RELEASE_4 else "model.backbone.model."


# Our models -------------------------------------------------------------------------------------


def tiny_resnet(features: list[str]) -> Any:
    """The LazyConfig of a ResNet with bottlenecks."""
    inputs, stages = STEM_CHANNELS, []
    for name, channels in STAGE_CHANNELS.items():
        stages.append(
            L(ResNet.make_stage)(
                block_class=BottleneckBlock,
                num_blocks=BLOCKS[name],
                in_channels=inputs,
                out_channels=channels,
                bottleneck_channels=channels // 4,
                stride_per_block=[1 if name == "res2" else 2] + [1] * (BLOCKS[name] - 1),
                stride_in_1x1=False,
                norm="FrozenBN",
            )
        )
        inputs = channels
    stem = L(BasicStem)(in_channels=3, out_channels=STEM_CHANNELS, norm="FrozenBN")
    return L(ResNet)(stem=stem, stages=stages, out_features=features)


def tiny_detector(variant: str, **arguments: Any) -> EfficientDETR:
    """A model in evaluation mode, with weights off their start values, where queries look alike.

    Args:
        variant: a key of `VARIANTS`.
        arguments: of the function that makes the config.
    """
    function, features, theirs = VARIANTS[variant]
    file = "detr" if function == "detr" else "deformable_detr"
    if "num_feature_levels" in theirs:
        arguments["num_levels"] = theirs["num_feature_levels"]
    sizes = {
        "backbone": tiny_resnet(features),
        "in_features": features,
        "in_channels": [STAGE_CHANNELS[name] for name in features],
        **SIZES,
        **arguments,
    }
    config = LazyConfig.load(str(MODELS / f"{file}.py"), function)(**sizes)
    torch.manual_seed(1)
    model: EfficientDETR = instantiate(config)
    _leave_start_values(model)
    return model.eval()


@torch.no_grad()
def _leave_start_values(model: EfficientDETR) -> None:
    for key, parameter in model.detector.named_parameters():
        if not key.startswith("backbone."):
            parameter.add_(0.05 * torch.randn_like(parameter))
        if key.endswith("cross_attention.in_proj_weight"):  # some tokens are much preferred
            parameter[: 2 * parameter.shape[1]].mul_(4)
        if key.endswith("box_layers.layers.2.weight"):
            parameter.mul_(4)
    backbone = model.detector.backbone
    for key, buffer in [] if backbone is None else list(backbone.named_buffers()):
        if key.endswith(("running_mean", "bias")):
            buffer.normal_(std=0.1)
        else:
            buffer.uniform_(0.8, 1.2)
        if key.endswith("conv3.norm.weight"):
            buffer.mul_(0.3)  # blocks add up
    if model.detector.proposals is not None:
        _rank_invalid_tokens_last(model.detector.proposals)


def _rank_invalid_tokens_last(proposals: ProposalHead) -> None:
    """All invalid tokens have the same score, so which of them is selected would be open."""
    constant = proposals.norm(proposals.projection.bias)
    proposals.head.class_layer.weight[0].mul_(5).sub_(constant)


# Theirs ------------------------------------------------------------------------------------------


def format_name(variant: str, *, of_hub: bool = False) -> str:
    detector = "detr" if variant == "detr" else "deformable_detr"
    return f"huggingface_{detector}{'' if RELEASE_4 or of_hub else '_v5'}"


def their_configuration(variant: str, model: EfficientDETR, **arguments: Any) -> Any:
    """The configuration of a model like ours."""
    stages = [f"stage{int(feature[-1]) - 1}" for feature in model.detector.neck.in_features]
    backbone: dict[str, Any] = {
        "embedding_size": STEM_CHANNELS,
        "hidden_sizes": list(STAGE_CHANNELS.values()),
        "depths": list(BLOCKS.values()),
    }
    sizes: dict[str, Any] = {
        "backbone_config": transformers.ResNetConfig(
            out_features=stages, **arguments.pop("backbone", backbone)
        ),
        "num_labels": SIZES["num_classes"],
        "d_model": SIZES["channels"],
        "encoder_layers": SIZES["encoder_layers"],
        "decoder_layers": SIZES["decoder_layers"],
        "encoder_ffn_dim": SIZES["hidden_channels"],
        "decoder_ffn_dim": SIZES["hidden_channels"],
        "num_queries": SIZES["num_queries"],
    }
    if variant != "detr":
        sizes["two_stage_num_proposals"] = SIZES["num_queries"]
    if RELEASE_4:
        sizes |= {"use_timm_backbone": False, "backbone": None, "use_pretrained_backbone": False}
    dense = variant == "detr"
    build = transformers.DetrConfig if dense else transformers.DeformableDetrConfig
    return build(**sizes, **VARIANTS[variant][2], **arguments)


def their_class(variant: str) -> Any:
    if variant == "detr":
        return transformers.DetrForObjectDetection
    return transformers.DeformableDetrForObjectDetection


def exported(model: EfficientDETR, name: str, backbone: str) -> dict[str, Tensor]:
    """Our weights in a layout of theirs, whose backbone is as the library builds it."""
    ours = model.state_dict()
    written = export_checkpoint(ours, name)
    with_timm = {key for key in written if key.startswith(backbone)}
    own = {
        key.removeprefix(OUR_BACKBONE): tensor
        for key, tensor in ours.items()
        if key.startswith(OUR_BACKBONE)
    }
    assert len(with_timm) == len(own)
    rest = {key: tensor for key, tensor in written.items() if key not in with_timm}
    return rest | {
        backbone + key: tensor for key, tensor in write_keys(own, huggingface_resnet()).items()
    }


def their_model(variant: str, model: EfficientDETR, **arguments: Any) -> nn.Module:
    """The other library's model; all of its weights come from ours."""
    theirs: nn.Module = their_class(variant)(their_configuration(variant, model, **arguments))
    theirs.load_state_dict(exported(model, format_name(variant), THEIR_BACKBONE))
    return theirs.eval()


@functools.cache
def both(variant: str) -> tuple[EfficientDETR, nn.Module]:
    """Our model and theirs with the same weights."""
    ours = tiny_detector(variant)
    return ours, their_model(variant, ours)


def dilate(model: nn.Module) -> None:
    """Make the last stage that of DC5; the library has DC5 with timm only."""
    stages = [module for name, module in model.named_modules() if name.endswith("encoder.stages")]
    first, *others = stages[0][-1].layers
    first.shortcut.convolution.stride = first.layer[1].convolution.stride = (1, 1)
    for block in others:
        block.layer[1].convolution.dilation = block.layer[1].convolution.padding = (2, 2)


def batch() -> tuple[Tensor, Tensor]:
    """Two images, zero on padding, and their padding mask."""
    mask = padding_mask(IMAGE_SIZES, (256, 320))
    images = torch.randn(2, 3, 256, 320, generator=torch.Generator().manual_seed(2))
    return images.masked_fill(mask[:, None], 0), mask


def assert_same_predictions(ours: EfficientDETR, theirs: nn.Module) -> None:
    images, mask = batch()
    prediction = ours.detector(images, mask).prediction
    output = theirs(images, pixel_mask=(~mask).long())
    spread = prediction.logits.std(dim=1).mean()  # of the queries of an image
    assert spread > 0.01, "queries that look alike would hide a wrong part"
    torch.testing.assert_close(prediction.logits, output.logits, rtol=0, atol=1e-4)
    torch.testing.assert_close(prediction.boxes, output.pred_boxes, rtol=0, atol=1e-4)


def assert_same_weights(found: dict[str, Tensor], model: EfficientDETR) -> None:
    expected = model.state_dict()
    assert found.keys() == expected.keys()
    assert [key for key in expected if not torch.equal(found[key], expected[key])] == []


@torch.no_grad()
def test_the_selection_of_proposals_is_unambiguous() -> None:
    """Otherwise the order of the two-stage queries would be a matter of rounding."""
    detector = tiny_detector("two_stage").detector
    memory = detector.encode(detector.tokenize(*batch())).memory
    proposals = detector.proposals(memory)
    scores, order = proposals.logits[..., 0].sort(descending=True)
    selected = slice(detector.queries.num_queries)
    assert (scores[:, :-1] - scores[:, 1:])[:, selected].min() > 4e-5
    assert (
        proposals.box_logits.gather(1, order[:, selected, None].expand(-1, -1, 4)).isfinite().all()
    )


@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_same_predictions_with_our_weights(variant: str) -> None:
    assert_same_predictions(*both(variant))


@torch.no_grad()
def test_same_predictions_with_a_dilated_stage() -> None:
    """With a whole ResNet-50: Detectron2's dilated stages come in this size only."""
    backbone = LazyConfig.load(str(MODELS / "backbones.py"), "resnet_dc5")(50)
    ours = tiny_detector("detr", backbone=backbone, in_channels=[2048])
    theirs = their_model("detr", ours, backbone={})
    dilate(theirs)
    assert_same_predictions(ours, theirs)


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_weights_of_their_model_are_ours(variant: str) -> None:
    ours, theirs = both(variant)
    conversion = convert_checkpoint(theirs.state_dict(), model=ours)
    assert conversion.format is not None and conversion.format.name == format_name(variant)
    assert_same_weights(conversion.state, ours)


def saved(model: Any, folder: Path) -> str:
    """A file of a model of theirs."""
    try:
        model.save_pretrained(folder)
        return str(folder / "model.safetensors")
    except RuntimeError:
        # Release 4 refuses to write heads with two names, unless it may pickle them.
        model.save_pretrained(folder, safe_serialization=False)
        return str(folder / "pytorch_model.bin")


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_file_that_they_save_is_read(variant: str, tmp_path: Path) -> None:
    """Files have the names of release 4, and each weight once."""
    ours, theirs = both(variant)
    conversion = convert_checkpoint(read_checkpoint(saved(theirs, tmp_path))["model"], model=ours)
    assert conversion.format is not None
    assert conversion.format.name == format_name(variant, of_hub=True)
    assert_same_weights(conversion.state, ours)


@pytest.mark.parametrize("variant", ["detr", "two_stage"])
@torch.no_grad()
def test_a_file_with_the_names_of_the_hub_is_read_by_them(variant: str) -> None:
    ours, _ = both(variant)
    weights = exported(
        ours, format_name(variant, of_hub=True), "model.backbone.conv_encoder.model."
    )
    theirs, loading = their_class(variant).from_pretrained(
        None,
        config=their_configuration(variant, ours),
        state_dict=weights,
        output_loading_info=True,
    )
    assert not loading["missing_keys"] and not loading["unexpected_keys"]
    assert_same_predictions(ours, theirs.eval())
