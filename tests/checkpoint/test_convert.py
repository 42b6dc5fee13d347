"""Conversion of whole files: classes, queries, what fits a model, and the way back."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from efficient_detr.checkpoint.classes import coco_class_names
from efficient_detr.checkpoint.convert import (
    clean_weights,
    convert_checkpoint,
    export_checkpoint,
)
from efficient_detr.errors import UserError
from tests.checkpoint.tiny_detectors import random_weights, tiny_detector, tiny_resnet

HEAD = "detector.decoder.heads.0.class_layer.weight"
PROPOSAL_HEAD = "detector.proposals.head.class_layer.weight"
QUERIES = "detector.queries.position"
LABELS = "detector.denoising.label_embedding.weight"


def assert_equal(first: dict[str, Tensor], second: dict[str, Tensor]) -> None:
    assert first.keys() == second.keys()
    assert [name for name in first if not torch.equal(first[name], second[name])] == []


def detr(**sizes: Any) -> nn.Module:
    return tiny_detector("detr", **sizes)


def two_stage(**sizes: Any) -> nn.Module:
    return tiny_detector("deformable_detr", "deformable_detr_two_stage", **sizes)


FAMILIES = {
    "detr": (detr, ["detr", "detr_detectron2", "detrex_detr", "huggingface_detr_v5"]),
    "two_stage": (two_stage, ["deformable_detr", "huggingface_deformable_detr"]),
    "dino": (lambda: tiny_detector("dino"), ["dino", "detrex_dino"]),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_layout_converts_and_goes_back(family: str) -> None:
    build, layouts = FAMILIES[family]
    model = build()
    weights = random_weights(model)
    for layout in layouts:
        published = export_checkpoint(weights, layout)
        assert published.keys().isdisjoint(weights)
        conversion = convert_checkpoint(published, model=model)
        assert conversion.format is not None and conversion.format.name == layout
        assert_equal(conversion.state, weights)
        assert conversion.report.read == len(published)
        assert conversion.report.filled == len(weights)
        # From one layout to another without any model.
        between = convert_checkpoint(published, keep_classes=True)
        assert_equal(export_checkpoint(between.state, layout), published)


def test_our_own_files_pass_through() -> None:
    weights = random_weights(detr())
    conversion = convert_checkpoint(weights, model=detr())
    assert_equal(conversion.state, weights)
    assert len(conversion.report.matched) == len(weights)


def test_prefixes_of_parallel_training_and_counters_go_away() -> None:
    weights = random_weights(detr())
    published = export_checkpoint(weights, "detr")
    wrapped = {f"module.{key}": published[key] for key in published}
    counted = wrapped | {
        "module.total_ops": torch.ones(1),
        "module.class_embed.total_params": torch.ones(1),
        "total_params": torch.ones(1),
    }
    conversion = convert_checkpoint(counted, model=detr())
    assert_equal(conversion.state, weights)
    assert sorted(conversion.report.dropped) == [
        "module.class_embed.total_params",
        "module.total_ops",
        "total_params",
    ]
    for prefix in ("model.", "_orig_mod.", "module.model._orig_mod."):
        for state in (published, weights):
            given = {prefix + key: state[key] for key in state}
            assert_equal(convert_checkpoint(given, model=detr()).state, weights)
    # A file of Hugging Face may have this prefix throughout.
    hub = {"model.a.weight": torch.ones(1), "head.weight": torch.ones(1)}
    assert clean_weights(hub)[0].keys() == hub.keys()


# Classes -----------------------------------------------------------------------------------------


def test_91_category_numbers_become_80_classes_with_the_no_object_row_last() -> None:
    model = detr(num_classes=91)
    weights = random_weights(model)
    published = export_checkpoint(weights, "detr")
    rows = [*(i for i in range(91) if i not in (0, 12, 26, 29, 30, 45, 66, 68, 69, 71, 83)), 91]
    for given in (None, detr(num_classes=80)):
        conversion = convert_checkpoint(published, model=given)
        assert torch.equal(conversion.state[HEAD], weights[HEAD][rows])
        assert len(conversion.report.class_rows) == 2
        assert conversion.class_names == coco_class_names()
    assert_equal(convert_checkpoint(published, model=model).state, weights)
    assert_equal(convert_checkpoint(published, keep_classes=True).state, weights)


def test_a_proposal_head_keeps_its_first_row() -> None:
    weights = random_weights(two_stage(num_classes=91))
    state = convert_checkpoint(export_checkpoint(weights, "deformable_detr")).state
    assert torch.equal(state[PROPOSAL_HEAD], weights[PROPOSAL_HEAD][:80])
    assert torch.equal(state[HEAD][:11], weights[HEAD][1:12])


def test_label_embeddings_have_a_row_that_nothing_reads() -> None:
    weights = random_weights(tiny_detector("dino", num_classes=91))
    published = export_checkpoint(weights, "dino")
    assert len(published["label_enc.weight"]) == 92
    published["label_enc.weight"][-1] = 7
    state = convert_checkpoint(published, model=tiny_detector("dino", num_classes=91)).state
    assert torch.equal(state[LABELS], weights[LABELS])
    state = convert_checkpoint(published).state
    assert torch.equal(state[LABELS][:11], weights[LABELS][1:12])


@pytest.mark.parametrize("layout", ["detr", "huggingface_detr"])
def test_80_classes_can_be_written_with_category_numbers(layout: str) -> None:
    weights = random_weights(detr(num_classes=80))
    published = export_checkpoint(weights, layout, coco_ids=True)
    assert_equal(convert_checkpoint(published).state, weights)
    name = "class_embed.bias" if layout == "detr" else "class_labels_classifier.bias"
    assert len(published[name]) == 92 and published[name][[0, 12, 83]].eq(-20).all()


def test_other_classes_have_no_category_numbers() -> None:
    weights = random_weights(detr(num_classes=7))
    with pytest.raises(UserError, match=r"my.pth cannot .*facebookresearch/detr.*has 8 rows"):
        export_checkpoint(weights, "detr", coco_ids=True, source="my.pth")


def test_an_evaluation_refuses_other_classes_and_says_how_many_there_are() -> None:
    published = export_checkpoint(random_weights(detr(num_classes=7)), "detr")
    with pytest.raises(UserError, match=r"7 classes instead of 5.*set model\.num_classes=7"):
        convert_checkpoint(published, model=detr())


def test_classes_that_are_chosen_by_name() -> None:
    weights = random_weights(detr(num_classes=80))
    names = coco_class_names()
    conversion = convert_checkpoint(
        export_checkpoint(weights, "detr"),
        model=detr(num_classes=2),
        class_names=["dog", "cat"],
    )
    rows = [names.index("dog"), names.index("cat"), 80]
    assert torch.equal(conversion.state[HEAD], weights[HEAD][rows])
    assert conversion.class_names == ("dog", "cat")


@pytest.mark.parametrize(
    ("theirs", "layout", "ours", "classes"),
    [
        (two_stage, "deformable_detr", detr, "91 classes instead of 5"),
        (detr, "detr", two_stage, "91 classes instead of 5"),
    ],
)
def test_classes_of_the_file_are_counted_as_in_its_format(
    theirs: Any, layout: str, ours: Any, classes: str
) -> None:
    """One of them has a row for no object, the other has none."""
    published = export_checkpoint(random_weights(theirs(num_classes=91)), layout)
    with pytest.raises(UserError, match=classes):
        convert_checkpoint(published, model=ours())


def test_classes_of_a_data_set_are_not_changed_by_advice() -> None:
    published = export_checkpoint(random_weights(detr(num_classes=91)), "detr")
    with pytest.raises(UserError, match="trained for other classes .*fine-tune") as error:
        convert_checkpoint(published, model=detr(num_classes=2), class_names=["cell", "dog"])
    assert "num_classes" not in str(error.value)


# Fine-tuning -------------------------------------------------------------------------------------


def test_rows_are_carried_over_by_class_name() -> None:
    weights = random_weights(detr(num_classes=4))
    model = detr(num_classes=3)
    conversion = convert_checkpoint(
        weights,
        model=model,
        source_class_names=["cat", "dog", "cow", "ant"],
        class_names=["cow", "bee", "cat"],
        fresh_heads=True,
    )
    initial = model.state_dict()[HEAD]
    expected = [weights[HEAD][2], initial[1], weights[HEAD][0], weights[HEAD][4]]
    assert torch.equal(conversion.state[HEAD], torch.stack(expected))
    assert "3 of 4 rows carried over by name" in conversion.report.table()
    assert conversion.report.initial == []


def test_heads_of_other_classes_stay_fresh() -> None:
    model = detr()
    published = export_checkpoint(random_weights(detr(num_classes=7)), "detr")
    conversion = convert_checkpoint(published, model=model, fresh_heads=True)
    left = sorted(conversion.report.initial)
    assert left == [HEAD.replace("weight", "bias"), HEAD]
    assert conversion.state.keys() == model.state_dict().keys() - set(left)
    assert "rows of other classes" in conversion.report.table()
    assert "left at their initial values" in conversion.report.table()


@pytest.mark.parametrize("names", [("a", "b"), None])
def test_as_many_classes_with_other_names_start_anew_in_training(
    names: tuple[str, ...] | None,
) -> None:
    """Names of 80 classes without names are assumed to be COCO's."""
    count = 80 if names is None else 2
    weights = random_weights(detr(num_classes=count))
    given: Any = dict(
        model=detr(num_classes=count),
        class_names=[f"own {number}" for number in range(count)],
        source_class_names=names,
    )
    assert HEAD not in convert_checkpoint(weights, fresh_heads=True, **given).state
    assert torch.equal(convert_checkpoint(weights, **given).state[HEAD], weights[HEAD])


