"""Published checkpoints of DAT, DAT++ and Swin -> our models, by lists of keys and shapes.

The lists were taken from the authors' models at full size. Braces in a key stand for one key with
each of the numbers.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from copy import deepcopy
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from detectron2.config import instantiate
from detectron2.modeling import SwinTransformer
from safetensors.torch import load_file
from torch import Tensor, nn

from efficient_detr.checkpoint.backbones import ConvertedState, convert_backbone
from efficient_detr.checkpoint.shapes import resized_position_table
from efficient_detr.errors import UserError
from efficient_detr.modeling.backbones.dat import FEATURES
from efficient_detr.modeling.backbones.dat_variants import (
    VARIANTS,
    StageSpecification,
    dat,
    dat_backbone,
)
from efficient_detr.modeling.backbones.deformed_keys import PooledKeys
from efficient_detr.modeling.backbones.position_bias import FixedPositionTable
from efficient_detr.modeling.classifier import ImageClassifier
from tests.checkpoint.manifest_files import load_manifest

TESTS = Path(__file__).parents[1]
State = dict[str, Tensor]


def published_state(name: str) -> State:
    """A state dict without storage, except for tables: interpolating is slow without."""
    state = {}
    for key, shape in load_manifest(f"official_{name}").shapes.items():
        table = key.endswith(("relative_position_bias_table", "rpb"))
        state[key] = torch.zeros(shape, device="cpu" if table else "meta")
    return state


def detection_state(name: str) -> State:
    """What DAT-Detection stores: output norms and other parts instead of the head."""
    state = {k: v for k, v in published_state(name).items() if not k.startswith("cls_")}
    for stage, specification in enumerate(VARIANTS[name].stages):
        for kind in ("weight", "bias"):
            norm = torch.empty(specification.channels, device="meta")
            state[f"norms.{stage}.norm.{kind}"] = norm
    detector = {f"backbone.{key}": tensor for key, tensor in state.items()}
    extra = ("neck.fpn_convs.0.conv.weight", "bbox_head.retina_cls.bias", "roi_head.x.weight")
    return detector | {key: torch.empty(1, device="meta") for key in extra}


def meta(config: Any) -> Any:
    """The module of a config, without storage."""
    with torch.device("meta"):
        return instantiate(config)


@cache
def published_model(name: str, *out_features: str) -> Any:
    """A published variant without storage, made only once because nothing here changes it."""
    return meta(dat_backbone(name, out_features=out_features or FEATURES[1:]))


@cache
def swin(**options: Any) -> SwinTransformer:
    """Without storage, made with it, because Detectron2's computes numbers while it is made."""
    sizes: dict[str, Any] = dict(
        embed_dim=96, depths=(2, 2, 6, 2), num_heads=(3, 6, 12, 24), window_size=7
    )
    others: dict[str, Any] = dict(out_indices=(1, 2, 3), drop_path_rate=0.0)
    return SwinTransformer(**(sizes | others | options)).to("meta")


def classifier(backbone: Any, num_classes: int = 1000) -> ImageClassifier:
    """The backbone with a head on "p3", on the same device."""
    with next(backbone.parameters()).device:
        return ImageClassifier(
            backbone=backbone,
            feature="p3",
            channels=backbone.output_shape()["p3"].channels,
            num_classes=num_classes,
        )


class Outer(nn.Module):
    """A module whose part of a given name is another module."""

    def __init__(self, name: str, inner: nn.Module) -> None:
        super().__init__()
        setattr(self, name, inner)


def below(path: str, module: nn.Module) -> nn.Module:
    """A model that has a module at a path."""
    for name in reversed(path.split(".") if path else []):
        module = Outer(name, module)
    return module


def converted(state: State, model: nn.Module) -> ConvertedState:
    result = convert_backbone(state, model)
    assert result is not None
    return result


def assert_filled(result: ConvertedState, model: nn.Module, but: Iterable[str] = ()) -> None:
    """Every parameter has a tensor of its shape, and nothing else is there."""
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters() if name not in but}
    assert {name: tuple(tensor.shape) for name, tensor in result.state.items()} == shapes
    assert result.report.filled == len(shapes)
    assert sorted(result.report.initial) == sorted(but)


