"""The evaluator beside COCOEvaluator: results, statistics over images, and doing no harm."""

from __future__ import annotations

import logging
from collections import OrderedDict

import pytest
import torch
from detectron2.evaluation import DatasetEvaluator, inference_on_dataset, print_csv_format
from detectron2.evaluation.testing import flatten_results_dict
from detectron2.utils import comm
from torch import Tensor, nn

from efficient_detr.evaluation import (
    PADDED_HEADS,
    DataStatistics,
    FlopsEvaluator,
    build_evaluators,
    count_parameters,
    describe_cost,
)
from efficient_detr.structures import DecoderOutput, DetectorOutput, TokenSelection
from tests.tiny_models import empty_tokens

C = 4


class Detector(nn.Module):
    """Keeps all tokens in the first layer and the first half in the second."""

    def __init__(self, *, selects: bool = True) -> None:
        super().__init__()
        self.backbone = nn.Linear(C, C)
        self.encoder = nn.Linear(C, 2, bias=False)
        self.selects = selects

    def forward(self, images: Tensor) -> DetectorOutput:  # (B, tokens, C)
        logits = self.encoder(self.backbone(images))
        tokens = images.shape[1]
        selection = None
        if self.selects:
            rows = torch.arange(tokens).expand(len(images), -1)
            counts = images[..., 0].gt(0).sum(1)  # an image owns the tokens that are not zero
            selection = TokenSelection([rows, rows[:, : tokens // 2]], counts, logits[..., 0], [])
        boxes = logits.repeat(1, 1, 2)
        prediction = DecoderOutput(logits[None], boxes[None], references=boxes[None])
        memory = empty_tokens([(tokens - 2, 1), (1, 2)], batch=len(images))
        return DetectorOutput(prediction, memory, selection=selection)


class Model(nn.Module):
    def __init__(self, *, selects: bool = True) -> None:
        super().__init__()
        self.detector = Detector(selects=selects)
        self.calls = 0

    def forward(self, batched_inputs: list[dict]) -> list[dict]:
        self.calls += 1
        images = [item["image"][0].float() for item in batched_inputs]
        batch = nn.utils.rnn.pad_sequence(images, batch_first=True)
        scores = self.detector(batch).prediction.logits + torch.rand(1)
        return [{"scores": score} for score in scores]


def image(tokens: int, image_id: int = 0) -> dict:
    """An input whose image is (1, tokens, C); strings and ids must not disturb the tracer."""
    return {
        "image": torch.ones(1, tokens, C, dtype=torch.uint8),
        "height": tokens,
        "width": C,
        "image_id": image_id,
        "file_name": "image.jpg",
    }


class Collect(DatasetEvaluator):
    """Stands for the accuracy evaluator: keeps the predictions."""

    def reset(self) -> None:
        self.scores: list[Tensor] = []

    def process(self, inputs: list[dict], outputs: list[dict]) -> None:
        self.scores += [output["scores"] for output in outputs]

    def evaluate(self) -> OrderedDict:
        return OrderedDict(bbox=OrderedDict(AP=12.5))


BATCHES = [[image(4), image(8)], [image(8), image(6)]]


def run(evaluator: FlopsEvaluator, model: Model, batches: list[list[dict]]) -> OrderedDict:
    evaluator.reset()
    with torch.no_grad():
        for batch in batches:
            evaluator.process(batch, model(batch))
    results = evaluator.evaluate()
    assert results is not None
    return results["flops"]


def test_results_are_means_over_the_counted_images() -> None:
    model = Model().eval()
    flops = run(FlopsEvaluator(model, num_images=3), model, BATCHES)
    # A token costs 4 * 4 in the backbone and 4 * 2 in the encoder; 4, 8 and 8 tokens are counted,
    # each image by itself: 20 / 3 tokens on average.
    assert flops["GFLOPs-backbone"] == pytest.approx(16 * 20 / 3 / 1e9)
    assert flops["GFLOPs-encoder"] == pytest.approx(8 * 20 / 3 / 1e9)
    assert flops["GFLOPs"] == pytest.approx(24 * 20 / 3 / 1e9)
    assert flops["parameters"] == flops["parameters-trainable"] == 4 * 4 + 4 + 4 * 2
    assert list(flops)[:4] == ["GFLOPs", "parameters", "GFLOPs-backbone", "GFLOPs-encoder"]


def test_kept_tokens_are_means_over_all_images() -> None:
    model = Model().eval()
    flops = run(FlopsEvaluator(model, num_images=1), model, BATCHES)
    # Both batches are padded to 8 tokens. The images own 4, 8, 8 and 6 tokens; the first layer has
    # room for 8, the second for 4.
    assert flops["tokens-total"] == 8
    assert flops["tokens-encoder-0"] == (4 + 8 + 8 + 6) / 4
    assert flops["tokens-encoder-1"] == (4 + 4 + 4 + 4) / 4


def test_a_detector_that_updates_all_tokens_reports_their_number_only() -> None:
    model = Model(selects=False).eval()
    flops = run(FlopsEvaluator(model), model, BATCHES)
    assert flops["tokens-total"] == 8
    assert not any(name.startswith("tokens-encoder") for name in flops)


def test_every_round_starts_afresh_and_ends_quietly() -> None:
    model = Model().eval()
    evaluator = FlopsEvaluator(model)
    first = run(evaluator, model, BATCHES)
    assert not model.detector._forward_hooks
    assert run(evaluator, model, BATCHES) == first
    evaluator.reset()
    evaluator.reset()  # an evaluation that crashed leaves its hook behind; the next one replaces it
    assert len(model.detector._forward_hooks) == 1


def test_evaluation_prints_accuracy_and_cost_and_keeps_predictions(
    caplog: pytest.LogCaptureFixture,
) -> None:
    model = Model().train()
    collect = Collect()
    evaluators = build_evaluators(collect, model, flops_images=2)
    torch.manual_seed(0)
    with caplog.at_level(logging.INFO, logger="efficient_detr"):
        results = inference_on_dataset(model, BATCHES, evaluators)
    assert model.training
    assert model.calls == len(BATCHES) + 2
    assert set(results) == {"bbox", "flops"}
    flat = flatten_results_dict(results)
    assert flat["flops/GFLOPs"] > 0
    assert all(type(value) is float for value in results["flops"].values())
    print_csv_format(results)  # must accept the results
    assert "| backbone" in caplog.text
    assert "mean over 2 images, height x width 4x4 (1), 8x4 (1)" in caplog.text
    assert "tokens-encoder-0 6.5" in caplog.text

    torch.manual_seed(0)
    model.eval()
    with torch.no_grad():
        expected = [output["scores"] for batch in BATCHES for output in model(batch)]
    for score, wanted in zip(collect.scores, expected, strict=True):
        assert torch.equal(score, wanted)


def test_no_flops_when_no_image_is_wanted() -> None:
    model = Model().eval()
    flops = run(FlopsEvaluator(model, num_images=0), model, BATCHES)
    assert model.calls == len(BATCHES)
    assert "GFLOPs" not in flops
    assert flops["parameters"] == 28


def test_negative_number_of_images() -> None:
    with pytest.raises(ValueError, match="num_images.*-1"):
        FlopsEvaluator(Model(), num_images=-1)


class Untraceable(Model):
    def forward(self, batched_inputs: list[dict]) -> list[dict]:
        if torch.jit.is_tracing():
            self.detector.backbone(batched_inputs[0]["image"].float())
            raise RuntimeError("no tracing here")
        return super().forward(batched_inputs)


def test_a_model_that_cannot_be_traced_costs_one_warning(caplog: pytest.LogCaptureFixture) -> None:
    model = Untraceable().eval()
    results = inference_on_dataset(model, BATCHES, build_evaluators(Collect(), model))
    warnings = [record for record in caplog.records if record.levelno == logging.WARNING]
    assert len(warnings) == 1
    assert "Untraceable could not be traced (RuntimeError: no tracing here)" in caplog.text
    assert results["bbox"]["AP"] == 12.5
    assert "GFLOPs" not in results["flops"]
    assert results["flops"]["tokens-encoder-0"] == 6.5
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_processes_are_added_up_and_the_main_one_reports(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Model().eval()
    other = DataStatistics()
    other.add("tokens-total", [12, 12, 12, 12])
    other.add("tokens-encoder-0", [6, 6, 5, 5])
    other.add("tokens-encoder-1", [2, 2, 2, 2])
    monkeypatch.setattr(comm, "gather", lambda statistics: [statistics, other])
    flops = run(FlopsEvaluator(model), model, BATCHES)
    assert flops["tokens-total"] == (32 + 48) / 8
    assert flops["tokens-encoder-0"] == (26 + 22) / 8
    assert flops["tokens-encoder-1"] == (16 + 8) / 8

    monkeypatch.setattr(comm, "is_main_process", lambda: False)
    monkeypatch.setattr(comm, "gather", lambda statistics: [])
    evaluator = FlopsEvaluator(model)
    calls = model.calls
    evaluator.reset()
    evaluator.process(BATCHES[0], model(BATCHES[0]))
    assert model.calls == calls + 1  # the main process alone counts
    assert evaluator.evaluate() is None


def test_description_shares_and_sizes() -> None:
    model = Model().eval()
    evaluator = FlopsEvaluator(model)
    run(evaluator, model, BATCHES)
    text = describe_cost(evaluator._counts, count_parameters(model), {"tokens-total": 8.0})
    assert PADDED_HEADS not in text
    data = {"most-clusters-encoder-0": 8.0}
    assert PADDED_HEADS in describe_cost(evaluator._counts, count_parameters(model), data)
    rows = {line.split("|")[1].strip(): line for line in text.splitlines() if line[:1] == "|"}
    assert "66.7 %" in rows["backbone"]  # 16 of 24 multiply-adds a token
    assert "33.3 %" in rows["encoder"]
    assert "100.0 %" in rows["total"]
    assert "mean over 4 images, height x width 8x4 (2), 4x4 (1), 6x4 (1)" in text
    assert "Operators seen, not counted:" in text
    assert "gt x1" in text
    assert "tokens-total 8.0" in text