def test_the_first_rows_of_a_proposal_head_are_carried_over_whatever_the_classes() -> None:
    weights = random_weights(two_stage(num_classes=7))
    model = two_stage()
    published = export_checkpoint(weights, "deformable_detr")
    state = convert_checkpoint(published, model=model, fresh_heads=True).state
    assert torch.equal(state[PROPOSAL_HEAD], weights[PROPOSAL_HEAD][:5])
    assert HEAD not in state


def test_another_number_of_queries_stays_fresh_in_training_alone() -> None:
    published = export_checkpoint(random_weights(detr(num_queries=9)), "detr")
    conversion = convert_checkpoint(published, model=detr(), fresh_heads=True)
    assert conversion.report.initial == [QUERIES]
    assert "9 queries instead of 6" in conversion.report.table()
    text = r"query_embed.weight: 9x16 instead of 6x16\); set model.detector.queries.num_queries=9"
    with pytest.raises(UserError, match=text):
        convert_checkpoint(published, model=detr())


# What does not fit -------------------------------------------------------------------------------


def test_another_model_is_refused_with_both_names() -> None:
    published = export_checkpoint(random_weights(detr(num_classes=7)), "detr")
    with pytest.raises(UserError) as error:
        convert_checkpoint(
            published,
            model=tiny_detector("dino"),
            source="The checkpoint detr.pth",
            target="the model of configs/dino.py",
        )
    text = str(error.value)
    assert text.startswith(
        "The checkpoint detr.pth (DETR of facebookresearch/detr) does not fit the model of "
        "configs/dino.py: "
    )
    assert "\n" not in text and text.endswith("train.allow_partial_checkpoint=True.")
    # More than the number of classes would have to change.
    assert "num_classes" not in text


