"""Write our own numbers down in the layout of the official ones, at other sizes and options.

A model with random weights is run; the fixture holds what a reader needs to build it again, and
what happened.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from detectron2.config import instantiate
from torch import Tensor

from efficient_detr.checkpoint.conversion import write_keys
from efficient_detr.checkpoint.formats import find_format
from efficient_detr.meta_arch import EfficientDETR
from tests.golden_families import deformable_detr, detr, smca, sparse_detr
from tests.golden_families.fixture import Fixture, Reader
from tests.golden_families.training import loss_weights
from tests.golden_families.transformer import Run
from tests.tiny_models import padding_mask, total

GOLDEN = Path(__file__).parents[1] / "golden"


@dataclass(frozen=True)
class Layout:
    """How the fixtures of a family are written.

    Attributes:
        template: a stored fixture of the family, for the names of tensors.
        format: name of the format of the weights.
        config: fixture -> the model's LazyConfig.
        build: fixture -> the model with the fixture's weights.
        start: model in training mode and fixture -> its run.
        readers: run -> readers of intermediate tensors.
    """

    template: str
    format: str
    config: Callable[[Fixture], Any]
    build: Callable[[Fixture], EfficientDETR]
    start: Callable[[EfficientDETR, Fixture], Any]
    readers: Callable[[Any], dict[str, Reader]]


def start_deformable(model: EfficientDETR, fixture: Fixture) -> Any:
    return deformable_detr.DeformableRun.start(model, fixture, deformable_detr.spies(model))


def start_sparse(model: EfficientDETR, fixture: Fixture) -> Any:
    return sparse_detr.SparseRun.start(model, fixture, deformable_detr.spies(model))


def sparse_readers(run: sparse_detr.SparseRun) -> dict[str, Reader]:
    indices = run.selection.indices[0]
    selection: dict[str, Reader] = {"inter/backbone_topk_proposals": lambda: indices}
    return (
        run.deformable_stages()
        | run.proposals()
        | run.sparse_stages()
        | run.selected_tokens(indices)
        | selection
    )


DETR = Layout(
    template="detr_tiny",
    format="detr",
    config=detr.detr_config,
    build=detr.build_detr,
    start=Run.start,
    readers=lambda run: run.stages(),
)
DEFORMABLE = Layout(
    template="deformable_detr_two_stage_tiny",
    format="deformable_detr",
    config=deformable_detr.deformable_detr_config,
    build=deformable_detr.build_deformable_detr,
    start=start_deformable,
    readers=lambda run: run.deformable_stages() | run.proposals(),
)
SPARSE = Layout(
    template="sparse_detr_tiny",
    format="sparse_detr",
    config=sparse_detr.sparse_detr_config,
    build=sparse_detr.build_sparse_detr,
    start=start_sparse,
    readers=sparse_readers,
)
SMCA = Layout(
    template="smca_single_tiny",
    format="smca",
    config=smca.single_config,
    build=smca.build_single,
    start=smca.ModulatedRun.start,
    readers=lambda run: run.modulation(),
)
SMCA_MULTI_SCALE = Layout(
    template="smca_multiscale_paper_tiny",
    format="smca_multi_scale_transformer",
    config=smca.multi_scale_config,
    build=smca.build_multi_scale,
    start=smca.ModulatedRun.start,
    readers=smca.multi_scale_readers,
)


def renumbered(names: Iterable[str], count: int = 6) -> set[str]:
    """All names that arise from `names` if other numbers below `count` take the place of theirs."""
    found = set()
    for name in {re.sub(r"\.\d+", ".#", name) for name in names}:
        parts = name.split("#")
        for numbers in itertools.product(range(count), repeat=len(parts) - 1):
            found.add("".join(map("".join, zip(parts, [*map(str, numbers), ""], strict=True))))
    return found


def stored_keys(state: Mapping[str, Tensor], layout: Layout) -> dict[str, list[str]]:
    """our key -> the official keys of its tensor, copies last."""
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
    table = find_format(layout.format).write_table(shapes)
    return {name: [*write_keys({name: tensor}, table)] for name, tensor in state.items()}


def with_inputs(
    info: dict[str, Any], sizes: list[tuple[int, int]], boxes: list[int], strides: list[int]
) -> Fixture:
    """A fixture that holds images and targets only; `boxes` is their number in each image."""
    height, width = (-(-max(size[axis] for size in sizes) // 32) * 32 for axis in (0, 1))
    tensors = {
        "inputs/image_mask": padding_mask(sizes, (height, width)),
        "inputs/orig_size_hw": torch.tensor(sizes) * 2,
    }
    config = info["config"]
    widths = config.get("backbone_channels") or config["ch"]
    for level, (channels, stride) in enumerate(zip(widths, strides, strict=True)):
        shape = (len(sizes), channels, -(-height // stride), -(-width // stride))
        tensors[f"inputs/feat.{level}"] = torch.randn(shape)
    num_classes = config.get("num_classes") or config["nc"]
    for image, count in enumerate(boxes):
        labels = torch.randint(0, num_classes - 1, (count,))
        tensors[f"loss/target.{image}.labels"] = labels
        tensors[f"loss/target.{image}.boxes"] = 0.3 + 0.4 * torch.rand(count, 4)
    return Fixture(info, tensors)


def write(
    layout: Layout,
    changes: dict[str, Any],
    *,
    sizes: list[tuple[int, int]],
    boxes: list[int],
    strides: list[int],
    recipe: bool = False,
) -> Fixture:
    """A fixture of a model with random weights, whose config differs from that of the template.

    Args:
        layout: how to write it.
        changes: entries of the config, instead of those of the template.
        sizes: (height, width) of the images.
        boxes: number of targets in each.
        strides: of the backbone's maps.
        recipe: write how to draw the weights, not the weights.
    """
    template = json.loads((GOLDEN / f"{layout.template}.json").read_text())
    info = {
        "family": template["family"],
        "mode": "eval",
        "config": template["config"] | changes,
        "notes": [],
    }
    fixture = with_inputs(info, sizes, boxes, strides)
    config = layout.config(fixture)
    config.detector.backbone = None
    state = instantiate(config).state_dict()
    keys = stored_keys(state, layout)
    if recipe:
        names = write_recipe(fixture, state, keys)
    else:
        names = {name: stored for name, (stored, *_) in keys.items()}
        for name, tensor in state.items():
            noisy = tensor + 0.1 * torch.randn_like(tensor)
            fixture.tensors.update({f"weights/{key}": noisy for key in keys[name]})
    run = layout.start(layout.build(fixture).train(), fixture)
    fixture.info["loss"] = training_numbers(run, fixture, names)
    stages = {name for name in template["tensors"] if not name.startswith("weights/")}
    write_tensors(run, fixture, layout.readers(run), renumbered(stages, count=4))
    write_detections(layout, fixture)
    return fixture


def write_recipe(
    fixture: Fixture, state: dict[str, Tensor], keys: dict[str, list[str]]
) -> dict[str, str]:
    """Seeds for all weights, under the last of their keys; the others are aliases.

    Returns:
        our key -> the official key that is not an alias.
    """
    stored = {name: names[-1] for name, names in keys.items()}
    fixture.info["weights"] = "recipe"
    fixture.info["weight_recipe"] = {
        "params": {
            stored[name]: {
                "shape": list(tensor.shape),
                "seed": seed,
                "std": 0.1,
                "mean": tensor.mean().item(),
            }
            for seed, (name, tensor) in enumerate(state.items())
        }
    }
    fixture.info["weight_aliases"] = {
        alias: stored[name] for name, names in keys.items() for alias in names[:-1]
    }
    return stored


def training_numbers(run: Any, fixture: Fixture, names: dict[str, str]) -> dict[str, Any]:
    """Losses and norms of gradients, as the JSON has them; matchings go to the tensors."""
    losses = run.model.compute_losses(run.output, fixture.targets)
    total(losses).backward()
    matchings = run.recorder.outputs(run.model.losses[0].matcher)
    layers = len(run.output.decoder.logits)
    order = [layers - 1, *range(layers - 1), *range(layers, len(matchings))]
    for number, call in enumerate(order):
        for image, pairs in enumerate(matchings[call]):
            for side, indices in zip(("src", "tgt"), pairs, strict=True):
                fixture.tensors[f"loss/match.{number}.{image}.{side}"] = indices
    theirs = {"loss_class": "loss_ce", "loss_token_selection": "loss_mask_prediction"}
    weighted = {
        re.sub("|".join(theirs), lambda match: theirs[match[0]], name): loss.item()
        for name, loss in losses.items()
    }
    set_losses = [name for name in weighted if name != "loss_mask_prediction"]
    weights = dict.fromkeys(weighted, 1.0) | loss_weights(run.model, set_losses)
    raw = {name: loss / weights[name] for name, loss in weighted.items()}
    return {
        "losses": raw | {"class_error": 3.0, "cardinality_error_enc_0": 2.0},
        "weight_dict": weights,
        "weighted_total": sum(weighted.values()),
        "num_matcher_calls": len(matchings),
        "grad_norm": {
            names[name]: None if parameter.grad is None else parameter.grad.norm().item()
            for name, parameter in run.model.named_parameters()
        },
    }


def write_tensors(
    run: Any, fixture: Fixture, readers: dict[str, Reader], names: Iterable[str]
) -> None:
    """Every intermediate tensor whose name makes sense for this model, and the predictions."""
    for name in names:
        for pattern, reader in readers.items():
            match = re.fullmatch(pattern, name)
            if match is None:
                continue
            try:
                value = reader(*(int(g) if g.isdigit() else g for g in match.groups()))
            except (
                IndexError,
                KeyError,
                AttributeError,
            ):  # another layer, or a stage that is not there
                continue
            if value is not None:
                fixture.tensors[name] = value.detach()
    decoder = run.output.decoder
    for layer in range(len(decoder.logits)):
        fixture.tensors[f"out/logits.{layer}"] = decoder.logits[layer].detach()
        fixture.tensors[f"out/boxes.{layer}"] = decoder.boxes[layer].detach()


def write_detections(layout: Layout, fixture: Fixture) -> None:
    model = layout.build(fixture)
    with torch.no_grad():
        output = model.detector(fixture.images, fixture.padding_mask)
    for image, found in enumerate(model.postprocessor(output.prediction, fixture.original_sizes)):
        fixture.tensors[f"post/{image}.scores"] = found.scores
        fixture.tensors[f"post/{image}.labels"] = found.pred_classes
        fixture.tensors[f"post/{image}.boxes"] = found.pred_boxes.tensor
