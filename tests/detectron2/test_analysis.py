"""Counts of operations, activations and parameters, with numbers derived by hand."""

from typing import Any

import pytest
import torch
from detectron2.structures import Boxes, Instances
from detectron2.utils.analysis import (
    FlopCountAnalysis,
    parameter_count,
    parameter_count_table,
)
from torch import nn


class Detector(nn.Module):
    """Convolves 3 into 4 channels, then maps 4 to 5 numbers at each of the 8 x 10 pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Conv2d(3, 4, 3, padding=1)
        self.head = nn.Linear(4, 5)

    def forward(self, batched_inputs: list[dict[str, Any]]) -> list[dict[str, Instances]]:
        outputs = []
        for one_input in batched_inputs:
            image = one_input["image"]
            features = self.backbone(image[None]).flatten(2)[0].T  # (80, 4)
            result = Instances(image.shape[-2:])
            predictions = self.head(features).sigmoid()
            result.pred_boxes = Boxes(predictions[:, :4])
            result.scores = predictions[:, 4]
            outputs.append({"instances": result})
        return outputs


INPUTS = [{"image": torch.rand(3, 8, 10), "height": 16, "width": 20, "file_name": "a.jpg"}]
CONVOLUTION = 8 * 10 * 4 * 3 * 3 * 3  # outputs times multiply-adds for each
LINEAR = 8 * 10 * 5 * 4


@pytest.mark.parametrize("inputs", [INPUTS, [{"image": torch.rand(3, 8, 10)}]])
def test_operations_of_a_detector(inputs: list[dict[str, Any]]) -> None:
    flops = FlopCountAnalysis(Detector().eval(), inputs)
    assert flops.total() == CONVOLUTION + LINEAR
    assert flops.by_operator() == {"conv": CONVOLUTION, "linear": LINEAR}
    modules = flops.by_module()
    assert modules["model"] == CONVOLUTION + LINEAR
    assert (modules["model.backbone"], modules["model.head"]) == (CONVOLUTION, LINEAR)
    assert "aten::sigmoid" not in flops.unsupported_ops()


def test_arguments_can_be_a_tuple() -> None:
    flops = FlopCountAnalysis(nn.Bilinear(2, 2, 2), (torch.rand(1, 2), torch.rand(1, 2)))
    flops.unsupported_ops_warnings(False)
    assert flops.total() == 0
    assert set(flops.unsupported_ops()) == {"aten::bilinear"}


def test_parameters() -> None:
    counts = parameter_count(Detector())
    assert counts["backbone"] == 4 * 3 * 9 + 4
    assert counts[""] == 4 * 3 * 9 + 4 + 5 * 4 + 5
    assert "head" in parameter_count_table(Detector())
