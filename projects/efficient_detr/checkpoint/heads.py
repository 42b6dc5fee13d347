"""Rows for the prediction heads of official layouts, which number those of all stages in one list.

The decoder's heads come first, then that of the proposals, then those of encoder layers. A head is
stored once more below every module that uses it.
"""

from __future__ import annotations

from dataclasses import dataclass

from efficient_detr.checkpoint.conversion import Copy, Rename, Row, matches_template
from efficient_detr.checkpoint.layout import Shapes

PROPOSAL_HEAD = "detector.proposals.head."


def count_keys(shapes: Shapes, template: str) -> int:
    """How many weights a template stands for: with one number in it, how many numbers there are."""
    return sum(matches_template(template, key) for key in shapes)


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
    def of_file(cls, shapes: Shapes, decoder_norm: str) -> NumberedHeads:
        """Those of an official file, one of whose keys in each decoder layer is a template."""
        decoder_layers = count_keys(shapes, decoder_norm)
        proposals = "transformer.enc_output.weight" in shapes
        refined = any(key.startswith("transformer.decoder.bbox_embed.") for key in shapes)
        heads = count_keys(shapes, "class_embed.{head}.weight")
        return cls(
            decoder_layers=decoder_layers,
            # Refinement needs the boxes of every layer inside the decoder, proposals refinement.
            one_head=not proposals and not refined,
            proposals=proposals,
            encoder_layers=max(0, heads - decoder_layers - 1) if proposals else 0,
        )

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
