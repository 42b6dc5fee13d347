"""ResNets of Caffe2, as Detectron2's model zoo has them."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from efficient_detr.checkpoint.caffe2 import rename_resnet
from efficient_detr.engine.checkpointer import AtomicCheckpointer
from tests.checkpoint.test_backbone_layouts import small_resnet

BRANCHES = {"shortcut": "branch1", "conv1": "branch2a", "conv2": "branch2b", "conv3": "branch2c"}


def caffe2_names(state: dict[str, Tensor]) -> dict[str, str]:
    """Our name -> that of Caffe2, for what it stores."""
    names = {}
    for key in state:
        place, _, kind = key.rpartition(".")
        if kind.startswith("running"):
            continue
        norm = place.endswith(".norm")
        parts = place.removesuffix(".norm").split(".")
        if parts[0] == "stem":
            name = "res_conv1" if norm else "conv1"
        else:
            name = "_".join([*parts[:2], BRANCHES[parts[2]]])
        ending = "_s" if norm and kind == "weight" else f"_{kind[0]}"
        names[key] = name + ("_bn" if norm else "") + ending
    return names


def write(path: Path, arrays: dict[str, np.ndarray], blobs: bool) -> None:
    content = {"blobs": arrays, "cfg": "settings"} if blobs else arrays
    path.write_bytes(pickle.dumps(content, protocol=2))


@pytest.fixture
def random_resnet() -> nn.Module:
    model = small_resnet()
    generator = torch.Generator().manual_seed(1)
    for name, tensor in model.state_dict().items():
        if "running" not in name:
            tensor.copy_(torch.rand(tensor.shape, generator=generator))
        elif "mean" in name:
            tensor.zero_()
        else:
            tensor.fill_(1)
    return model


@pytest.mark.parametrize("blobs", [True, False])
def test_a_file_fills_a_model(tmp_path: Path, random_resnet: nn.Module, blobs: bool) -> None:
    state = random_resnet.state_dict()
    arrays = {name: state[key].numpy() for key, name in caffe2_names(state).items()}
    arrays["conv1_w_momentum"] = arrays["conv1_w"]
    arrays["conv1_b"] = arrays["res_conv1_bn_b"]
    arrays |= {"fc1000_w": np.ones((5, 64), "f4"), "fc1000_b": np.ones(5, "f4")}
    assert {"conv1_w", "res_conv1_bn_s", "res2_0_branch1_w", "res4_1_branch2c_bn_b"} <= set(arrays)
    write(tmp_path / "R.pkl", arrays, blobs)
    model = small_resnet()
    AtomicCheckpointer(model).load(str(tmp_path / "R.pkl"))
    loaded = model.state_dict()
    assert loaded.keys() == state.keys()
    assert all(torch.equal(loaded[key], state[key]) for key in state)


def test_the_head_of_a_classifier(tmp_path: Path, random_resnet: nn.Module) -> None:
    names = caffe2_names(random_resnet.state_dict())
    arrays = {name: random_resnet.state_dict()[key].numpy() for key, name in names.items()}
    renamed = rename_resnet(arrays | {"pred_w": np.ones((5, 64)), "pred_b": np.ones(5)})
    assert renamed is not None and renamed["stem.fc.weight"].shape == (5, 64)


def test_other_files_of_caffe2_are_left_to_detectron2() -> None:
    assert rename_resnet({"conv1_w": np.ones(1), "fpn_inner_res2_2_sum_w": np.ones(1)}) is None
    assert rename_resnet({"w": np.ones(1)}) is None
