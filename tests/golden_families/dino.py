"""Fixtures of DINO and Focus-DETR as detrex has them: forward passes, or a training step.

Every tensor is named after its run, `eval/`, `evalmask/` or `train/`; weights are under `w/`, the
backbone's maps under `in/`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from efficient_detr.meta_arch import EfficientDETR
from efficient_detr.structures import FeatureTokens, Queries, Targets, gather_tokens
from tests.golden_families.fixture import Comparison, Fixture, rows_of
from tests.golden_families.models import build, builder, last_stages
from tests.golden_families.recorder import Recorder
from tests.tiny_models import padding_mask

# Absolute and relative tolerances, as the fixtures suggest them.
FEATURES, BOXES, PIXELS = 5e-5, 5e-6, 2e-3


# Models ------------------------------------------------------------------------------------------


def dino_arguments(config: dict[str, Any]) -> dict[str, Any]:
    """Arguments of the configs `dino` and `focus_detr` at a fixture's sizes."""
    return dict(
        backbone=None,
        in_features=last_stages(len(config["in_channels"])),
        in_channels=config["in_channels"],
        num_classes=config["num_classes"],
        channels=config["embed_dim"],
        num_heads=config["heads"],
        num_points=config["points"],
        num_levels=config["levels"],
        hidden_channels=config["ffn"],
        decoder_layers=config["dec_layers"],
        num_queries=config["num_queries"],
        num_groups=config["gn_groups"],
        temperature=config["pe_temperature"],
        position_offset=config["pe_offset"],
        num_denoising_queries=config["dn_number"],
        num_detections=config["select_box_nums"],
    )


def dino_config(fixture: Fixture) -> Any:
    arguments = dino_arguments(fixture.config)
    return builder("dino", "dino")(**arguments, encoder_layers=fixture.config["enc_layers"])


def focus_detr_config(fixture: Fixture) -> Any:
    config = fixture.config
    labels = fixture.info.get("fg_assign", {"strides": [8, 16, 32, 64], "limit_range": None})
    ranges = labels["limit_range"] or [[-1, 64], [64, 128], [128, 256], [256, 999999]]
    return builder("focus_detr", "focus_detr")(
        **dino_arguments(config),
        keep_ratio=config["focus_rho"],
        layer_keep_ratios=config["cascade"][: config["enc_layers"]],
        num_object_tokens=config["topk_sa"],
        strides=labels["strides"],
        range_ends=[end for _, end in ranges[:-1]],
    )


def build_model(fixture: Fixture) -> EfficientDETR:
    """The fixture's model with its weights, in evaluation mode."""
    configs = {"dino": dino_config, "focus_detr": focus_detr_config}
    config = configs[fixture.info["family"]](fixture)
    denoising = config.detector.denoising
    denoising.label_noise_ratio = fixture.config["label_noise_ratio"]
    denoising.box_noise_scale = fixture.config["box_noise_scale"]
    return build(config, fixture.group("in/"), fixture.group("w/"))


# Runs --------------------------------------------------------------------------------------------


class DinoRun:
    """A forward pass, recorded, and the names of what it is compared with.

    Args:
        model: the model, not run before.
        comparison: the expected tensors.
        prefix: of their names.
        sizes: (height, width) of the unpadded images.
        targets: ground truth, in training.
    """

    def __init__(
        self,
        model: EfficientDETR,
        comparison: Comparison,
        prefix: str,
        sizes: list[tuple[int, int]],
        targets: list[Targets] | None = None,
    ) -> None:
        self.model, self.detector = model, model.detector
        self.comparison, self.prefix = comparison, prefix
        self.recorder = Recorder(model)
        self.recorder.spy(self.detector.queries, "select")
        self.recorder.spy(model.postprocessor, "select")
        for layer in self.detector.encoder.layers:
            if hasattr(layer, "object_attention"):
                self.recorder.spy(layer.object_attention, "select")
        info = comparison.fixture.info
        height, width = info["padded_hw"]
        images = torch.zeros(info["batch"], 3, height, width)
        mask = padding_mask(sizes, (height, width))
        self.output = self.detector(images, mask, targets)

    def has(self, name: str) -> bool:
        return self.comparison.has(self.prefix + name)

    def expect(self, name: str) -> Tensor:
        return self.comparison.expect(self.prefix + name)

    def close(self, name: str, actual: Tensor, atol: float) -> None:
        self.comparison.close(self.prefix + name, actual, atol)

    def equal(self, name: str, actual: Tensor) -> None:
        self.comparison.equal(self.prefix + name, actual)

    def close_for_all(self, name: str, actual: Tensor, atol: float) -> None:
        """A dimension of 1 in the fixture means: the same for all images."""
        expected = self.expect(name)
        if len(expected) == 1:
            assert torch.equal(actual, actual[:1].expand_as(actual))
        self.close(name, actual[: len(expected)], atol)

    @property
    def tokens(self) -> FeatureTokens:
        return self.recorder.output(self.detector.tokenizer)

    @property
    def queries(self) -> Queries:
        return self.recorder.output(self.detector.queries)


