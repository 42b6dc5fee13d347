"""Numbers of the official implementations, tensor by tensor.

Every folder given by `--golden` (by default `tests/golden`) is read; the kind of a fixture comes
from the `family` and `mode` of its JSON, the model from its `config`. Each tensor that a fixture
lists must be compared: the test fails on one that nobody looked at.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from efficient_detr.checkpoint import convert_keys, detrex
from efficient_detr.losses import SideDistanceForeground
from efficient_detr.meta_arch import EfficientDETR
from efficient_detr.modeling.queries.denoising import DenoisingNoise
from efficient_detr.structures import Queries, Targets, gather_tokens
from tests.golden_models import Comparison, Fixture, build_model
from tests.golden_operators import compare_deformable_attention

# Absolute and relative tolerances, as the fixtures suggest them.
FEATURES, BOXES, PIXELS = 5e-5, 5e-6, 2e-3
LOSSES, GRADIENT_NORMS = 5e-5, 2e-3
# The training fixtures suggest none for predictions. Three layers of refinement of thin boxes
# magnify rounding: two correct float32 formulations of deformable sampling differ by 5e-5 there.
TRAINING_FEATURES, TRAINING_BOXES = 3e-4, 3e-5
# The score head starts with a layer norm, which undoes the top-down modulation up to its epsilon:
# the gradient is about 1e-6. In float64 its norm is 1.14567e-6; an element of the official float32
# one is off by a tenth.
MODULATION_GRADIENT = 3e-2

# tests/ops/test_lsh_clustering.py compares with these.
COMPARED_ELSEWHERE = ("act_attention",)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "golden_file" in metafunc.fixturenames:
        folders = metafunc.config.getoption("--golden") or [Path(__file__).parent / "golden"]
        files = [file for folder in folders for file in sorted(Path(folder).glob("*.json"))]
        files = [file for file in files if not file.stem.startswith(COMPARED_ELSEWHERE)]
        metafunc.parametrize("golden_file", files, ids=[file.stem for file in files])


def test_golden(golden_file: Path) -> None:
    fixture = Fixture.load(golden_file)
    comparison = Comparison(fixture)
    if fixture.info["family"] == "ms_deform_attn_op":
        compare_deformable_attention(comparison)
    elif fixture.info["mode"] == "eval":
        compare_evaluation(build_model(fixture), comparison)
    elif fixture.info["mode"] == "train":
        compare_training(build_model(fixture), comparison)
    else:
        pytest.fail(f"unknown mode {fixture.info['mode']!r} in {golden_file}")
    assert comparison.compared, f"{golden_file} lists no tensors"
    assert fixture.names - comparison.compared == set(), "tensors that no comparison looked at"


def test_default_fixtures_are_complete() -> None:
    names = {file.stem for file in (Path(__file__).parent / "golden").glob("*.json")}
    assert names >= {"dino_tiny", "dino_tiny_train", "focus_detr_tiny", "focus_detr_tiny_train"}
    assert "ms_deform_attn_op" in names


def test_unknown_family_fails() -> None:
    with pytest.raises(ValueError, match="unknown family 'fcos'"):
        build_model(Fixture(info={"family": "fcos", "mode": "eval"}, tensors={}))


class Recorder:
    """Keeps every output (or input) of modules and methods while a model runs."""

    def __init__(self) -> None:
        self.calls: dict[str, list[Any]] = {}

    def output(self, name: str, module: nn.Module | None) -> None:
        if module is not None:
            module.register_forward_hook(lambda _m, _i, out: self._keep(name, out))

    def input(self, name: str, module: nn.Module) -> None:
        module.register_forward_pre_hook(lambda _m, args: self._keep(name, args[0]))

    def method(self, name: str, owner: nn.Module, method: str) -> None:
        original: Callable[..., Any] = getattr(owner, method)

        def spy(*args: Any) -> Any:
            result = original(*args)
            self._keep(name, result)
            return result

        setattr(owner, method, spy)

    def _keep(self, name: str, value: Any) -> None:
        self.calls.setdefault(name, []).append(value)

    def one(self, name: str) -> Any:
        (value,) = self.calls[name]
        return value


def record(model: EfficientDETR) -> Recorder:
    """Attach a recorder to everything that the fixtures know."""
    recorder, detector = Recorder(), model.detector
    recorder.output("neck", detector.neck)
    recorder.output("positions", detector.tokenizer.position_embedding)
    recorder.output("tokens", detector.tokenizer)
    recorder.output("memory", detector.encoder)
    recorder.output("proposals", detector.proposals)
    recorder.method("proposal_indices", detector.queries, "select")
    recorder.output("queries", detector.queries)
    recorder.output("states", detector.decoder.norm)
    recorder.output("decoder", detector.decoder)
    recorder.output("denoising", detector.denoising)
    recorder.method("detections", model.postprocessor, "select")
    for layer in detector.encoder.layers:
        recorder.output("encoder_layers", layer)
        if hasattr(layer, "object_attention"):
            recorder.method("object_indices", layer.object_attention, "select")
            recorder.input("object_attended", layer.object_attention.norm)
            recorder.output("object_normed", layer.object_attention.norm)
    if detector.selection is not None:
        recorder.output("selection", detector.selection)
        recorder.input("modulated", detector.selection.score_head)
        recorder.output("object_scores", detector.encoder.object_score)
    return recorder


def compare_evaluation(model: EfficientDETR, comparison: Comparison) -> None:
    """The forward pass without and with padding mask, then detections."""
    fixture = comparison.fixture
    full = [tuple(fixture.info["padded_hw"])] * fixture.info["batch"]
    for run, sizes in (("eval/", full), ("evalmask/", fixture.image_sizes)):
        recorder = record(model)
        with torch.no_grad():
            output = model.detector(fixture.images, fixture.padding_mask(sizes))
            if comparison.has(run + "det/topk_scores"):
                compare_detections(model, output.prediction, recorder, comparison, run)
        compare_tokens(recorder, comparison, run)
        if comparison.has(run + "fts/scores_masked_flat"):
            compare_selection(recorder, comparison, run)
        elif comparison.has(run + "enc/layer0/out"):
            outputs = recorder.calls["encoder_layers"]
            comparison.close(run + "enc/layer0/out", outputs[0], FEATURES)
        comparison.close(run + "enc/memory", recorder.one("memory").memory.features, FEATURES)
        compare_proposals(recorder, comparison, run)
        compare_decoder(recorder, comparison, run)
        model = build_model(fixture)  # without hooks


def compare_tokens(recorder: Recorder, comparison: Comparison, run: str) -> None:
    tokens = recorder.one("tokens")
    for level, (height, width) in enumerate(tokens.spatial_shapes):
        if comparison.has(f"{run}neck/level{level}"):
            comparison.close(f"{run}neck/level{level}", recorder.one("neck")[level], FEATURES)
            # A dimension of 1 in the fixture means: the same for all images.
            positions = recorder.calls["positions"][level]
            expected = comparison.fixture.tensors[f"{run}pos_embed/level{level}"]
            if len(expected) == 1:
                assert torch.equal(positions, positions[:1].expand_as(positions))
            comparison.close(f"{run}pos_embed/level{level}", positions[: len(expected)], FEATURES)
        mask = tokens.split(tokens.padding_mask)[level].unflatten(1, (height, width))
        comparison.equal(f"{run}mask/level{level}", mask)
    if comparison.has(run + "spatial_shapes"):
        comparison.equal(run + "spatial_shapes", torch.tensor(tokens.spatial_shapes))
        comparison.close(run + "valid_ratios", tokens.valid_ratios, BOXES)
        points = tokens.reference_points
        expected = comparison.fixture.tensors[run + "enc_reference_points"]
        if len(expected) == 1:
            assert torch.equal(points, points[:1].expand_as(points))
        comparison.close(run + "enc_reference_points", points[: len(expected)], BOXES)


def rows_of(indices: Tensor, wanted: Tensor) -> Tensor:
    """(B, N) rows at which `indices` (B, N) holds each entry of `wanted` (B, N), image by image."""
    order = indices.argsort(1)
    return order.gather(1, torch.searchsorted(indices.gather(1, order), wanted))


def compare_selection(recorder: Recorder, comparison: Comparison, run: str) -> None:
    """Token scores, kept tokens of each layer, and the layers' outputs for them."""
    selection = recorder.one("selection")
    for level, logits in enumerate(selection.level_logits):
        comparison.close(f"{run}fts/level{level}_score_logits", logits, FEATURES)
        if comparison.has(f"{run}fts/level{level}_modulated_in"):
            inputs = recorder.calls["modulated"][::-1]
            comparison.close(f"{run}fts/level{level}_modulated_in", inputs[level], FEATURES)
    comparison.close(run + "fts/scores_masked_flat", selection.scores, FEATURES)
    comparison.equal(run + "fts/focus_token_nums", selection.counts)
    for layer, indices in enumerate(selection.indices):
        expected = comparison.expect(f"{run}fts/layer{layer}_selected_inds").long()
        comparison.same_set(f"layer {layer}", indices, expected)
        for image, count in enumerate(selection.counts.tolist()):
            head, expected_head = indices[image, :count], expected[image, :count]
            comparison.same_set(f"layer {layer} image {image}", head[None], expected_head[None])
        compare_layer(recorder, comparison, run, layer, rows_of(indices, expected))


