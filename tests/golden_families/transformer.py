"""What the fixtures of whole models have in common: stages, predictions, detections, training."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from efficient_detr.meta_arch import EfficientDETR
from efficient_detr.structures import DetectorOutput, FeatureTokens
from tests.golden_families.fixture import FORWARD, Comparison, Fixture, Reader
from tests.golden_families.models import key_table
from tests.golden_families.recorder import Recorder
from tests.golden_families.training import (
    compare_gradient_norms,
    compare_gradients,
    compare_losses,
    compare_matchings,
)
from tests.tiny_models import total

Tolerance = tuple[float, float]
"""Absolute and relative."""

# Boxes of final detections are in pixels of images of some hundred pixels.
PIXELS = 1e-2


@dataclass
class Run:
    """A model and everything that happened in one of its forward passes."""

    model: EfficientDETR
    recorder: Recorder
    output: DetectorOutput

    @classmethod
    def start(
        cls, model: EfficientDETR, fixture: Fixture, spies: Sequence[tuple[Any, str]] = ()
    ) -> Run:
        """Run the model on all images of a fixture.

        Args:
            model: in training or in evaluation mode.
            fixture: the images and, for training, their targets.
            spies: (object, name) of methods to record besides the modules.
        """
        recorder = Recorder(model)
        for owner, method in spies:
            recorder.spy(owner, method)
        targets = fixture.targets if model.training else None
        output = model.detector(fixture.images, fixture.padding_mask, targets)
        return cls(model, recorder, output)

    @property
    def tokens(self) -> FeatureTokens:
        """The tokens before the encoder."""
        return self.recorder.output(self.model.detector.tokenizer)

    @property
    def memory(self) -> FeatureTokens:
        """The tokens after the encoder."""
        return self.recorder.output(self.model.detector.encoder).memory

    def mask(self, level: int) -> Tensor:
        """(B, H_l, W_l) padding mask of a level."""
        mask = self.tokens.split(self.tokens.padding_mask)[level]
        return mask.unflatten(1, self.tokens.spatial_shapes[level])

    def projected(self, level: int) -> Tensor:
        """(B, C, H_l, W_l) output of the neck."""
        return self.recorder.output(self.model.detector.neck)[level]

    def position(self, level: int) -> Tensor:
        """(B, C, H_l, W_l) sine embedding of the cells of a level, without that of the level."""
        return self.recorder.outputs(self.model.detector.tokenizer.position_embedding)[level]

    def encoder_layer(self, layer: int) -> Tensor:
        """(B, N, C) what an encoder layer returned."""
        return self.recorder.output(self.model.detector.encoder.layers[layer])

    def decoder_layer(self, layer: int) -> Tensor:
        """(B, Q, C) what a decoder layer returned, before any norm that the layers share."""
        return self.recorder.output(self.model.detector.decoder.layers[layer])

    def states(self) -> Tensor:
        """(layers, B, Q, C) what the heads read."""
        decoder = self.model.detector.decoder
        if decoder.norm is not None:
            return torch.stack(self.recorder.outputs(decoder.norm))
        return torch.stack([self.decoder_layer(layer) for layer in range(len(decoder.layers))])

    def stages(self) -> dict[str, Reader]:
        """Readers of what the models of the family have in common."""
        return {
            r"inter/mask\.(\d+)": self.mask,
            r"inter/pos\.(\d+)": self.position,
            r"inter/(?:proj|src)\.(\d+)": self.projected,
            r"inter/enc_layer\.(\d+)": self.encoder_layer,
            r"inter/memory": lambda: self.memory.features,
            r"inter/dec_layer_raw\.(\d+)": self.decoder_layer,
            r"inter/hs": self.states,
        }


def compare_evaluation(
    model: EfficientDETR,
    comparison: Comparison,
    *,
    ordered: bool,
    logits: Tolerance = (FORWARD, FORWARD),
) -> None:
    """Compare the predictions of a model in evaluation mode, and its detections.

    Args:
        model: in evaluation mode, not run before.
        comparison: the expected tensors.
        ordered: detections stand in the order of the queries; else the best comes first, and
            neighbours whose scores are equal but for rounding may change places.
        logits: absolute and relative tolerance of class logits.
    """
    with torch.no_grad():
        run = Run.start(model, comparison.fixture)
    compare_predictions(run, comparison, logits)
    if any(comparison.matches(r"post/.*")):
        compare_detections(run, comparison, ordered=ordered)


def compare_predictions(
    run: Run, comparison: Comparison, logits: Tolerance = (FORWARD, FORWARD)
) -> None:
    """Compare logits and boxes of all decoder layers."""
    decoder = run.output.decoder
    comparison.read({r"out/logits\.(\d+)": lambda layer: decoder.logits[layer]}, *logits)
    comparison.read({r"out/boxes\.(\d+)": lambda layer: decoder.boxes[layer]})
    listed = {layer for _, (layer,) in comparison.matches(r"out/logits\.(\d+)")}
    assert listed == set(range(len(decoder.logits))), "layers that the fixture does not list"


def compare_detections(run: Run, comparison: Comparison, *, ordered: bool) -> None:
    """Compare final detections, whose boxes the official code scales but does not clip."""
    sizes = comparison.fixture.original_sizes
    instances = run.model.postprocessor(run.output.prediction, sizes)
    for image, found in enumerate(instances):
        name = f"post/{image}."
        count = len(comparison.expect(name + "scores"))
        scores, labels = found.scores[:count], found.pred_classes[:count]
        boxes = found.pred_boxes.tensor[:count]
        comparison.close(name + "scores", scores, FORWARD)
        if ordered:
            comparison.equal(name + "labels", labels)
            comparison.close(name + "boxes", boxes, PIXELS, FORWARD)
            continue
        expected_labels = comparison.expect(name + "labels").long()
        expected_boxes = comparison.expect(name + "boxes")
        expected_scores = comparison.expect(name + "scores")
        same = (labels[:, None] == expected_labels) & (
            (scores[:, None] - expected_scores).abs() < FORWARD
        )
        distance = (boxes[:, None] - expected_boxes).abs().amax(-1)
        same &= distance < PIXELS + FORWARD * expected_boxes.abs().amax(-1)
        assert same.any(1).all() and same.any(0).all(), f"{name}: other detections"


def compare_training(run: Run, comparison: Comparison) -> None:
    """Compare matchings, losses and gradients of a run in training mode."""
    expected = comparison.fixture.info["loss"]
    losses = run.model.compute_losses(run.output, comparison.fixture.targets)
    matchings = run.recorder.outputs(run.model.losses[0].matcher)
    assert expected.get("num_matcher_calls", len(matchings)) == len(matchings)
    compare_matchings(matchings, len(run.output.decoder.logits), comparison)
    compare_losses(run.model, losses, expected)
    total(losses).backward()
    norms = comparison.fixture.with_aliases(expected["grad_norm"])
    norms |= dict.fromkeys(expected.get("no_grad_params", []))
    table = key_table(comparison.fixture.weights())
    compare_gradient_norms(run.model, norms, table)
    compare_gradients(run.model, comparison, "grad/", table)