@pytest.mark.parametrize("name", sorted(VARIANTS))
def test_classification_weights_fill_the_classifier(name: str) -> None:
    model = classifier(published_model(name, "p3"))
    # Nothing in the published model with 384 pixels depends on this size.
    state = published_state(name.replace("plus_base_384", "plus_base"))
    result = converted(state, model)
    assert_filled(result, model)
    assert not result.report.resized
    constants = [key for key in state if key.endswith(("position_index", "attn_mask"))]
    assert sorted(result.report.dropped) == sorted(constants)
    # Windows store the indices, shifted windows the masks as well.
    windows = [stage.attention.count(kind) for stage in VARIANTS[name].stages for kind in "LSS"]
    assert len(constants) == sum(windows)


def test_plain_model_with_neighbourhood_attention() -> None:
    """An ablation of the authors: neighbourhoods and deformed keys with the parts of 2022."""
    stages = VARIANTS["dat_plus_plus_tiny"].stages
    model = classifier(meta(dat(stages, out_features=["p3"])))
    assert_filled(converted(published_state("dat_plus_plus_ablation"), model), model)


@pytest.mark.parametrize(
    ("name", "path"),
    [
        ("dat_plus_plus_tiny", "detector.backbone"),
        ("dat_plus_plus_tiny", "backbone"),
        ("dat_plus_plus_tiny", ""),
        ("dat_plus_plus_base", "backbone.bottom_up"),
    ],
)
def test_detection_weights_fill_the_backbone(name: str, path: str) -> None:
    model = below(path, published_model(name, *FEATURES))
    result = converted(detection_state(name), model)
    assert_filled(result, model)
    assert result.report.target == path
    assert result.report.parts == ["neck", "bbox_head", "roi_head"]
    assert set(result.report.dropped.values()) == {
        f"of {part}, outside the backbone" for part in result.report.parts
    }


def test_norms_of_unused_outputs_are_left_out() -> None:
    """RetinaNet takes p1 to p3."""
    model = below("backbone.bottom_up", published_model("dat_plus_plus_tiny"))
    result = converted(detection_state("dat_plus_plus_tiny"), model)
    assert_filled(result, model)
    unused = {k for k, reason in result.report.dropped.items() if "not used" in reason}
    assert unused == {"norms.0.norm.weight", "norms.0.norm.bias"}


@pytest.fixture(scope="module")
def sources() -> dict[str, dict[str, str]]:
    """For two models: our name -> key in the file, told by the values of the converted tensor."""
    found = {}
    for name in ("dat_tiny", "dat_plus_plus_tiny"):
        keys = list(state := published_state(name))
        numbered = {k: torch.tensor(i).expand(state[k].shape) for i, k in enumerate(keys)}
        result = converted(numbered, classifier(published_model(name)))
        found[name] = {k: keys[int(v[(0,) * v.dim()])] for k, v in result.state.items()}
    return found