def compare_layer(
    recorder: Recorder, comparison: Comparison, run: str, layer: int, rows: Tensor
) -> None:
    """Object scores, object tokens and output of one layer; `rows` puts ours in their order."""
    prefix = f"{run}enc/layer{layer}/"
    scores = recorder.calls["object_scores"][layer]
    comparison.close(prefix + "object_score", scores.gather(1, rows), FEATURES)
    expected = comparison.expect(prefix + "object_topk_inds").long()  # in their order of rows
    objects = recorder.calls["object_indices"][layer]
    wanted = rows.gather(1, expected)  # the same tokens in our order of rows
    comparison.same_set(prefix + "object_topk_inds", objects, wanted)
    if comparison.has(prefix + "oesm_out_normed"):
        aligned = rows_of(objects, wanted)
        for name, key in (
            ("oesm_attn_out_with_residual", "object_attended"),
            ("oesm_out_normed", "object_normed"),
        ):
            ours = gather_tokens(recorder.calls[key][layer], aligned)
            comparison.close(prefix + name, ours, FEATURES)
    if comparison.has(prefix + "layer_out_tokens"):
        ours = gather_tokens(recorder.calls["encoder_layers"][layer], rows)
        comparison.close(prefix + "layer_out_tokens", ours, FEATURES)


