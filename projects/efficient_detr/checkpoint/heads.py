"""Rows for the prediction heads of official layouts, which number those of all stages in one list.

The decoder's heads come first, then that of the proposals, then those of encoder layers. A head is
stored once more below every module that uses it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from efficient_detr.checkpoint.conversion import Copy, Rename, Row, Spread
from efficient_detr.checkpoint.layout import Shapes
from efficient_detr.checkpoint.shapes import count_keys

PROPOSAL_HEAD = "detector.proposals.head."


def class_layer(theirs: str, ours: str, kind: type[Rename] | type[Copy] = Rename) -> Rename | Copy:
    """The class layer of a head of ours; `theirs` names the layer, without a dot at its end."""
    return kind(f"{theirs}.*", f"{ours}class_layer.*")


def box_layers(theirs: str, ours: str, kind: type[Rename] | type[Copy] = Rename) -> Rename | Copy:
    """The box layers of a head of ours; `theirs` names them, without a dot at its end."""
    return kind(f"{theirs}.*", f"{ours}box_layers.*")


@dataclass(frozen=True)
class NumberedHeads:
    """The heads of a detector.

    Attributes:
        decoder_layers: number of decoder layers.
        one_head: whether all decoder layers share a head, which is stored for each of them.
        proposals: whether there is a head for proposals.
        encoder_layers: number of encoder layers with a head.
    """

    decoder_layers: int
    one_head: bool
    proposals: bool
    encoder_layers: int

    @classmethod
    def of_model(cls, shapes: Shapes) -> NumberedHeads:
        """Those of a model of ours."""
        proposals = f"{PROPOSAL_HEAD}class_layer.weight" in shapes
        heads = count_keys(shapes, "detector.decoder.heads.{head}.class_layer.weight")
        return cls(
            decoder_layers=count_keys(
                shapes, "detector.decoder.layers.{layer}.feedforward_norm.weight"
            ),
            one_head=heads == 1 and not proposals,
            proposals=proposals,
            encoder_layers=count_keys(
                shapes, "detector.encoder_heads.heads.{layer}.class_layer.weight"
            ),
        )

    def rows(self) -> list[Row]:
        """The heads and their copies."""
        heads = [*self._decoder(), *([PROPOSAL_HEAD] if self.proposals else []), *self._encoder()]
        rows: list[Row] = []
        for number, ours in enumerate(heads):
            kind = Copy if ours in heads[:number] else Rename
            rows.append(class_layer(f"class_embed.{number}", ours, kind))
            rows.append(box_layers(f"bbox_embed.{number}", ours, kind))
            # The decoder refines with the boxes of all, and takes proposals with the classes.
            if not self.one_head:
                rows.append(box_layers(f"transformer.decoder.bbox_embed.{number}", ours, Copy))
            if self.proposals:
                rows.append(class_layer(f"transformer.decoder.class_embed.{number}", ours, Copy))
        for number, ours in enumerate(self._encoder()):
            rows.append(class_layer(f"transformer.encoder.class_embed.{number}", ours, Copy))
            rows.append(box_layers(f"transformer.encoder.bbox_embed.{number}", ours, Copy))
        return rows

    def _decoder(self) -> list[str]:
        numbers = [0 if self.one_head else layer for layer in range(self.decoder_layers)]
        return [f"detector.decoder.heads.{number}." for number in numbers]

    def _encoder(self) -> list[str]:
        return [f"detector.encoder_heads.heads.{layer}." for layer in range(self.encoder_layers)]


def head_rows_of_file(
    shapes: Shapes, decoder_norm: str, transformer: str = "transformer."
) -> list[Row]:
    """The rows of the heads that a file has, which may have only one of the names of a weight.

    Args:
        shapes: of the file.
        decoder_norm: template of a key that every decoder layer has.
        transformer: what the names inside the transformer begin with.
    """
    classes = _count_heads(shapes, "class_embed", transformer)
    boxes = _count_heads(shapes, "bbox_embed", transformer)
    proposals = f"{transformer}enc_output.weight" in shapes
    # Refinement needs the boxes of every layer inside the decoder, proposals refinement.
    refines = any(key.startswith(f"{transformer}decoder.bbox_embed.") for key in shapes)
    layers = count_keys(shapes, decoder_norm)
    further = max(classes, boxes) - layers - 1
    inside = count_keys(shapes, f"{transformer}encoder.class_embed.{{layer}}.weight")
    own = NumberedHeads(layers, False, proposals, max(0, further, inside) if proposals else 0)
    shared = replace(own, one_head=True)
    variants = [shared, own]
    if refines or proposals or boxes > 1 >= classes:
        variants = [own]
    elif boxes == 1:
        variants = [shared]
    # Else keys do not tell heads of layers from copies of one head: the names of the model decide,
    # and if there is none it is one head.
    return [row for heads in variants for row in _present(heads, shapes, transformer)]


def _count_heads(shapes: Shapes, name: str, transformer: str) -> int:
    """How many heads have a class layer, or box layers, under any of its names."""
    numbers: set[str] = set()
    for prefix in (f"{name}.", f"{transformer}decoder.{name}."):
        found = (key.removeprefix(prefix) for key in shapes if key.startswith(prefix))
        numbers |= {rest.partition(".")[0] for rest in found}
    return len(numbers)


def _present(heads: NumberedHeads, shapes: Shapes, transformer: str) -> list[Row]:
    """Rows of which the file has the keys; those of one class layer for all heads spread it."""
    found: list[Row] = []
    known: set[str] = set()
    for row in heads.rows():
        assert isinstance(row, Rename | Copy)
        theirs = row.theirs.replace("transformer.", transformer)
        if any(key.startswith(theirs.removesuffix("*")) for key in shapes):
            found.append((Copy if row.ours in known else Rename)(theirs, row.ours))
            known.add(row.ours)
    return spread_over_layers(found, "class_layer.*", heads.decoder_layers, heads.one_head)


def spread_over_layers(
    rows: Sequence[Row], layer: str, decoder_layers: int, one_head: bool = False
) -> list[Row]:
    """Give a layer of one head to all, where theirs share it and the file has it once.

    Args:
        rows: of heads, those that a file has.
        layer: template of its names inside a head.
        decoder_layers: number of decoder layers.
        one_head: whether there is one head for all layers in ours as well.
    """
    names = [f"detector.decoder.heads.{number}.{layer}" for number in range(decoder_layers)]
    read = {row.ours for row in rows if isinstance(row, Rename)}
    if one_head or len(read.intersection(names)) != 1:
        return list(rows)
    return [
        Spread(row.theirs, tuple(names)) if isinstance(row, Rename) and row.ours in names else row
        for row in rows
    ]