@pytest.mark.parametrize(
    ("published", "ours"),
    [
        ("patch_proj.0.weight", "stages.0.merging.convolution.weight"),
        ("patch_proj.1.norm.bias", "stages.0.merging.norm.bias"),
        ("down_projs.0.0.weight", "stages.1.merging.convolution.weight"),
        ("down_projs.2.1.norm.bias", "stages.3.merging.norm.bias"),
        ("stages.2.layer_norms.6.norm.weight", "stages.2.blocks.3.attention_norm.weight"),
        ("stages.2.layer_norms.7.norm.weight", "stages.2.blocks.3.feedforward_norm.weight"),
        ("stages.2.mlps.5.chunk.linear1.bias", "stages.2.blocks.5.feedforward.expand.bias"),
        ("stages.2.mlps.5.chunk.linear2.bias", "stages.2.blocks.5.feedforward.contract.bias"),
        ("stages.2.attns.4.proj_qkv.weight", "stages.2.blocks.4.attention.projection.weight"),
        ("stages.2.attns.4.proj_out.weight", "stages.2.blocks.4.attention.output.weight"),
        ("stages.2.attns.5.proj_q.bias", "stages.2.blocks.5.attention.query.bias"),
        ("stages.2.attns.5.proj_k.bias", "stages.2.blocks.5.attention.key.bias"),
        ("stages.2.attns.5.proj_v.bias", "stages.2.blocks.5.attention.value.bias"),
        ("stages.2.attns.5.proj_out.bias", "stages.2.blocks.5.attention.output.bias"),
        (
            "stages.2.attns.5.conv_offset.1.norm.weight",
            "stages.2.blocks.5.attention.keys.offset_network.norm.weight",
        ),
        (
            "stages.2.attns.5.conv_offset.0.bias",
            "stages.2.blocks.5.attention.keys.offset_network.depthwise.bias",
        ),
        (
            "stages.2.attns.5.rpe_table",
            "stages.2.blocks.5.attention.position_bias.relative_position_bias_table",
        ),
        ("cls_norm.norm.weight", "output_norms.p3.weight"),
    ],
)
def test_weights_of_equal_shape_are_told_apart(
    sources: dict[str, dict[str, str]], published: str, ours: str
) -> None:
    assert sources["dat_tiny"][f"backbone.{ours}"] == published


@pytest.mark.parametrize(
    ("published", "ours"),
    [
        ("patch_proj.0.bias", "stages.0.merging.first.convolution.bias"),
        ("patch_proj.1.norm.bias", "stages.0.merging.first.norm.bias"),
        ("patch_proj.3.bias", "stages.0.merging.second.convolution.bias"),
        ("patch_proj.4.norm.bias", "stages.0.merging.second.norm.bias"),
        ("stages.1.local_perception_units.2.bias", "stages.1.blocks.2.local_perception.bias"),
        ("stages.1.mlps.3.linear1.0.bias", "stages.1.blocks.3.feedforward.expand.bias"),
        ("stages.1.mlps.3.dwc.bias", "stages.1.blocks.3.feedforward.mixing.bias"),
        ("stages.1.mlps.3.linear2.0.bias", "stages.1.blocks.3.feedforward.contract.bias"),
        ("stages.1.attns.2.qkv.bias", "stages.1.blocks.2.attention.projection.bias"),
        ("stages.1.attns.2.proj.bias", "stages.1.blocks.2.attention.output.bias"),
        ("stages.1.attns.2.rpb", "stages.1.blocks.2.attention.relative_position_bias_table"),
    ],
)
def test_weights_of_the_later_models_are_told_apart(
    sources: dict[str, dict[str, str]], published: str, ours: str
) -> None:
    assert sources["dat_plus_plus_tiny"][f"backbone.{ours}"] == published


TINY_STAGES = (
    StageSpecification("LS", 8, 1),
    StageSpecification("LD", 16, 2, num_groups=1, key_stride=2, offset_kernel=7),
    StageSpecification("LD", 32, 4, num_groups=2, offset_kernel=5),
    StageSpecification("LD", 64, 8, num_groups=4, offset_kernel=3),
)

# Of the output in a backbone without the head, which the files of classifiers do not have.
NORMS = ["output_norms.p3.weight", "output_norms.p3.bias"]


def tiny_config(image_size: int = 96, window: int = 3) -> Any:
    """The model of the golden fixture `dat_tiny`."""
    config = dat(TINY_STAGES, image_size=image_size, window=window, out_features=["p3"])
    config.stages[1].blocks[1].attention.position_bias = None
    return config


@pytest.fixture(scope="module")
def golden() -> dict[str, State]:
    """Weights of the published code at 96 pixels (w) and resized by it to 128 pixels (w2)."""
    tensors = load_file(TESTS / "golden/dat_tiny.safetensors")
    return {
        group: {k.partition(".")[2]: v for k, v in tensors.items() if k.startswith(f"{group}.")}
        for group in ("w", "w2")
    }