def compare_proposals(recorder: Recorder, comparison: Comparison, run: str) -> None:
    proposals, indices = recorder.one("proposals"), recorder.one("proposal_indices")
    queries: Queries = recorder.one("queries")
    assert queries.proposal is not None
    name = run + "two_stage/"
    comparison.close(name + "max_class_logit", proposals.logits.amax(-1), FEATURES)
    comparison.equal(name + "topk_inds", indices)
    comparison.close(name + "enc_boxes_selected", queries.proposal.boxes, BOXES)
    if comparison.has(name + "init_reference"):
        comparison.close(name + "init_reference", queries.reference_boxes, BOXES)
        states = gather_tokens(proposals.features, indices)
        comparison.close(name + "enc_state_selected", states, FEATURES)
        comparison.close(run + "out/enc_logits", queries.proposal.logits, FEATURES)


def compare_decoder(recorder: Recorder, comparison: Comparison, run: str) -> None:
    output = recorder.one("decoder")
    states = torch.stack(recorder.calls["states"])
    comparison.close(run + "dec/inter_states_normed", states, FEATURES)
    comparison.close(run + "dec/inter_references", output.references, BOXES)
    for layer in range(len(output.logits)):
        comparison.close(f"{run}out/layer{layer}_logits", output.logits[layer], FEATURES)
        comparison.close(f"{run}out/layer{layer}_boxes", output.boxes[layer], BOXES)