def image_sizes(fixture: Fixture) -> list[tuple[int, int]]:
    return [(height, width) for height, width in fixture.info["image_sizes_hw"]]


def compare_forward(run: DinoRun) -> None:
    """Everything but predictions, which in training include those of denoising queries."""
    compare_tokens(run)
    if run.detector.selection is not None:
        compare_selection(run)
    elif run.has("enc/layer0/out"):
        layer = run.detector.encoder.layers[0]
        run.close("enc/layer0/out", run.recorder.output(layer), FEATURES)
    compare_proposals(run)


def compare_evaluation(comparison: Comparison) -> None:
    """The forward pass without and with padding mask, then detections."""
    fixture = comparison.fixture
    full = [tuple(fixture.info["padded_hw"])] * fixture.info["batch"]
    for prefix, sizes in (("eval/", full), ("evalmask/", image_sizes(fixture))):
        with torch.no_grad():
            run = DinoRun(build_model(fixture), comparison, prefix, sizes)
        compare_forward(run)
        run.close("enc/memory", run.output.memory.features, FEATURES)
        compare_decoder(run)
        if run.has("det/topk_scores"):
            compare_detections(run)


def compare_tokens(run: DinoRun) -> None:
    tokens = run.tokens
    positions = run.recorder.outputs(run.detector.tokenizer.position_embedding)
    for level, (height, width) in enumerate(tokens.spatial_shapes):
        if run.has(f"neck/level{level}"):
            projected = run.recorder.output(run.detector.neck)[level]
            run.close(f"neck/level{level}", projected, FEATURES)
            run.close_for_all(f"pos_embed/level{level}", positions[level], FEATURES)
        mask = tokens.split(tokens.padding_mask)[level].unflatten(1, (height, width))
        run.equal(f"mask/level{level}", mask)
    if run.has("spatial_shapes"):
        run.equal("spatial_shapes", torch.tensor(tokens.spatial_shapes))
        run.close("valid_ratios", tokens.valid_ratios, BOXES)
        run.close_for_all("enc_reference_points", tokens.reference_points, BOXES)


def compare_proposals(run: DinoRun) -> None:
    proposals = run.recorder.output(run.detector.proposals)
    indices = run.recorder.output((run.detector.queries, "select"))
    queries = run.queries
    assert queries.proposal is not None
    run.close("two_stage/max_class_logit", proposals.logits.amax(-1), FEATURES)
    run.equal("two_stage/topk_inds", indices)
    run.close("two_stage/enc_boxes_selected", queries.proposal.boxes, BOXES)
    if run.has("two_stage/init_reference"):
        run.close("two_stage/init_reference", queries.reference_boxes, BOXES)
        states = gather_tokens(proposals.features, indices)
        run.close("two_stage/enc_state_selected", states, FEATURES)
        run.close("out/enc_logits", queries.proposal.logits, FEATURES)


