"""Fixtures of Deformable DETR: plain, with box refinement, and with two stages."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from efficient_detr.meta_arch import EfficientDETR
from efficient_detr.structures import Queries, gather_tokens
from tests.golden_families.detr import backbone_maps
from tests.golden_families.fixture import Comparison, Fixture, Reader
from tests.golden_families.models import build, builder, transformer_arguments
from tests.golden_families.transformer import (
    Run,
    compare_evaluation,
    compare_predictions,
    compare_training,
)


def deformable_arguments(config: dict[str, Any]) -> dict[str, Any]:
    """Arguments of the configs `deformable_detr*` and `sparse_detr` at a fixture's sizes."""
    return dict(
        transformer_arguments(config),
        num_classes=config["num_classes"],
        num_levels=config["num_feature_levels"],
        encoder_points=config["enc_n_points"],
        decoder_points=config["dec_n_points"],
    )


def deformable_detr_config(fixture: Fixture) -> Any:
    config = fixture.config
    name = "deformable_detr"
    if config["with_box_refine"]:
        name += "_two_stage" if config["two_stage"] else "_refine"
    return builder("deformable_detr", name)(**deformable_arguments(config))


def build_deformable_detr(fixture: Fixture) -> EfficientDETR:
    config = deformable_detr_config(fixture)
    return build(config, backbone_maps(fixture), fixture.weights(), fixture.info)


class DeformableRun(Run):
    """A run whose attention samples points."""

    @property
    def queries(self) -> Queries:
        return self.recorder.output(self.model.detector.queries)

    def encoder_samples(self, layer: int) -> tuple[Tensor, Tensor]:
        """Where the tokens look in an encoder layer, and how much, in the layout of a decoder's."""
        attention = self.model.detector.encoder.layers[layer].attention
        given = self.recorder.arguments(attention)
        query = given["query"] + given["position"]
        locations = attention.sampling_locations(query, given["reference_points"], given["memory"])
        weights = attention.attention_weights(query).unflatten(-1, (attention.num_heads, -1))
        return locations, weights.softmax(-1).view(locations.shape[:-1])

    def decoder_samples(self, layer: int) -> tuple[Tensor, Tensor]:
        """Locations (B, Q, H, L, P, 2) and weights (B, Q, H, L, P) of a decoder layer."""
        attention = self.model.detector.decoder.layers[layer].cross_attention
        given = self.recorder.arguments(attention)
        names = ("query", "position", "reference_boxes", "memory")
        return attention.sampling(*(given[name] for name in names))

    def level_starts(self) -> Tensor:
        sizes = torch.tensor(self.tokens.level_sizes)
        return sizes.cumsum(0) - sizes

    def selected(self) -> Tensor:
        """(B, Q) indices of the proposals that became queries."""
        return self.recorder.output((self.model.detector.queries, "select"))

    def selected_scores(self) -> Tensor:
        """(B, Q) their scores."""
        scores = self.recorder.arguments((self.model.detector.queries, "select"))["scores"]
        return gather_tokens(scores, self.selected())

    def deformable_stages(self) -> dict[str, Reader]:
        """Readers of what the fixtures of models with deformable attention have in common."""
        return self.stages() | {
            r"inter/spatial_shapes": lambda: torch.tensor(self.tokens.spatial_shapes),
            r"inter/level_start_index": self.level_starts,
            r"inter/valid_ratios": lambda: self.tokens.valid_ratios,
            r"inter/enc_reference_points": lambda: self.tokens.reference_points,
            r"inter/enc(\d+)_sampling_locations\.first(\d+)": (
                lambda layer, count: self.encoder_samples(layer)[0][:, :count]
            ),
            r"inter/enc(\d+)_attention_weights\.first(\d+)": (
                lambda layer, count: self.encoder_samples(layer)[1][:, :count]
            ),
            r"inter/dec(\d+)_sampling_locations": lambda layer: self.decoder_samples(layer)[0],
            r"inter/dec(\d+)_attention_weights": lambda layer: self.decoder_samples(layer)[1],
            r"inter/dec_tgt_in": lambda: self.queries.content,
            r"inter/dec_query_pos": lambda: self.queries.position,
            r"inter/init_reference": lambda: self.queries.reference_boxes,
            r"inter/inter_references": lambda: self.output.decoder.references,
        }

    def proposals(self) -> dict[str, Reader]:
        """Readers of the first of two stages."""
        head = self.model.detector.proposals
        return {
            r"inter/enc_output_memory": lambda: self.recorder.output(head).features,
            r"inter/output_proposals_unact": lambda: head.anchor_logits(self.memory),
            r"inter/enc_outputs_class": lambda: self.recorder.output(head).logits,
            r"inter/enc_outputs_coord_unact": lambda: self.recorder.output(head).box_logits,
            r"inter/topk_idx": self.selected,
            r"inter/topk_score": self.selected_scores,
            r"out/enc_boxes": lambda: self.output.proposal.boxes,
            r"out/enc_logits": lambda: self.output.proposal.logits,
        }


def spies(model: EfficientDETR) -> list[tuple[Any, str]]:
    """Methods to record: the choice of proposals, if there is one."""
    queries = model.detector.queries
    return [(queries, "select")] if queries.needs_proposals else []


def compare(comparison: Comparison) -> None:
    fixture = comparison.fixture
    model = build_deformable_detr(fixture).train()
    run = DeformableRun.start(model, fixture, spies(model))
    comparison.read(run.deformable_stages() | run.proposals())
    compare_predictions(run, comparison)
    compare_training(run, comparison)
    compare_evaluation(build_deformable_detr(fixture), comparison, ordered=False)
