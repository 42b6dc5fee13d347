"""Golden fixtures: what they hold, how to compare with it, and the models that they describe."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from detectron2.config import LazyConfig, instantiate
from safetensors.torch import load_file
from torch import Tensor, nn

from efficient_detr.checkpoint import convert_keys, detrex
from efficient_detr.meta_arch import EfficientDETR
from efficient_detr.structures import Targets

MODELS = Path(__file__).parents[1] / "configs" / "common" / "models"


class StoredBackbone(nn.Module):
    """Returns stored feature maps, whatever the image."""

    def __init__(self, features: dict[str, Tensor]) -> None:
        super().__init__()
        self.features = features

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        return self.features


@dataclass(frozen=True)
class Fixture:
    """A golden fixture: what its JSON says and what its tensors hold."""

    info: dict[str, Any]
    tensors: dict[str, Tensor]

    @classmethod
    def load(cls, json_path: Path) -> Fixture:
        return cls(
            info=json.loads(json_path.read_text()),
            tensors=load_file(json_path.with_suffix(".safetensors")),
        )

    @property
    def names(self) -> set[str]:
        """Names of the tensors to compare: neither weights nor inputs."""
        return {name for name in self.tensors if not name.startswith(("w/", "in/"))}

    @property
    def images(self) -> Tensor:
        return torch.zeros(self.info["batch"], 3, *self.info["padded_hw"])

    def padding_mask(self, image_sizes: list[tuple[int, int]]) -> Tensor:
        mask = torch.ones(self.info["batch"], *self.info["padded_hw"], dtype=torch.bool)
        for image_mask, (height, width) in zip(mask, image_sizes, strict=True):
            image_mask[:height, :width] = False
        return mask

    @property
    def image_sizes(self) -> list[tuple[int, int]]:
        return [(height, width) for height, width in self.info["image_sizes_hw"]]

    def targets(self) -> list[Targets]:
        return [
            Targets(
                labels=self.tensors[f"train/target/img{i}/labels"].long(),
                boxes=self.tensors[f"train/target/img{i}/boxes_cxcywh_norm"],
                image_size=size,
            )
            for i, size in enumerate(self.image_sizes)
        ]

    def weights(self) -> dict[str, Tensor]:
        """The weights under our names."""
        state = {k.removeprefix("w/"): v for k, v in self.tensors.items() if k.startswith("w/")}
        return convert_keys(state, detrex(self.info["config"]["dec_layers"]))


class Comparison:
    """Compares by name and remembers what was compared."""

    def __init__(self, fixture: Fixture) -> None:
        self.fixture = fixture
        self.compared: set[str] = set()

    def expect(self, name: str) -> Tensor:
        self.compared.add(name)
        return self.fixture.tensors[name]

    def has(self, name: str) -> bool:
        return name in self.fixture.tensors

    def close(self, name: str, actual: Tensor, atol: float, rtol: float = 0.0) -> None:
        expected = self.expect(name)
        assert actual.shape == expected.shape, name
        torch.testing.assert_close(
            actual.detach(), expected, atol=atol, rtol=rtol, msg=lambda text: f"{name}: {text}"
        )

    def equal(self, name: str, actual: Tensor) -> None:
        assert torch.equal(actual.long(), self.expect(name).long()), name

    def same_set(self, name: str, actual: Tensor, expected: Tensor) -> None:
        assert torch.equal(actual.sort(1).values, expected.long().sort(1).values), name


def _dino_arguments(config: dict[str, Any]) -> dict[str, Any]:
    names = ["res2", "res3", "res4", "res5"][-len(config["in_channels"]) :]
    return dict(
        backbone=None,
        in_features=names,
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


def _dino(info: dict[str, Any]) -> Any:
    config = info["config"]
    build = LazyConfig.load(str(MODELS / "dino.py"), "dino")
    return build(**_dino_arguments(config), encoder_layers=config["enc_layers"])


def _focus_detr(info: dict[str, Any]) -> Any:
    config = info["config"]
    build = LazyConfig.load(str(MODELS / "focus_detr.py"), "focus_detr")
    labels = info.get("fg_assign", {"strides": [8, 16, 32, 64], "limit_range": None})
    ranges = labels["limit_range"] or [[-1, 64], [64, 128], [128, 256], [256, 999999]]
    return build(
        **_dino_arguments(config),
        keep_ratio=config["focus_rho"],
        layer_keep_ratios=config["cascade"][: config["enc_layers"]],
        num_object_tokens=config["topk_sa"],
        strides=labels["strides"],
        range_ends=[end for _, end in ranges[:-1]],
    )


FAMILIES = {"dino": _dino, "focus_detr": _focus_detr}


def build_model(fixture: Fixture) -> EfficientDETR:
    """The fixture's model with its weights, in evaluation mode."""
    family = fixture.info["family"]
    if family not in FAMILIES:
        raise ValueError(f"unknown family {family!r} of a golden fixture: know {list(FAMILIES)}")
    config = FAMILIES[family](fixture.info)
    denoising = config.detector.denoising
    denoising.label_noise_ratio = fixture.info["config"]["label_noise_ratio"]
    denoising.box_noise_scale = fixture.info["config"]["box_noise_scale"]
    model = instantiate(config)
    features = {k.removeprefix("in/"): v for k, v in fixture.tensors.items() if k[:3] == "in/"}
    model.detector.backbone = StoredBackbone(features)
    model.load_state_dict(fixture.weights(), strict=True)
    return model.eval()