@pytest.mark.parametrize("missing", [True, False])
def test_one_weight_too_few_or_too_many_is_an_error(missing: bool) -> None:
    weights = random_weights(detr())
    if missing:
        del weights["detector.encoder.layers.0.feedforward.expand.bias"]
        text = r"nothing for 1 weight of the model \(detector.encoder.layers.0.feedforward"
    else:
        weights["detector.encoder.layers.0.further.weight"] = torch.ones(1)
        text = r"1 of its weights has no place there \(detector.encoder.layers.0.further.weight"
    with pytest.raises(UserError, match=text):
        convert_checkpoint(weights, model=detr())
    report = convert_checkpoint(weights, model=detr(), allow_partial=True).report
    assert len(report.initial) == missing and len(report.unexpected) == (not missing)


def test_a_part_is_taken_where_that_is_allowed() -> None:
    published = export_checkpoint(random_weights(detr()), "detr")
    model = tiny_detector("dino")
    conversion = convert_checkpoint(published, model=model, allow_partial=True)
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    assert all(shapes[name] == tensor.shape for name, tensor in conversion.state.items())
    assert "detector.backbone.stem.conv1.weight" in conversion.state
    assert conversion.report.read == len(published)
    assert conversion.report.filled + len(conversion.report.initial) == len(shapes)


