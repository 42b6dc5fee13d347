"""Parameters and FLOPs of the full-size models against those of the published implementations.

The expected numbers were measured with fvcore on detrex's models, with random weights, batch size 1
and an image of exactly 800 x 1333 pixels. One multiply-add counts as 1.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from detectron2.config import LazyConfig, instantiate
from detectron2.evaluation import inference_on_dataset
from torch import nn

from efficient_detr.evaluation import (
    FlopCount,
    FlopsEvaluator,
    count_flops,
    count_parameters,
)

CONFIGS = Path(__file__).parents[1] / "configs"

# 100 x 167 + 50 x 84 + 25 x 42 + 13 x 21 tokens.
TOKENS = 16700 + 4200 + 1050 + 273


def build(name: str, device: str) -> nn.Module:
    config = LazyConfig.load(str(CONFIGS / name))
    with torch.device(device):
        return instantiate(config.model)


@pytest.mark.parametrize(
    ("config", "total", "selection"),
    [
        ("dino.py", 47_650_316, None),
        # detrex's mask predictor and the three scales of the top-down modulation
        ("focus_detr.py", 49_339_920, 107_524),
    ],
)
def test_parameters(config: str, total: int, selection: int | None) -> None:
    count = count_parameters(build(config, "meta"))
    assert count.total == total == sum(count.stages.values())
    # The frozen stem: a 7 x 7 convolution from 3 to 64 channels.
    assert count.trainable == total - 7 * 7 * 3 * 64
    assert count.stages.get("selection") == selection
    # Batch norm is frozen into buffers: the stem and res2 to res5, convolutions only.
    assert count.stages["backbone"] == 23_454_912
    assert "other" not in count.stages


def focus_encoder_layer(kept: int, tokens: int) -> int:
    """Multiply-adds of one Focus-DETR encoder layer of 256 channels, 8 heads, 4 levels, 4 points.

    It updates `kept` tokens, which attend to `tokens`.
    """
    objects = min(kept, 300)
    object_score = kept * 256 * 80  # class logits
    object_attention = 4 * objects * 256**2 + 2 * objects**2 * 256
    # Value, output; an offset (x, y) and a weight for each of 8 * 4 * 4 points.
    projections = (tokens + kept) * 256**2 + kept * 256 * (2 + 1) * 8 * 4 * 4
    sampling = 4 * kept * (4 * 4) * 256  # 4 neighbours of 16 points, all heads
    feedforward = 2 * kept * 256 * 2048
    norms = 5 * 256 * (objects + 2 * kept)
    return object_score + object_attention + projections + sampling + feedforward + norms


def test_evaluation_of_focus_detr() -> None:
    config = LazyConfig.load(str(CONFIGS / "focus_detr.py"))
    config.model.detector.queries.num_queries = 20
    model = instantiate(config.model).train()
    image = {"image": torch.randint(256, (3, 64, 96), dtype=torch.uint8)}
    evaluator = FlopsEvaluator(model, num_images=1)
    flops = inference_on_dataset(model, [[image]], evaluator)["flops"]
    # 8 x 12 + 4 x 6 + 2 x 3 + 1 x 2 tokens; half of them and one more are ranked.
    assert flops["tokens-total"] == 128
    kept = [65, 52, 39, 39, 26, 13]
    assert [flops[f"tokens-encoder-{layer}"] for layer in range(6)] == kept
    expected = sum(focus_encoder_layer(number, 128) for number in kept)
    assert flops["GFLOPs-encoder"] == pytest.approx(expected / 1e9, rel=1e-12)
    stages = [value for name, value in flops.items() if name.startswith("GFLOPs-")]
    assert flops["GFLOPs"] == pytest.approx(sum(stages), rel=1e-12)
    assert model.training


def count_full_size(config: str) -> FlopCount:
    image = torch.zeros(3, 800, 1333, dtype=torch.uint8)
    return count_flops(build(config, "cpu"), [{"image": image}])


# A full-size image takes a while on one core.
@pytest.mark.timeout(900)
def test_flops_of_dino() -> None:
    count = count_full_size("dino.py")
    assert count.total == 292_669_922_511
    assert count.total == sum(count.stages.values())
    stages = {name: round(flops / 1e9, 4) for name, flops in count.stages.items()}
    assert (stages["backbone"], stages["neck"], stages["encoder"]) == (87.8074, 5.157, 172.9255)


@pytest.mark.timeout(900)
def test_flops_of_focus_detr() -> None:
    count = count_full_size("focus_detr.py")
    assert count.total == 183_189_805_959
    assert count.total == sum(count.stages.values())
    stages = {name: round(flops / 1e9, 4) for name, flops in count.stages.items()}
    assert (stages["backbone"], stages["neck"]) == (87.8074, 5.157)
    # detrex's mask predictor 2.3965, and the proposals' transform with its norm, 1.4564 + 0.0284,
    # which prepares the tokens to be scored. Interpolating the score maps adds 0.0001.
    assert stages["selection"] == pytest.approx(2.3965 + 1.4564 + 0.0284, abs=2e-4)
    # fvcore books a shared module under its first owner, so that the 60.0191 it reports for
    # detrex's encoder contain the class logits of all proposals. Here the proposals pay for them.
    class_logits = TOKENS * 256 * 80 / 1e9
    assert stages["encoder"] == pytest.approx(60.0191 - class_logits, abs=2e-4)
