"""How backbones are named in published files and in ours, and which published models there are."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass

from detectron2.modeling import ResNet, SwinTransformer
from torch import nn

from efficient_detr.checkpoint.conversion import Drop, Rename, Row, matches_template
from efficient_detr.checkpoint.dat import (
    DAT_HEAD,
    DAT_HEAD_NORM,
    DAT_OUTPUT_NORMS,
    OWN_OUTPUT_NORMS,
    dat_backbone,
    dat_from_ours,
    own_dat_backbone,
)
from efficient_detr.checkpoint.layout import Shapes
from efficient_detr.checkpoint.resnet import torchvision_resnet
from efficient_detr.checkpoint.shapes import count_parts
from efficient_detr.checkpoint.swin import (
    SWIN_HEAD,
    SWIN_HEAD_NORM,
    SWIN_OUTPUT_NORMS,
    swin_backbone,
    swin_from_ours,
)
from efficient_detr.modeling.backbones.dat import DAT
from efficient_detr.modeling.backbones.dat_variants import VARIANTS

Sizes = tuple[int, ...]
"""A number for each stage."""

STAGE = "{stage}"
"""Stands for the number of a stage in the names that tell sizes."""

_DAT_VARIANTS: Mapping[str, tuple[Sizes, Sizes]] = {
    name: (
        tuple(len(stage.attention) for stage in variant.stages),
        tuple(stage.channels for stage in variant.stages),
    )
    for name, variant in VARIANTS.items()
}
_SWIN_VARIANTS: Mapping[str, tuple[Sizes, Sizes]] = {
    "Swin-T": ((2, 2, 6, 2), (96, 192, 384, 768)),
    "Swin-S": ((2, 2, 18, 2), (96, 192, 384, 768)),
    "Swin-B": ((2, 2, 18, 2), (128, 256, 512, 1024)),
    "Swin-L": ((2, 2, 18, 2), (192, 384, 768, 1536)),
}
_RESNET_VARIANTS: Mapping[str, tuple[Sizes, Sizes]] = {
    "ResNet-18": ((2, 2, 2, 2), (64, 128, 256, 512)),
    "ResNet-34": ((3, 4, 6, 3), (64, 128, 256, 512)),
    "ResNet-50": ((3, 4, 6, 3), (256, 512, 1024, 2048)),
    "ResNet-101": ((3, 4, 23, 3), (256, 512, 1024, 2048)),
    "ResNet-152": ((3, 8, 36, 3), (256, 512, 1024, 2048)),
}


@dataclass(frozen=True)
class BackboneLayout:
    """How a backbone is named in a file; names are relative to the backbone.

    Attributes:
        name: of the format, on command lines.
        title: for messages.
        module: our class of the backbone.
        marks: templates of keys by which the layout is recognised, each of which must be there.
        table: the table for a file, made from the shapes of its weights.
        blocks: what the names of a stage's blocks begin with.
        widths: weights (C, ...) of a stage; the first that is there tells its channels.
        variants: name of a published model -> blocks and channels of its stages.
        output_norms: rows for norms of the outputs, which only checkpoints of detectors have; they
            are not in the table.
        last_stages: rows for stages that a model may do without.
        head: the classification head, ours relative to the classifier; none where it is not among
            the backbone's keys.
        head_norm: the norm before it, ours relative to the backbone.
        first_stage: number of the first stage in names.
    """

    name: str
    title: str
    module: type[nn.Module]
    marks: tuple[str, ...]
    table: Callable[[Shapes], list[Row]]
    blocks: str
    widths: tuple[str, ...]
    variants: Mapping[str, tuple[Sizes, Sizes]]
    output_norms: tuple[Rename, ...] = ()
    last_stages: tuple[Rename, ...] = ()
    head: tuple[Rename, ...] = ()
    head_norm: tuple[Rename, ...] = ()
    first_stage: int = 0

    def describe(self, shapes: Shapes) -> str:
        """Name and sizes of the backbone in a file, and which published models have these sizes.

        Args:
            shapes: of the file, names relative to the backbone.
        """
        depths: list[int] = []
        widths: list[int] = []
        for stage in map(str, range(self.first_stage, self.first_stage + 4)):
            depths.append(count_parts(shapes, self.blocks.replace(STAGE, stage)))
            keys = (key.replace(STAGE, stage) for key in self.widths)
            widths += [shapes[key][0] for key in keys if key in shapes][:1]
        sizes = tuple(depths), tuple(widths)
        blocks, channels = ("-".join(map(str, size)) for size in sizes)
        names = " or ".join(name for name, variant in self.variants.items() if variant == sizes)
        return f"{self.title} with {blocks} blocks of {channels} channels{names and f', {names}'}"


@dataclass(frozen=True)
class BackboneFormat:
    """A layout in which a backbone of ours can be written.

    Attributes:
        name: on command lines.
        title: for messages.
        marks: templates of our names, relative to the backbone, by which one that fits is found.
        table: the table, made from the shapes of our weights: those of the backbone, and `head.*`.
        classifier: rows for the head and the norm before it, where there is a head.
    """

    name: str
    title: str
    marks: tuple[str, ...]
    table: Callable[[Shapes], list[Row]]
    classifier: tuple[Rename, ...]


def _our_resnet(_: Shapes) -> list[Row]:
    """Names of Detectron2, which are ours; its converter leaves counters of training there."""
    counter = "counts batches of training, which frozen norms do not use"
    convolutions = ("stem.conv1", "res{stage}.{block}.conv{number}", "res{stage}.{block}.shortcut")
    return [
        *(Drop(f"{name}.norm.num_batches_tracked", counter) for name in convolutions),
        Rename("stem.*", "stem.*"),
        Rename("res{stage}.*", "res{stage}.*"),
    ]


_RESNET_HEAD = Rename("fc.*", "head.*")
# Where Detectron2's converter of torchvision's files puts it.
_OUR_RESNET_HEAD = Rename("stem.fc.*", "head.*")

_OUR_DAT_MARKS = ("stages.0.merging.*", "stages.0.blocks.0.attention_norm.weight")
_SWIN_MARKS = ("patch_embed.proj.weight", "layers.0.blocks.0.attn.qkv.weight")
_OUR_RESNET_MARKS = ("stem.conv1.weight", "res2.0.conv1.weight")

LAYOUTS = (
    BackboneLayout(
        name="dat",
        title="DAT",
        module=DAT,
        marks=("patch_proj.0.weight", "stages.0.layer_norms.0.norm.*"),
        table=dat_backbone,
        blocks="stages.{stage}.mlps.",
        widths=("stages.{stage}.layer_norms.0.norm.weight",),
        variants=_DAT_VARIANTS,
        output_norms=DAT_OUTPUT_NORMS,
        head=(DAT_HEAD,),
        head_norm=(DAT_HEAD_NORM,),
    ),
    BackboneLayout(
        name="dat",
        title="DAT",
        module=DAT,
        marks=_OUR_DAT_MARKS,
        table=own_dat_backbone,
        blocks="stages.{stage}.blocks.",
        widths=("stages.{stage}.blocks.0.attention_norm.weight",),
        variants=_DAT_VARIANTS,
        output_norms=OWN_OUTPUT_NORMS,
    ),
    # Swin needs no second entry for our own files: its names are the same.
    BackboneLayout(
        name="swin",
        title="Swin",
        module=SwinTransformer,
        marks=_SWIN_MARKS,
        table=swin_backbone,
        blocks="layers.{stage}.blocks.",
        widths=("layers.{stage}.blocks.0.norm1.weight",),
        variants=_SWIN_VARIANTS,
        output_norms=SWIN_OUTPUT_NORMS,
        head=(SWIN_HEAD,),
        head_norm=(SWIN_HEAD_NORM,),
    ),
    BackboneLayout(
        name="torchvision_resnet",
        title="torchvision's ResNet",
        module=ResNet,
        marks=("conv1.weight", "bn1.weight", "layer1.0.conv1.weight", "layer1.0.bn1.weight"),
        table=lambda shapes: torchvision_resnet(),
        blocks="layer{stage}.",
        widths=("layer{stage}.0.bn3.weight", "layer{stage}.0.bn2.weight"),
        variants=_RESNET_VARIANTS,
        last_stages=tuple(Rename(f"layer{n}.*", f"res{n + 1}.*") for n in (2, 3, 4)),
        head=(_RESNET_HEAD,),
        first_stage=1,
    ),
    BackboneLayout(
        name="detectron2_resnet",
        title="Detectron2's ResNet",
        module=ResNet,
        marks=_OUR_RESNET_MARKS,
        table=_our_resnet,
        blocks="res{stage}.",
        widths=("res{stage}.0.conv3.norm.weight", "res{stage}.0.conv2.norm.weight"),
        variants=_RESNET_VARIANTS,
        last_stages=tuple(Rename(f"res{n}.*", f"res{n}.*") for n in (3, 4, 5)),
        head=(_OUR_RESNET_HEAD,),
        first_stage=2,
    ),
)
"""The layouts that are known: as published, and ours."""

BACKBONE_FORMATS = (
    BackboneFormat(
        name="dat",
        title="DAT of LeapLabTHU",
        marks=_OUR_DAT_MARKS,
        table=dat_from_ours,
        classifier=(DAT_HEAD, DAT_HEAD_NORM),
    ),
    BackboneFormat(
        name="swin",
        title="Swin of microsoft/Swin-Transformer",
        marks=_SWIN_MARKS,
        table=swin_from_ours,
        classifier=(SWIN_HEAD, SWIN_HEAD_NORM),
    ),
    BackboneFormat(
        name="torchvision_resnet",
        title="torchvision's ResNet",
        marks=_OUR_RESNET_MARKS,
        table=lambda shapes: torchvision_resnet(),
        classifier=(_RESNET_HEAD,),
    ),
    BackboneFormat(
        name="detectron2_resnet",
        title="Detectron2's ResNet",
        marks=_OUR_RESNET_MARKS,
        table=_our_resnet,
        classifier=(_OUR_RESNET_HEAD,),
    ),
)
"""The layouts that can be written."""


def find_prefix(marks: Iterable[str], keys: Collection[str]) -> str | None:
    """What stands before the names of a backbone, the shortest if there are several.

    Args:
        marks: templates of names, relative to the backbone, all of which must be there.
        keys: of a whole file or model.

    Returns:
        The prefix with the dot at its end; None if there is no such backbone.
    """
    prefixes = [_prefixes(mark, keys) for mark in marks]
    return min(set.intersection(*prefixes), key=_length_and_name, default=None)


def _prefixes(mark: str, keys: Iterable[str]) -> set[str]:
    """What stands before a mark, where the mark begins with a whole name."""
    first = mark.partition("{")[0].partition("*")[0].partition(".")[0] + "."
    found = set()
    for key in keys:
        at = key.find(first)
        while at >= 0:
            if (at == 0 or key[at - 1] == ".") and matches_template(mark, key[at:]):
                found.add(key[:at])
            at = key.find(first, at + 1)
    return found


def _length_and_name(prefix: str) -> tuple[int, str]:
    return len(prefix), prefix