def test_copies_that_differ_are_refused() -> None:
    published = export_checkpoint(random_weights(two_stage()), "deformable_detr")
    key = "transformer.decoder.class_embed.0.bias"
    published[key] = published[key] + 1
    with pytest.raises(UserError, match=rf"1 of its weights should be a copy \({key}\)"):
        convert_checkpoint(published, model=two_stage())


def test_a_missing_part_of_a_joined_weight_is_named() -> None:
    published = export_checkpoint(random_weights(detr()), "huggingface_detr")
    gone = next(key for key in published if key.endswith("encoder.layers.1.self_attn.k_proj.bias"))
    del published[gone]
    with pytest.raises(UserError, match="2 of its weights lack their other parts"):
        convert_checkpoint(published, model=detr())


def test_the_given_format_goes_before_the_keys() -> None:
    published = export_checkpoint(random_weights(detr()), "detr")
    for name in ("sparse_detr", "efficient_detr"):
        with pytest.raises(UserError, match=rf"x.pth is not .*{name} .*are those of detr .*--from"):
            convert_checkpoint(published, source_format=name, source="x.pth")
    unknown = {"rpn.a": torch.ones(1)}
    with pytest.raises(UserError, match=r"not of the format smca .*\(rpn.a, .*--from"):
        convert_checkpoint(unknown, source_format="smca")
    with pytest.raises(UserError, match="no backbone of the format dat: .*--from"):
        convert_checkpoint(published, source_format="dat")


def test_unknown_keys_are_refused_by_name() -> None:
    with pytest.raises(UserError, match=r"^x.pth is none for any model: its keys \(rpn.a\, \.\.\."):
        convert_checkpoint({"rpn.a": torch.ones(1)}, source="x.pth", target="any model")


def test_a_layout_without_a_place_is_named() -> None:
    with pytest.raises(UserError, match=r"x.pth cannot be written as Sparse DETR .*no place for"):
        export_checkpoint(random_weights(detr()), "sparse_detr", source="x.pth")


@pytest.mark.parametrize(
    ("family", "layout"),
    [
        ("detr", "smca"),
        ("detr", "smca_conv"),
        ("sparse_detr", "deformable_detr"),
        ("deformable_detr", "sparse_detr"),
        ("deformable_detr", "dino"),
    ],
)
def test_a_model_is_written_as_nothing_else(family: str, layout: str) -> None:
    weights = random_weights(tiny_detector(family))
    with pytest.raises(UserError, match=r"^x.pth cannot be written as [^\n]*\.$"):
        export_checkpoint(weights, layout, source="x.pth")


