"""The figures that others published, read from `tools/published_figures.yaml`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from efficient_detr.errors import UserError

SCORES = ("AP", "AP50", "AP75", "APs", "APm", "APl")


@dataclass(frozen=True)
class Result:
    """Accuracy on COCO val2017 as somebody published it.

    Attributes:
        source: key of `Published.sources`.
        scores: percent, by the names of `SCORES`; what the source does not give is absent.
        epochs: of training on COCO; "" if the source does not say.
        parameters: in millions, or None if the source does not say.
    """

    source: str
    scores: dict[str, float]
    epochs: str = ""
    parameters: float | None = None


@dataclass(frozen=True)
class Protocol:
    """How GFLOPs were counted.

    Attributes:
        text: in words.
        mean_image: whether they can be compared with those of an image of the mean cost.
    """

    text: str
    mean_image: bool


@dataclass(frozen=True)
class QuotedCost:
    """GFLOPs as somebody published them.

    Attributes:
        value: 10^9 operations an image.
        protocol: key of `Published.protocols`.
        source: key of `Published.sources`.
    """

    value: float
    protocol: str
    source: str


@dataclass(frozen=True)
class AuthorsCode:
    """What the authors' code costs on one image of 800 x 1333 pixels, counted with fvcore.

    Attributes:
        gflops: of the whole model.
        encoder: of its encoder.
        differences: by how many GFLOPs this project's model costs more, by key of
            `Published.reasons`.
        encoder_differences: the same for the encoder, where stages are cut differently.
        mean_image: of the whole model on an image of the mean cost, or None.
        reconstruction: whether it is code after the paper, because the authors' is not public.
    """

    gflops: float
    encoder: float
    differences: dict[str, float] = field(default_factory=dict)
    encoder_differences: dict[str, float] = field(default_factory=dict)
    mean_image: float | None = None
    reconstruction: bool = False


@dataclass(frozen=True)
class Model:
    """What is published about the model of one config, or of a variant of one.

    Attributes:
        config: stem of the file in `configs/`, or key of `Published.variants`.
        label: short name for pictures.
        baseline: model whose latency is the unit; "" if there is none.
        replaces: model of the same training whose attention this one makes cheaper, or "".
        results: accuracy, the preferred source first.
        gflops: None if nobody published any.
        code: None if the authors' code was not counted.
        remark: a sentence, or "".
    """

    config: str
    label: str
    baseline: str = ""
    replaces: str = ""
    results: tuple[Result, ...] = ()
    gflops: QuotedCost | None = None
    code: AuthorsCode | None = None
    remark: str = ""

    @property
    def precision(self) -> float | None:
        """AP of the preferred source, in percent."""
        return self.results[0].scores.get("AP") if self.results else None

    @property
    def epochs(self) -> str:
        """Epochs of the training behind that AP; "" if there is none."""
        return self.results[0].epochs if self.results else ""

    @property
    def parameters(self) -> float | None:
        """Millions of parameters of the first source that gives them, or None."""
        found = (result.parameters for result in self.results)
        return next((value for value in found if value is not None), None)


@dataclass(frozen=True)
class Family:
    """Models that share a table.

    Attributes:
        title: heading.
        text: what they have in common; Markdown.
        models: in the order of the table.
    """

    title: str
    text: str
    models: tuple[Model, ...]


@dataclass(frozen=True)
class Variant:
    """A model that is a config with overrides.

    Attributes:
        config: stem of the file in `configs/`.
        overrides: "path.to.key=value", as after `--opts`.
    """

    config: str
    overrides: tuple[str, ...]


@dataclass(frozen=True)
class Published:
    """Everything in the file.

    Attributes:
        families: in the order of the document.
        sources: where figures stand, by key.
        protocols: how they were counted, by key.
        reasons: why counts differ from the authors' code, by key.
        variants: models that are a config with overrides, by name.
    """

    families: tuple[Family, ...]
    sources: dict[str, str]
    protocols: dict[str, Protocol]
    reasons: dict[str, str]
    variants: dict[str, Variant] = field(default_factory=dict)

    @property
    def models(self) -> dict[str, Model]:
        """All models by config."""
        return {model.config: model for family in self.families for model in family.models}


def read_published(path: Path) -> Published:
    """Read the figures.

    Raises:
        UserError: the file is not as its head describes it.
    """
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
        families = tuple(_family(family) for family in content["families"])
        published = Published(
            families,
            content["sources"],
            {name: Protocol(**protocol) for name, protocol in content["protocols"].items()},
            content["reasons"],
            {
                name: Variant(variant["config"], tuple(variant["overrides"]))
                for name, variant in content["variants"].items()
            },
        )
    except (OSError, yaml.YAMLError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise UserError(
            f"{path} is no file of published figures as its head describes it: {error!r}."
        ) from error
    for model in published.models.values():
        _check(model, published, path)
    return published


def _family(content: Mapping[str, Any]) -> Family:
    return Family(
        title=content["title"],
        text=content["text"],
        models=tuple(_model(dict(model)) for model in content["models"]),
    )


def _model(content: dict[str, Any]) -> Model:
    results = tuple(_result(dict(result)) for result in content.pop("results", []))
    cost, code = content.pop("gflops", None), content.pop("code", None)
    return Model(
        results=results,
        gflops=None if cost is None else QuotedCost(**cost),
        code=None if code is None else AuthorsCode(**code),
        **content,
    )


def _result(content: dict[str, Any]) -> Result:
    source, epochs = content.pop("source"), str(content.pop("epochs", ""))
    result = Result(source, content, epochs, content.pop("parameters", None))
    unknown = sorted(set(content) - set(SCORES))
    if unknown:
        raise ValueError(f"unknown scores {unknown}")
    return result


def _check(model: Model, published: Published, path: Path) -> None:
    """Refuse names that nothing in the file explains."""
    cost, code = model.gflops, model.code
    reasons = [*code.differences, *code.encoder_differences] if code else []
    names: dict[str, tuple[list[str], Mapping[str, Any]]] = {
        "source": ([result.source for result in model.results], published.sources),
        "source of GFLOPs": ([cost.source] if cost else [], published.sources),
        "protocol": ([cost.protocol] if cost else [], published.protocols),
        "reason": (reasons, published.reasons),
        "baseline": ([model.baseline] if model.baseline else [], published.models),
        "replaced model": ([model.replaces] if model.replaces else [], published.models),
    }
    for kind, (used, known) in names.items():
        for name in used:
            if name not in known:
                raise UserError(
                    f'{path}: the {kind} "{name}" of {model.config} is none of {sorted(known)}.'
                )