def compare_detections(
    model: EfficientDETR, prediction: Any, recorder: Recorder, comparison: Comparison, run: str
) -> None:
    """Detections in input pixels, then rescaled by the meta-architecture."""
    instances = model.postprocessor(prediction, comparison.fixture.image_sizes)
    scores, indices = recorder.one("detections")
    comparison.close(run + "det/topk_scores", scores, FEATURES)
    comparison.equal(run + "det/topk_flat_inds", indices)
    for image, detections in enumerate(instances):
        name = f"{run}det/img{image}/boxes_before_rescale"
        comparison.close(name, detections.pred_boxes.tensor.clone(), PIXELS)
    sizes = [{"height": h, "width": w} for h, w in comparison.fixture.info["rescale_hw"]]
    for image, result in enumerate(model.rescale(instances, sizes)):
        name, final = f"{run}det/img{image}/", result["instances"]
        comparison.close(name + "boxes_final", final.pred_boxes.tensor, PIXELS)
        comparison.close(name + "scores_final", final.scores, FEATURES)
        comparison.equal(name + "labels_final", final.pred_classes)


def compare_training(model: EfficientDETR, comparison: Comparison) -> None:
    """Denoising queries, matchings, label maps, losses and gradients."""
    fixture, targets = comparison.fixture, comparison.fixture.targets()
    model.train()
    replay_noise(model, comparison)
    recorder = record(model)
    set_loss = model.losses[0]
    recorder.output("matchings", set_loss.matcher)
    output = model.detector(fixture.images, fixture.padding_mask(fixture.image_sizes), targets)
    losses: dict[str, Tensor] = {}
    for loss in model.losses:
        losses |= loss(output, targets)
    compare_tokens(recorder, comparison, "train/")
    if output.selection is not None:
        compare_selection(recorder, comparison, "train/")
        compare_foreground_labels(model, comparison, output.spatial_shapes, targets)
    compare_proposals(recorder, comparison, "train/")
    compare_denoising(recorder, comparison, output.denoising_groups)
    compare_matchings(recorder.calls["matchings"], comparison)
    compare_targets(targets, comparison)
    compare_losses(losses, fixture.info)
    torch.stack(list(losses.values())).sum().backward()
    compare_gradients(model, comparison)


def replay_noise(model: EfficientDETR, comparison: Comparison) -> None:
    """Let the denoising queries use the recorded random draws."""
    noise = DenoisingNoise(
        label=comparison.expect("train/cdn/noise_label_p"),
        new_labels=comparison.expect("train/cdn/noise_new_label").long(),
        sign=comparison.expect("train/cdn/noise_rand_sign01") * 2 - 1,
        amount=comparison.expect("train/cdn/noise_rand_part"),
    )
    denoising = model.detector.denoising
    assert denoising is not None
    denoising.draw_noise = lambda targets, groups: noise  # type: ignore[method-assign]


def compare_denoising(recorder: Recorder, comparison: Comparison, groups: Any) -> None:
    queries, output = recorder.one("denoising"), recorder.one("decoder")
    meta = comparison.fixture.info["dn_meta"]
    assert (groups.num_groups, 2 * groups.slots) == (meta["dn_num"], meta["single_padding"])
    count = groups.num_queries
    content, boxes = queries.content[:, :count], queries.reference_boxes[:, :count]
    comparison.close("train/cdn/query_label_embed", content, FEATURES)
    logits = comparison.expect("train/cdn/query_bbox_unsigmoid")
    torch.testing.assert_close(boxes, logits.sigmoid(), atol=BOXES, rtol=0)
    comparison.equal("train/cdn/attn_mask", queries.attention_mask)
    name = "train/two_stage/init_reference_with_dn"
    comparison.close(name, queries.reference_boxes, BOXES)
    for layer in range(len(output.logits)):
        name = f"train/out/layer{layer}_"
        comparison.close(name + "logits_with_dn", output.logits[layer], TRAINING_FEATURES)
        comparison.close(name + "boxes_with_dn", output.boxes[layer], TRAINING_BOXES)


def compare_matchings(matchings: list[Any], comparison: Comparison) -> None:
    names = [f"layer{i}" for i in range(len(matchings) - 1)] + ["enc"]
    for name, matching in zip(names, matchings, strict=True):
        for image, (queries, boxes) in enumerate(matching):
            prefix = f"train/match/{name}/img{image}/"
            expected_queries, expected_boxes = (
                comparison.expect(prefix + side).long() for side in ("pred", "gt")
            )
            ours = set(zip(queries.tolist(), boxes.tolist(), strict=True))
            theirs = set(zip(expected_queries.tolist(), expected_boxes.tolist(), strict=True))
            assert ours == theirs, prefix