def test_values_are_those_of_the_file(golden: dict[str, State]) -> None:
    backbone = instantiate(tiny_config())
    result = converted(golden["w"], classifier(backbone, num_classes=10))
    assert_filled(result, classifier(backbone, num_classes=10))
    # 8 attention layers of 4 stages, 4 of them with 4 1x1 convolutions and an offset network's.
    assert len(result.report.reshaped) == 3 * 5
    query = golden["w"]["stages.3.attns.1.proj_q.weight"]
    ours = result.state["backbone.stages.3.blocks.1.attention.query.weight"]
    assert torch.equal(ours, query[:, :, 0, 0])
    assert torch.equal(result.state["head.bias"], golden["w"]["cls_head.bias"])


def test_tables_are_resized_as_by_the_authors(golden: dict[str, State]) -> None:
    """Windows of 3 become windows of 4, maps of 96 pixels maps of 128."""
    model = instantiate(tiny_config(image_size=128, window=4))
    result = converted(golden["w"], model)
    tables = {k: v for k, v in golden["w2"].items() if "table" in k}
    assert len(result.report.resized) == len(tables) == 7
    for key, table in tables.items():
        stage, block = re.findall(r"\d+", key)[:2]
        inner = "position_bias." * ("rpe" in key) + "relative_position_bias_table"
        name = f"stages.{stage}.blocks.{block}.attention.{inner}"
        assert torch.equal(result.state[name], table)
        before = tuple(golden["w"][key].shape)
        assert result.report.resized[name] == (before, tuple(table.shape))


def test_resized_table_without_heads_mixed() -> None:
    """A head without weights stays so, and a table of one number stays this number."""
    table = torch.zeros(9, 2)
    table[:, 1] = 3.0
    resized = resized_position_table(table, (49, 2))
    assert resized is not None
    assert resized[:, 0].abs().max() == 0
    torch.testing.assert_close(resized[:, 1], torch.full((49,), 3.0))


@pytest.mark.parametrize(
    ("before", "after"),
    [((9, 2), (25, 3)), ((8, 2), (25, 2)), ((9, 2), (24, 2)), ((2, 3, 3), (4, 5, 5)), ((9,), (4,))],
)
def test_what_is_no_table_of_another_size(before: tuple[int, ...], after: tuple[int, ...]) -> None:
    assert resized_position_table(torch.zeros(before), after) is None


def test_neighbourhoods_of_another_size() -> None:
    """The tables of neighbourhood attention have the heads first."""
    config = dat_backbone("dat_plus_plus_tiny")
    for stage in config.stages:
        for block in stage.blocks:
            if "kernel_size" in block.attention:
                block.attention.kernel_size = 5
    result = converted(published_state("dat_plus_plus_tiny"), meta(config))
    # All but the two blocks of the last stage alternate.
    assert len(result.report.resized) == (2 + 4 + 18) // 2
    assert ((4, 13, 13), (4, 9, 9)) in result.report.resized.values()


@pytest.mark.parametrize("published", ["layer_scales.{}.weight", "layer_scales.{}.gamma"])
def test_layer_scales(golden: dict[str, State], published: str) -> None:
    config = tiny_config()
    for block in config.stages[0].blocks:
        block.layer_scale = 1e-5
    scales = {f"stages.0.{published.format(i)}": torch.full((8,), float(i)) for i in range(4)}
    model = instantiate(config)
    result = converted(golden["w"] | scales, model)
    assert_filled(result, model, but=NORMS)
    names = [
        f"stages.0.blocks.{b}.{k}_scale.weight" for b in "01" for k in ("attention", "feedforward")
    ]
    assert [result.state[name][0].item() for name in names] == [0, 1, 2, 3]