def compare_decoder(run: DinoRun) -> None:
    output = run.recorder.output(run.detector.decoder)
    states = torch.stack(run.recorder.outputs(run.detector.decoder.norm))
    run.close("dec/inter_states_normed", states, FEATURES)
    run.close("dec/inter_references", output.references, BOXES)
    for layer in range(len(output.logits)):
        run.close(f"out/layer{layer}_logits", output.logits[layer], FEATURES)
        run.close(f"out/layer{layer}_boxes", output.boxes[layer], BOXES)


def compare_detections(run: DinoRun) -> None:
    """Detections in input pixels, then rescaled by the meta-architecture."""
    model, fixture, prediction = run.model, run.comparison.fixture, run.output.prediction
    instances = model.postprocessor(prediction, image_sizes(fixture))
    scores, queries, classes = run.recorder.output((model.postprocessor, "select"))
    run.close("det/topk_scores", scores, FEATURES)
    run.equal("det/topk_flat_inds", queries * prediction.logits.shape[-1] + classes)
    for image, detections in enumerate(instances):
        boxes = detections.pred_boxes.tensor.clone()
        run.close(f"det/img{image}/boxes_before_rescale", boxes, PIXELS)
    sizes = [{"height": h, "width": w} for h, w in fixture.info["rescale_hw"]]
    for image, result in enumerate(model.rescale(instances, sizes)):
        name, final = f"det/img{image}/", result["instances"]
        run.close(name + "boxes_final", final.pred_boxes.tensor, PIXELS)
        run.close(name + "scores_final", final.scores, FEATURES)
        run.equal(name + "labels_final", final.pred_classes)


# Focus-DETR's token selection --------------------------------------------------------------------


def compare_selection(run: DinoRun) -> None:
    """Token scores, kept tokens of each layer, and the layers' outputs for them."""
    selector = run.detector.selection
    selection = run.recorder.output(selector)
    coarse_to_fine = run.recorder.inputs(selector.score_head)
    for level, logits in enumerate(selection.level_logits):
        run.close(f"fts/level{level}_score_logits", logits, FEATURES)
        if run.has(f"fts/level{level}_modulated_in"):
            modulated = coarse_to_fine[-1 - level]["features"]
            run.close(f"fts/level{level}_modulated_in", modulated, FEATURES)
    run.close("fts/scores_masked_flat", selection.scores, FEATURES)
    run.equal("fts/focus_token_nums", selection.counts)
    for layer, indices in enumerate(selection.indices):
        expected = run.expect(f"fts/layer{layer}_selected_inds").long()
        run.comparison.same_set(f"layer {layer}", indices, expected)
        for image, count in enumerate(selection.counts.tolist()):
            ours, theirs = indices[image, :count], expected[image, :count]
            run.comparison.same_set(f"layer {layer} image {image}", ours[None], theirs[None])
        compare_layer(run, layer, rows_of(indices, expected))


def compare_layer(run: DinoRun, index: int, rows: Tensor) -> None:
    """Object scores, object tokens and output of one layer; `rows` puts ours in their order."""
    prefix, layer = f"enc/layer{index}/", run.detector.encoder.layers[index]
    scores = run.recorder.outputs(run.detector.encoder.object_score)[index]
    run.close(prefix + "object_score", scores.gather(1, rows), FEATURES)
    expected = run.expect(prefix + "object_topk_inds").long()  # in their order of rows
    objects = run.recorder.output((layer.object_attention, "select"))
    wanted = rows.gather(1, expected)  # the same tokens in our order of rows
    run.comparison.same_set(prefix + "object_topk_inds", objects, wanted)
    if run.has(prefix + "oesm_out_normed"):
        aligned, norm = rows_of(objects, wanted), layer.object_attention.norm
        attended = gather_tokens(run.recorder.arguments(norm)["input"], aligned)
        run.close(prefix + "oesm_attn_out_with_residual", attended, FEATURES)
        normed = gather_tokens(run.recorder.output(norm), aligned)
        run.close(prefix + "oesm_out_normed", normed, FEATURES)
    if run.has(prefix + "layer_out_tokens"):
        updated = gather_tokens(run.recorder.output(layer), rows)
        run.close(prefix + "layer_out_tokens", updated, FEATURES)