@pytest.mark.parametrize("layout", ["huggingface_deformable_detr", "detrex_deformable_detr"])
def test_efficient_detr_is_in_no_library(layout: str) -> None:
    weights = random_weights(two_stage())
    name = "detector.queries.projection.weight"
    weights[name] = weights[name][: len(weights[name]) // 2]
    with pytest.raises(UserError, match="has no Efficient DETR"):
        export_checkpoint(weights, layout)
    assert export_checkpoint(weights, "deformable_detr")


def test_counts_of_trained_norms_are_not_needed() -> None:
    trained = detr(backbone=tiny_resnet("BN"))
    weights = random_weights(detr())
    published = export_checkpoint(weights, "detr")
    state = convert_checkpoint(published, model=trained).state
    assert state.keys() == weights.keys()
    own = random_weights(trained)
    assert convert_checkpoint(own, model=detr()).state.keys() == weights.keys()


# Backbones ---------------------------------------------------------------------------------------


def test_the_backbone_of_a_detector_alone() -> None:
    weights = random_weights(detr())
    published = export_checkpoint(weights, "detr")
    conversion = convert_checkpoint(published, source_format="torchvision_resnet")
    inside = {name: weights[name] for name in weights if name.startswith("detector.backbone.")}
    assert_equal(conversion.state, inside)
    assert conversion.format is None and conversion.report.read == len(published)
    back = export_checkpoint(conversion.state, "torchvision_resnet")
    assert back.keys() == {key[16:] for key in published if key.startswith("backbone.0.body.")}


def foreign(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """A detector that nobody knows, with a ResNet."""
    backbone = export_checkpoint(weights, "torchvision_resnet")
    parts = {"transformer.encoder.a": torch.ones(1), "query_head.b": torch.ones(1)}
    return {f"backbone.0.body.{key}": backbone[key] for key in backbone} | parts


@pytest.mark.parametrize("given", [True, False])
def test_only_the_backbone_of_an_unknown_detector_is_no_default(given: bool) -> None:
    weights = random_weights(detr())
    model = detr() if given else None
    inside = {name: weights[name] for name in weights if name.startswith("detector.backbone.")}
    text = (
        r"^x.pth \(torchvision's ResNet .*configs/y.py has no use for its transformer, query_head; "
        r".*--from torchvision_resnet, --allow-partial or train.allow_partial_checkpoint=True\.$"
    )
    with pytest.raises(UserError, match=text):
        convert_checkpoint(foreign(weights), model=model, source="x.pth", target="configs/y.py")
    for how in ({"allow_partial": True}, {"source_format": "torchvision_resnet"}):
        conversion = convert_checkpoint(foreign(weights), model=model, **how)
        assert_equal(conversion.state, inside)
        assert set(conversion.report.initial) == (
            weights.keys() - inside.keys() if given else set()
        )
    with pytest.raises(UserError, match=r"^x.pth has no backbone of the format dat"):
        convert_checkpoint(foreign(weights), model=model, source="x.pth", source_format="dat")
    # Also from a detector of ours, whose names the model has.
    taken = convert_checkpoint(weights, model=model, source_format="detectron2_resnet")
    assert_equal(taken.state, inside)


def test_an_unknown_part_of_a_backbone_is_named() -> None:
    published = export_checkpoint(random_weights(detr()), "torchvision_resnet")
    with pytest.raises(UserError, match=r"x.pth cannot .*ResNet .*has no layer1.0.odd"):
        convert_checkpoint(published | {"layer1.0.odd": torch.ones(1)}, source="x.pth")


def test_a_backbone_that_the_model_lacks_is_refused_with_both_names() -> None:
    swin = {
        "patch_embed.proj.weight": torch.ones(96, 3, 4, 4),
        "layers.0.blocks.0.attn.qkv.weight": torch.ones(288, 96),
    }
    with pytest.raises(UserError, match=r"^x.pth \(Swin .*the model of detr.py has none"):
        convert_checkpoint(swin, model=detr(), source="x.pth", target="the model of detr.py")