def test_other_kinds_of_position(golden: dict[str, State]) -> None:
    """Pooled keys need no offset network; a fixed table is loaded if it has the model's size."""
    config = tiny_config()
    pooled, fixed = (config.stages[i].blocks[1].attention for i in (1, 3))
    pooled.keys = dict(_target_=f"{PooledKeys.__module__}.PooledKeys", kernel_size=2)
    fixed.position_bias = dict(
        _target_=f"{FixedPositionTable.__module__}.FixedPositionTable",
        num_heads=8,
        map_shape=(3, 3),
        key_shape=(3, 3),
    )
    name = "stages.3.blocks.1.attention.position_bias.position_bias_table"
    table = torch.rand(8, 9, 9)
    model = instantiate(config)
    result = converted(golden["w"] | {"stages.3.attns.1.rpe_table": table}, model)
    assert_filled(result, model, but=NORMS)
    assert torch.equal(result.state[name], table)
    offsets = [k for k, v in result.report.dropped.items() if "pooled" in v]
    assert len(offsets) == 5 and all("stages.1.attns.1.conv_offset." in key for key in offsets)
    result = converted(golden["w"] | {"stages.3.attns.1.rpe_table": table[:, 1:]}, model)
    assert_filled(result, model, but=[name, *NORMS])
    assert "another size" in result.report.dropped["stages.3.attns.1.rpe_table"]


class Detector(nn.Module):
    """Has weights of the same names and shapes as those of a classification head."""

    def __init__(self, backbone: nn.Module, channels: int) -> None:
        super().__init__()
        self.backbone = backbone
        self.norm = nn.LayerNorm(channels, device="meta")
        self.head = nn.Linear(channels, 1000, device="meta")
        self.cls_head = nn.Linear(channels, 1000, device="meta")


def test_heads_stay_outside_of_detectors() -> None:
    model = Detector(published_model("dat_tiny"), 768)
    result = converted(published_state("dat_tiny"), model)
    assert all(name.startswith("backbone.") for name in result.state)
    norms = [f"backbone.output_norms.p{i}.{kind}" for i in (1, 2, 3) for kind in ("weight", "bias")]
    assert result.report.initial == norms
    heads = [
        key for key, why in result.report.dropped.items() if why == "parts of a classification head"
    ]
    assert sorted(heads) == ["cls_head.bias", "cls_head.weight"] + [
        "cls_norm.norm.bias",
        "cls_norm.norm.weight",
    ]


def test_heads_of_swin_stay_outside_of_detectors() -> None:
    model = Detector(swin(), 768)
    result = converted(published_state("swin_tiny"), model)
    parameters = {name for name, _ in model.backbone.named_parameters()}
    norms = {name for name in parameters if name.startswith("norm")}
    assert set(result.state) == {f"backbone.{name}" for name in parameters - norms}
    assert set(result.report.initial) == {f"backbone.{name}" for name in norms}
    # Of four stages all but the last one shift windows, in every second block.
    masks = [key for key in result.report.dropped if key.endswith("attn_mask")]
    assert len(masks) == 1 + 1 + 3


@pytest.mark.parametrize("path", ["detector.backbone", "backbone.bottom_up", ""])
def test_swin_below_any_path(path: str) -> None:
    model = below(path, swin())
    result = converted(published_state("swin_tiny"), model)
    assert {path and f"{path}."} == {
        name[: name.index("patch_embed")] for name in result.state if "patch_embed" in name
    }
    assert len(result.state) == len(dict(model.named_parameters())) - 6


def test_swin_fills_the_classifier() -> None:
    model = classifier(swin(out_indices=(3,)))
    result = converted(published_state("swin_tiny"), model)
    assert_filled(result, model)


def test_windows_of_swin_of_another_size() -> None:
    result = converted(published_state("swin_tiny"), swin(window_size=12))
    assert len(result.report.resized) == 2 + 2 + 6 + 2
    assert set(result.report.resized.values()) == {
        ((169, heads), (529, heads)) for heads in (3, 6, 12, 24)
    }


def test_detector_with_swin_of_another_framework() -> None:
    state = {
        k: v
        for k, v in published_state("swin_tiny").items()
        if not k.startswith(("norm.", "head."))
    }
    for stage in (1, 2, 3):
        for kind in ("weight", "bias"):
            state[f"norm{stage}.{kind}"] = torch.empty(96 * 2**stage, device="meta")
    state = {f"backbone.{key}": tensor for key, tensor in state.items()}
    state["rpn_head.rpn_cls.bias"] = torch.empty(3, device="meta")
    model = below("detector.backbone", swin())
    assert_filled(converted(state, model), model)


