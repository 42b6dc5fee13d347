"""Fixtures of Sparse DETR, with its efficient options or without."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
from detectron2.config import LazyCall as L
from torch import Tensor

from efficient_detr.losses.token_attention import attended_tokens, kept_attention
from efficient_detr.meta_arch import EfficientDETR
from efficient_detr.modeling.attention.token_attention import token_attention_map
from efficient_detr.modeling.queries import (
    BestClassScore,
    BoxEmbeddedQueries,
    FirstClassScore,
    MemoryContentQueries,
)
from efficient_detr.structures import TokenSelection, gather_tokens
from tests.golden_families.deformable_detr import DeformableRun, deformable_arguments, spies
from tests.golden_families.detr import backbone_maps
from tests.golden_families.fixture import Comparison, Fixture, Reader, rows_of
from tests.golden_families.models import build, builder
from tests.golden_families.training import LOSSES
from tests.golden_families.transformer import (
    compare_evaluation,
    compare_predictions,
    compare_training,
)


def sparse_detr_config(fixture: Fixture) -> Any:
    config = fixture.config
    arguments = deformable_arguments(config)
    model = builder("sparse_detr", "sparse_detr")(keep_ratio=config["rho"], **arguments)
    model.detector.queries = L(
        MemoryContentQueries if config["eff_query_init"] else BoxEmbeddedQueries
    )(
        num_queries=config["num_queries"],
        channels=config["d_model"],
        score=L(BestClassScore if config["eff_specific_head"] else FirstClassScore)(),
    )
    if not config["use_enc_aux_loss"]:
        model.detector.encoder_heads = None
    return model


def build_sparse_detr(fixture: Fixture) -> EfficientDETR:
    config = sparse_detr_config(fixture)
    return build(config, backbone_maps(fixture), fixture.weights(), fixture.info)


class SparseRun(DeformableRun):
    """A run whose encoder updates the tokens of a selection."""

    @property
    def selection(self) -> TokenSelection:
        return self.recorder.output(self.model.detector.selection)

    def aligned(self, values: Tensor, expected_indices: Tensor) -> Tensor:
        """Rows (B, N, ...) of our selected tokens, in the order of the expected ones (B, N)."""
        return gather_tokens(values, rows_of(self.selection.indices[0], expected_indices))

    def samples(self, kind: int) -> Tensor:
        """(B, layers, Q, ...) sampling locations (0) or weights (1) of all decoder layers."""
        layers = range(len(self.model.detector.decoder.layers))
        return torch.stack([self.decoder_samples(layer)[kind] for layer in layers], dim=1)

    def attention_map(self, layer: int, head: int) -> Tensor:
        """(B, S) attention that each token gets in a head of a decoder layer."""
        shapes = self.tokens.spatial_shapes
        return token_attention_map(*self.decoder_samples(layer), shapes)[:, head]

    def attended(self) -> Tensor:
        """(B, S) target of the token scores."""
        attention, mask = self.output.decoder.token_attention, self.tokens.padding_mask
        return attended_tokens(attention, mask, self.selection.counts)

    def sparse_stages(self) -> dict[str, Reader]:
        detector = self.model.detector
        anchors = detector.proposals.anchor_logits
        tokens = self.tokens
        located = tokens.features + tokens.positions
        return {
            r"inter/valid_token_nums": lambda: (~tokens.padding_mask).sum(1),
            r"inter/sparse_token_nums": lambda: self.selection.counts,
            r"inter/backbone_output_memory": lambda: detector.proposals.transform(tokens, located),
            r"inter/backbone_output_proposals_unact": lambda: anchors(tokens),
            r"inter/mask_predictor_raw": lambda: torch.cat(self.selection.level_logits, dim=1),
            r"inter/backbone_mask_prediction": lambda: self.selection.scores,
            r"inter/dec_sampling_locations": lambda: self.samples(0),
            r"inter/dec_attention_weights": lambda: self.samples(1),
            r"inter/dam_layer(\d+)_head(\d+)": self.attention_map,
            r"inter/dam": lambda: self.output.decoder.token_attention,
            r"inter/dam_target": self.attended,
        }

    def selected_tokens(self, expected_indices: Tensor) -> dict[str, Reader]:
        """Readers of what the encoder computes for the selected tokens, in the expected order."""

        def auxiliary(kind: str, layer: int) -> Tensor:
            prediction = self.output.encoder_layers[layer]
            return self.aligned(getattr(prediction, kind), expected_indices)

        return {
            r"inter/enc_layer_tgt\.(\d+)": (
                lambda layer: self.aligned(self.encoder_layer(layer), expected_indices)
            ),
            r"out/enc_aux_(logits|boxes)\.(\d+)": auxiliary,
        }


def compare_selection(run: SparseRun, comparison: Comparison) -> Tensor:
    """Compare the selected tokens of every image; returns the expected ones (B, N), best first."""
    name = "inter/backbone_topk_proposals"
    expected = comparison.expect(name).long()
    for indices in run.selection.indices:
        comparison.same_set(name, indices, expected)
        for image, count in enumerate(run.selection.counts.tolist()):
            ours, theirs = indices[image, :count], expected[image, :count]
            comparison.same_set(f"{name}, image {image}", ours[None], theirs[None])
    return expected


def compare_kept_attention(run: SparseRun, comparison: Comparison) -> None:
    """Compare how much of the decoder's attention the selection has caught, for the log.

    The authors count the rows that fill up the selection of a smaller image as selected, and divide
    zero by zero where a level gets no attention.
    """
    indices = run.selection.indices[0]
    all_rows = torch.full_like(run.selection.counts, indices.shape[1])
    selection = dataclasses.replace(run.selection, counts=all_rows)
    attention = run.output.decoder.token_attention
    everywhere, levels = kept_attention(selection, attention, run.memory)
    logged = {"all": everywhere.mean()} | {str(i): v for i, v in enumerate(levels.mean(0))}
    ours = {f"corr_mask_attn_map_dec_{name}": value.item() for name, value in logged.items()}
    losses = comparison.fixture.info["loss"]["losses"]
    expected = {
        name: value
        for name, value in losses.items()
        if name.startswith("corr_") and not math.isnan(value)
    }
    assert {name: ours[name] for name in expected} == pytest.approx(expected, rel=LOSSES, abs=1e-6)


def compare(comparison: Comparison) -> None:
    fixture = comparison.fixture
    model = build_sparse_detr(fixture).train()
    run = SparseRun.start(model, fixture, spies(model))
    expected_indices = compare_selection(run, comparison)
    comparison.read(
        run.deformable_stages()
        | run.sparse_stages()
        | run.selected_tokens(expected_indices)
        | run.proposals()
    )
    compare_kept_attention(run, comparison)
    compare_predictions(run, comparison)
    compare_training(run, comparison)
    compare_evaluation(build_sparse_detr(fixture), comparison, ordered=False)