def compare_targets(targets: list[Targets], comparison: Comparison) -> None:
    """The stored targets are inputs; their two box forms must describe the same boxes."""
    for image, target in enumerate(targets):
        prefix = f"train/target/img{image}/"
        comparison.equal(prefix + "labels", target.labels)
        comparison.close(prefix + "boxes_cxcywh_norm", target.boxes, 0)
        scale = torch.tensor(target.image_size).flip(0).repeat(2)
        center, size = (target.boxes * scale).split(2, dim=1)
        corners = torch.cat([center - size / 2, center + size / 2], dim=1)
        comparison.close(prefix + "boxes_xyxy_abs", corners, 1e-3)


def compare_foreground_labels(
    model: EfficientDETR, comparison: Comparison, shapes: Any, targets: list[Targets]
) -> None:
    rule: SideDistanceForeground = model.losses[1].labels
    compare_label_maps(rule, comparison, "train/fg_label/", shapes, targets)
    extra = comparison.fixture.info.get("labels_extra")
    if extra is None:
        return
    height, width = extra["image_hw"]
    scale = torch.tensor([width, height, width, height])
    extra_targets = []
    for image in range(comparison.fixture.info["batch"]):
        corners = comparison.expect(f"labels_extra/img{image}/boxes_xyxy_abs") / scale
        low, high = corners.split(2, dim=1)
        boxes = torch.cat([(low + high) / 2, high - low], dim=1)
        labels = torch.zeros(len(boxes), dtype=torch.long)
        extra_targets.append(Targets(labels, boxes, (height, width)))
    level_shapes = [(h, w) for h, w in extra["level_shapes"]]
    compare_label_maps(rule, comparison, "labels_extra/", level_shapes, extra_targets)


def compare_label_maps(
    rule: SideDistanceForeground,
    comparison: Comparison,
    prefix: str,
    shapes: list[tuple[int, int]],
    targets: list[Targets],
) -> None:
    images = [rule(shapes, target) for target in targets]
    for level, shape in enumerate(shapes):
        maps = torch.stack([labels[level].unflatten(0, shape) for labels in images])
        comparison.equal(f"{prefix}level{level}", maps)


def compare_losses(losses: dict[str, Tensor], info: dict[str, Any]) -> None:
    ours = {k.replace("loss_foreground", "select_loss"): v.item() for k, v in losses.items()}
    assert ours == pytest.approx(info["loss_weighted"], rel=LOSSES)
    unweighted = {k: v / info["weight_dict"][k] for k, v in ours.items()}
    assert unweighted == pytest.approx(info["loss_unweighted"], rel=LOSSES)
    assert sum(ours.values()) == pytest.approx(info["total_weighted"], rel=LOSSES)


def compare_gradients(model: EfficientDETR, comparison: Comparison) -> None:
    info = comparison.fixture.info
    rules = detrex(info["config"]["dec_layers"])
    gradients = {name: p.grad for name, p in model.named_parameters()}
    expected_norms = convert_keys(info["grad_norm"], rules)
    assert gradients.keys() == expected_norms.keys()
    for name, expected in expected_norms.items():
        gradient = gradients[name]
        if expected is None:
            assert gradient is None, name
        else:
            assert gradient is not None, name
            norm = gradient.norm().item()
            assert norm == pytest.approx(expected, rel=gradient_tolerance(name)), name
    stored = {k: v for k, v in comparison.fixture.tensors.items() if k.startswith("train/grad/")}
    for name in stored:
        ((ours, expected),) = convert_keys(
            {name.removeprefix("train/grad/"): comparison.expect(name)}, rules
        ).items()
        atol = gradient_tolerance(ours) * expected.abs().max().item()
        torch.testing.assert_close(gradients[ours], expected, atol=atol, rtol=0)


def gradient_tolerance(name: str) -> float:
    return MODULATION_GRADIENT if name == "detector.selection.modulation" else GRADIENT_NORMS
