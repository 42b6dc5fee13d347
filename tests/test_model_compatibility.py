"""What `model_compatibility` lets pass; what it refuses is in tests/test_combinations.py."""

from __future__ import annotations

import pytest
from detectron2.config import LazyCall as L
from detectron2.config import instantiate
from torch import Tensor, nn

from efficient_detr.errors import ConfigError
from efficient_detr.losses import SoftmaxClassCost, SoftmaxClassLoss
from efficient_detr.postprocessing import SoftmaxBestClass
from efficient_detr.structures import DetectorOutput, Targets
from tests.combination_parts import Combination, config
from tests.misfits import DEFORMABLE, DENSE, DINO, FOREGROUND


class OwnLoss(nn.Module):
    """A user's loss that knows nothing of `DetectorLoss`."""

    def forward(self, output: DetectorOutput, targets: list[Targets]) -> dict[str, Tensor]:
        return {"loss_own": output.decoder.logits.sum()}


def test_a_loss_of_another_kind_may_train_the_selection() -> None:
    model = config(Combination(FOREGROUND, DINO, num_levels=3))
    model.losses = [model.losses[0]]
    with pytest.raises(ConfigError, match=r"ForegroundTokenSelector\) would not be trained"):
        instantiate(model)
    model.losses.append(L(OwnLoss)())
    instantiate(model)


def test_a_detector_without_losses_need_not_train() -> None:
    model = config(Combination(FOREGROUND, DINO, num_levels=3))
    model.losses = []
    instantiate(model)


def test_softmax_throughout() -> None:
    """One class more in all heads, and losses and post-processing that know of it."""
    model = config(Combination(DEFORMABLE, DENSE, num_levels=1))
    for head in model.detector.decoder.heads:
        head.background_classes = 1
    model.losses[0].class_loss = L(SoftmaxClassLoss)()
    model.losses[0].matcher.class_cost = L(SoftmaxClassCost)()
    model.postprocessor = L(SoftmaxBestClass)()
    built = instantiate(model)
    assert built.detector.decoder.heads[0].class_layer.out_features == model.num_classes + 1


def test_unused_class_columns_are_classes() -> None:
    """Published SMCA weights have 92 sigmoid columns: 92 classes, none for no object."""
    model = config(Combination(DEFORMABLE, DENSE, num_levels=1))
    model.num_classes = 92
    with pytest.raises(ConfigError, match="num_classes=5, but model.num_classes=92"):
        instantiate(model)
    for head in model.detector.decoder.heads:
        head.num_classes = 92
    instantiate(model)