@pytest.mark.parametrize(
    "state",
    [
        {"detector.backbone.patch_embed.proj.weight": torch.zeros(1)},
        {"conv1.weight": torch.zeros(1), "stages.0.layer_norms.0.norm.bias": torch.zeros(1)},
        {},
    ],
    ids=["ours", "other", "empty"],
)
def test_other_files_are_left_alone(state: State) -> None:
    assert convert_backbone(state, swin()) is None


@pytest.mark.parametrize("prefix", ["", "module."])
@pytest.mark.parametrize("kind", ["swin", "dat"])
def test_our_own_files_are_left_alone(kind: str, prefix: str) -> None:
    """A classifier of ours with Swin has the keys of some published detectors with Swin."""
    model = classifier(swin() if kind == "swin" else published_model("dat_tiny"))
    state = {f"{prefix}{key}": tensor for key, tensor in model.state_dict().items()}
    assert convert_backbone(state, model) is None


def test_our_own_backbone_in_a_classifier_leaves_the_head() -> None:
    model = classifier(published_model("dat_tiny"))
    state = {k: v for k, v in model.state_dict().items() if k.startswith("backbone.")}
    result = converted(state, model)
    assert_filled(result, model, but=["head.weight", "head.bias"])
    assert result.report.random_head


@pytest.mark.parametrize("name", ["dat_tiny", "dat_plus_plus_tiny", "swin"])
@pytest.mark.parametrize("path", ["detector.backbone", "backbone.bottom_up", ""])
def test_our_own_classifier_fills_the_backbone_of_a_detector(name: str, path: str) -> None:
    saved = swin(out_indices=(3,)) if name == "swin" else published_model(name, "p3")
    model = below(path, swin() if name == "swin" else published_model(name))
    result = converted(classifier(saved).state_dict(), model)
    # The detector uses the outputs p1 and p2 as well.
    norm = "norm{}.{}" if name == "swin" else "output_norms.p{}.{}"
    fresh = [norm.format(stage, kind) for stage in (1, 2) for kind in ("weight", "bias")]
    assert_filled(result, model, but=[f"{path}.{name}".lstrip(".") for name in fresh])
    assert result.report.parts == ["head"]
    assert not result.report.random_head


def test_our_own_detector_fills_the_backbone_of_a_classifier() -> None:
    saved = below("detector.backbone", published_model("dat_tiny", *FEATURES))
    other = {"detector.encoder.layers.0.weight": torch.empty(1, device="meta")}
    model = classifier(published_model("dat_tiny", "p3"))
    result = converted(saved.state_dict() | other, model)
    assert_filled(result, model, but=["head.weight", "head.bias"])
    assert result.report.parts == ["encoder"]


def test_our_own_tables_are_resized_for_another_model() -> None:
    saved = classifier(instantiate(tiny_config()), num_classes=3)
    model = below("detector.backbone", instantiate(tiny_config(image_size=128, window=4)))
    result = converted(saved.state_dict(), model)
    assert_filled(result, model)
    assert len(result.report.resized) == 7


def test_backbone_of_a_whole_detector_of_others() -> None:
    """Its other parts, whatever their names, are left out under their names."""
    parts = ("transformer", "ema_backbone_norms", "mask_iou_head.fcs", "dn_query", "label_enc")
    for name, state, backbone in (
        ("swin", published_state("swin_tiny"), swin()),
        ("dat", published_state("dat_tiny"), published_model("dat_tiny")),
    ):
        state = {f"backbone.{key}": value for key, value in state.items()}
        state |= {f"{part}.weight": torch.empty(1, device="meta") for part in parts}
        report = converted(state, below("detector.backbone", backbone)).report
        assert report.parts == [part.partition(".")[0] for part in parts], name
        assert report.dropped["dn_query.weight"] == "of dn_query, outside the backbone"
        assert "of mask_iou_head, outside the backbone (1 weight)" in report.table()


