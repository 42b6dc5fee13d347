"""Fixtures of DETR with clustered attention (ACT), and of its distillation (MTKD)."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from detectron2.config import LazyCall as L
from torch import Tensor

from efficient_detr.losses.distillation import (
    BoxDistillationLoss,
    MeanSquaredError,
    SummedDistance,
    SummedSquaredError,
)
from efficient_detr.meta_arch import EfficientDETR
from efficient_detr.modeling.attention.clustered import exact_attention
from efficient_detr.ops.lsh_clustering import hash_keys, published_multipliers
from efficient_detr.structures import DecoderOutput
from tests.golden_families.act_attention import hash_cells
from tests.golden_families.detr import build_model, detr_arguments
from tests.golden_families.fixture import Comparison, Fixture, Reader
from tests.golden_families.models import builder, key_table
from tests.golden_families.training import (
    LOSSES,
    compare_gradient_norms,
    compare_gradients,
    compare_losses,
)
from tests.golden_families.transformer import Run
from tests.tiny_models import total

DISTANCES = {
    "mse_mean": MeanSquaredError,
    "sq_sum": SummedSquaredError,
    "l2norm_sum": SummedDistance,
}


def build_act_detr(fixture: Fixture, run: str) -> EfficientDETR:
    """The model that distils, with the hashing and the projections of a run, as published.

    The publication clusters padded tokens too and lets different cells have one key; it clusters
    whether or not that pays.
    """
    settings = fixture.info["runs"][run]
    config = builder("act_detr", "act_detr")(
        **detr_arguments(fixture.config),
        rounds=settings["L"],
        width=settings["r"],
        include_padding=True,
        min_tokens=0,
        max_cluster_ratio=1.0,
    )
    for layer in config.detector.encoder.layers:
        layer.attention.query_clustering.multipliers = L(published_multipliers)(
            rounds=settings["L"]
        )
    model = build_model(builder("act_detr", "distilled")(config), fixture)
    for index, layer in enumerate(model.detector.encoder.layers):
        directions = fixture.tensors[f"{run}/proj.{index}"][0]
        bias = fixture.tensors[f"{run}/bias.{index}"][0, :, 0]
        layer.attention.query_clustering.set_projections(directions, bias)
    return model


class ClusteredRun(Run):
    """A run with clustered attention; rows are those of (B, H), flattened."""

    def clustering(self, layer: int) -> Any:
        return self.model.detector.encoder.layers[layer].attention.query_clustering

    def shifted_keys(self, layer: int) -> Tensor:
        """(B H, N) keys from hash cells that count from the lowest of their row, as published."""
        clustering = self.clustering(layer)
        points = self.recorder.arguments(clustering)["points"]
        keys = hash_keys(points, clustering.projections)
        lowest = hash_cells(points, clustering.projections).amin(2, keepdim=True)
        return (keys - (lowest * clustering.multipliers).sum(-1)).flatten(0, 1)

    def cluster_ids(self, layer: int) -> Tensor:
        """(B H, N) clusters, numbered by first appearance."""
        return self.recorder.output(self.clustering(layer)).ids.flatten(0, 1)

    def num_clusters(self) -> list[list[int]]:
        """Clusters of every row of every layer."""
        layers = range(len(self.model.detector.encoder.layers))
        counts = [self.recorder.output(self.clustering(layer)).num_clusters for layer in layers]
        return [count.flatten().tolist() for count in counts]

    def attended(self, layer: int) -> Tensor:
        return self.recorder.output(self.model.detector.encoder.layers[layer].attention)

    def of_group(self, group: str) -> dict[str, Reader]:
        """Readers of what is stored for one forward pass."""
        return predictions(group, self.output.decoder) | {
            rf"{group}/memory": lambda: self.output.memory.features,
            rf"{group}/hs": self.states,
            rf"{group}/enc_attn\.(\d+)": self.attended,
            rf"{group}/key\.(\d+)": self.shifted_keys,
            rf"{group}/cluster_canonical\.(\d+)": self.cluster_ids,
        }


def predictions(group: str, decoder: DecoderOutput) -> dict[str, Reader]:
    return {
        rf"{group}/logits\.(\d+)": lambda layer: decoder.logits[layer],
        rf"{group}/boxes\.(\d+)": lambda layer: decoder.boxes[layer],
    }


def compare_run(comparison: Comparison, name: str) -> None:
    """Compare one setting of the hashing."""
    fixture, settings = comparison.fixture, comparison.fixture.info["runs"][name]
    run = ClusteredRun.start(build_act_detr(fixture, name), fixture)  # not training: no teacher
    comparison.read(run.stages() | run.of_group(name))
    for kind in ("proj", "bias"):
        for given, _ in comparison.matches(rf"{name}/{kind}\.\d+"):
            comparison.expect(given)
    assert run.num_clusters() == settings["clusters"]
    compare_distance(comparison, run, settings)
    if "loss_act_only" in settings:
        compare_student(comparison, run, settings["loss_act_only"])
    if "mtkd" in settings:
        compare_distillation(comparison, build_act_detr(fixture, name), settings["mtkd"])


def compare_distance(comparison: Comparison, run: Run, settings: dict[str, Any]) -> None:
    """Compare how far clustered attention is from dense attention."""
    memory, dense = run.output.memory.features, comparison.expect("dense/memory")
    error = ((memory - dense).norm() / dense.norm()).item()
    assert error == pytest.approx(settings["memory_rel_err_vs_dense"], rel=1e-3)
    boxes = run.output.decoder.boxes
    dense_boxes = comparison.expect(f"dense/boxes.{len(boxes) - 1}")
    error = (boxes[-1] - dense_boxes).abs().max().item()
    assert error == pytest.approx(settings["box_maxabs_vs_dense"], rel=1e-3, abs=1e-6)


def compare_student(comparison: Comparison, run: Run, expected: dict[str, Any]) -> None:
    """Compare training of the clustered model by itself."""
    losses = run.model.losses[0](run.output, comparison.fixture.targets)
    compare_losses(run.model, losses, expected)
    total(losses).backward()
    table = key_table(comparison.fixture.weights())
    compare_gradient_norms(run.model, expected["grad_norm"], table)
    compare_gradients(run.model, comparison, "act_only/grad/", table)


def compare_distillation(
    comparison: Comparison, model: EfficientDETR, expected: dict[str, Any]
) -> None:
    """Compare the losses of teacher and student, and the gradients of their sum."""
    fixture = comparison.fixture
    output = model.detector(fixture.images, fixture.padding_mask, fixture.targets)
    losses = model.compute_losses(output, fixture.targets)
    distilled = losses["loss_box_distillation"]
    assert (total(losses) - distilled).item() == pytest.approx(expected["L_pred"], rel=LOSSES)
    for name, value in expected["L_KD"].items():
        loss = BoxDistillationLoss(distance=DISTANCES[name]())(output, fixture.targets)
        assert loss["loss_box_distillation"].item() == pytest.approx(value, rel=1e-3)
    total(losses).backward()
    norms, table = expected["grad_norm_Lpred_plus_mse_mean"], key_table(fixture.weights())
    compare_gradient_norms(model, norms, table)
    compare_gradients(model, comparison, "mtkd/grad/", table)


def compare_dense(comparison: Comparison, model: EfficientDETR) -> None:
    """Compare the same weights with dense attention."""
    with exact_attention(model), torch.no_grad():
        run = ClusteredRun.start(model, comparison.fixture)
    comparison.read(run.of_group("dense"))


def compare(comparison: Comparison) -> None:
    runs = list(comparison.fixture.info["runs"])
    for run in runs:
        compare_run(comparison, run)
    compare_dense(comparison, build_act_detr(comparison.fixture, runs[0]))