def test_whole_detectors_of_the_same_kind_are_left_alone() -> None:
    model = nn.ModuleDict({"backbone": swin(), "neck": nn.Linear(2, 2, device="meta")})
    assert convert_backbone(model.state_dict(), model) is None
    # Not so where only the names of other parts coincide.
    state = {f"backbone.{k}": v for k, v in published_state("dat_tiny").items()}
    state["neck.weight"] = torch.empty(2, 2, device="meta")
    other = nn.ModuleDict(
        {"bottom_up": published_model("dat_tiny"), "neck": nn.Linear(2, 2, device="meta")}
    )
    assert all(name.startswith("bottom_up.") for name in converted(state, other).state)


@pytest.mark.parametrize("name", ["dat_tiny", "swin_tiny"])
@pytest.mark.parametrize("prefix", ["module.", "module.backbone."])
def test_prefix_of_parallel_training(name: str, prefix: str) -> None:
    backbone = swin(out_indices=(3,)) if name == "swin_tiny" else published_model(name, "p3")
    model = classifier(backbone)
    state = {f"{prefix}{key}": tensor for key, tensor in published_state(name).items()}
    assert_filled(converted(state, model), model)


def refusal(state: State, model: nn.Module) -> str:
    with pytest.raises(UserError) as error:
        convert_backbone(state, model, "The checkpoint w.pth")
    text = str(error.value)
    assert text.startswith("The checkpoint w.pth (") and "\n" not in text
    return text


def test_wrong_variants_are_named() -> None:
    tiny = published_model("dat_tiny")
    text = refusal(published_state("dat_small"), tiny)
    assert "2-2-18-2 blocks of 96-192-384-768 channels, dat_small" in text
    assert "stages.2.layer_norms.12.norm" in text or "stages.2.attns.6." in text
    text = refusal(published_state("dat_base"), tiny)
    assert "dat_base or dat_base_384" in text
    assert re.search(r"has the shape \(\d[^)]*\), but stages\.\S* has \(\d", text)
    text = refusal(published_state("dat_tiny"), published_model("dat_small"))
    assert "no weights for stages.2.blocks.6." in text
    text = refusal(published_state("swin_tiny"), swin(embed_dim=128, num_heads=(4, 8, 16, 32)))
    assert "Swin-T" in text and re.search(r" \(96,\), but \S+ has \(128,\)", text)


@pytest.mark.parametrize(
    ("published", "model", "width"),
    [("dat_base", "dat_tiny", 1024), ("dat_plus_plus_tiny", "dat_base", 512)],
)
def test_head_of_another_width_is_not_blamed_on_the_classes(
    published: str, model: str, width: int
) -> None:
    state = published_state(published)
    head = {key: state[key] for key in state if key.startswith("cls_head.")}
    assert head["cls_head.weight"].shape == (1000, width)
    for weights in (state, head | state):
        text = refusal(weights, classifier(published_model(model)))
        assert "num_classes" not in text and "choose the variant" in text
    few = {"cls_head.weight": torch.empty(21, 768), "cls_head.bias": torch.empty(21)}
    text = refusal(published_state("dat_tiny") | few, classifier(published_model("dat_tiny")))
    assert "set model.num_classes=21" in text


def test_models_without_such_a_backbone() -> None:
    assert "the model has none" in refusal(published_state("dat_tiny"), swin())
    two = nn.ModuleList([swin(), deepcopy(swin())])
    assert "has 2 (0, 1)" in refusal(published_state("swin_tiny"), two)


def test_unknown_keys_are_named() -> None:
    state = published_state("dat_tiny") | {"stages.0.ln_cnvnxt.0.norm.bias": torch.zeros(96)}
    text = refusal(state, published_model("dat_tiny"))
    assert "stages.0.ln_cnvnxt.0.norm.bias" in text


def test_report_counts_everything(golden: dict[str, State]) -> None:
    model = below("detector.backbone", instantiate(tiny_config(image_size=128, window=4)))
    report = converted(golden["w"], model).report
    assert report.filled + len(report.dropped) == len(golden["w"])
    assert not report.matched and len(report.reshaped) == 15 and len(report.resized) == 7
    assert report.filled == len(report.renamed) + 15 + 7
    assert len(report.initial) == 2
    assert "parts of a classification head (4 weights)" in report.table()
    assert "25x1 to 49x1" in report.table()
    assert "detector.backbone.output_norms.p3.weight" in report.table()
