"""Augmentations choose transforms, often at random, and apply them to an ``AugInput``."""

import inspect
import pprint
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from fvcore.transforms.transform import Transform, TransformList


class Augmentation:
    """A policy. Subclasses implement ``get_transform`` and draw from NumPy's global generator.

    The parameter names of ``get_transform`` say which attributes of the input it receives, e.g.
    ``get_transform(self, image, boxes)``; a single parameter always receives ``image``.
    """

    input_args: tuple[str, ...] | None = None

    def _init(self, params: Mapping[str, Any] | None = None) -> None:
        """Set the entries of ``locals()`` of a constructor as attributes."""
        for name, value in (params or {}).items():
            if name != "self" and not name.startswith("_"):
                setattr(self, name, value)

    def get_transform(self, *args: Any) -> Transform:
        """Choose the transform for the given inputs."""
        raise NotImplementedError

    def __call__(self, aug_input: Any) -> Transform:
        """Choose a transform, apply it to ``aug_input`` in place, and return it."""
        transform = self.get_transform(*self._arguments(aug_input))
        assert isinstance(transform, Transform), (
            f"{type(self)}.get_transform returned {type(transform)}, which is not a Transform"
        )
        aug_input.transform(transform)
        return transform

    def _arguments(self, aug_input: Any) -> list[Any]:
        if self.input_args is None:
            parameters = inspect.signature(self.get_transform).parameters.values()
            if len(parameters) == 1:
                self.input_args = ("image",)
            elif any(p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD) for p in parameters):
                raise TypeError(
                    f"{type(self)}.get_transform takes a variable number of arguments; name them, "
                    "or override __call__"
                )
            else:
                self.input_args = tuple(parameter.name for parameter in parameters)
        for name in self.input_args:
            if not hasattr(aug_input, name):
                raise AttributeError(
                    f"{type(self)}.get_transform needs '{name}', which {type(aug_input)} lacks"
                )
        return [getattr(aug_input, name) for name in self.input_args]

    def _rand_range(self, low: float = 1.0, high: float | None = None, size: Any = None) -> Any:
        """A uniform random number in [0, low), or in [low, high)."""
        if high is None:
            low, high = 0, low
        return np.random.uniform(low, high, [] if size is None else size)

    def __repr__(self) -> str:
        shown = []
        for name, parameter in inspect.signature(type(self)).parameters.items():
            variable = parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
            if variable or not hasattr(self, name):
                return super().__repr__()
            value = getattr(self, name)
            if value is not parameter.default:
                text = pprint.pformat(value)
                shown.append(f"{name}={text if chr(10) not in text else '...'}")
        return f"{type(self).__name__}({', '.join(shown)})"


class _TransformAsAugmentation(Augmentation):
    input_args = ()

    def __init__(self, transform: Transform) -> None:
        self.transform = transform

    def get_transform(self, *args: Any) -> Transform:
        return self.transform

    def __repr__(self) -> str:
        return repr(self.transform)


def _transform_to_aug(transform_or_aug: Transform | Augmentation) -> Augmentation:
    """Wrap a Transform as the Augmentation that always chooses it."""
    if isinstance(transform_or_aug, Augmentation):
        return transform_or_aug
    assert isinstance(transform_or_aug, Transform), transform_or_aug
    return _TransformAsAugmentation(transform_or_aug)


class AugmentationList(Augmentation):
    """Augmentations and transforms one after the other, each on the result of those before it."""

    def __init__(self, augs: Sequence[Augmentation | Transform]) -> None:
        self.augs = [_transform_to_aug(aug) for aug in augs]

    def __call__(self, aug_input: Any) -> TransformList:
        """Apply all of them and return their transforms."""
        return TransformList([aug(aug_input) for aug in self.augs])

    def __repr__(self) -> str:
        return f"AugmentationList[{', '.join(str(aug) for aug in self.augs)}]"


class AugInput:
    """What augmentations see and change: ``image``, ``boxes`` and ``sem_seg``.

    Any other object with attributes and a method ``transform`` serves as well.
    """

    def __init__(
        self,
        image: np.ndarray,
        *,
        boxes: np.ndarray | None = None,
        sem_seg: np.ndarray | None = None,
    ) -> None:
        """``image``: (H, W) or (H, W, C), uint8 or floating point; ``boxes``: (T, 4) as
        (x0, y0, x1, y1) in pixels; ``sem_seg``: labels (H, W), uint8.
        """
        assert isinstance(image, np.ndarray), f"an image is a numpy array, got {type(image)}"
        assert image.ndim in (2, 3), f"an image is (H, W) or (H, W, C), got {image.shape}"
        self.image = image
        self.boxes = boxes
        self.sem_seg = sem_seg

    def transform(self, tfm: Transform) -> None:
        """Replace every attribute by its transformed value."""
        self.image = tfm.apply_image(self.image)
        if self.boxes is not None:
            self.boxes = tfm.apply_box(self.boxes)
        if self.sem_seg is not None:
            self.sem_seg = tfm.apply_segmentation(self.sem_seg)

    def apply_augmentations(self, augs: Sequence[Augmentation | Transform]) -> TransformList:
        """Apply ``augs`` one after the other."""
        return AugmentationList(augs)(self)


def apply_augmentations(
    augmentations: Sequence[Augmentation | Transform], inputs: Any
) -> tuple[Any, TransformList]:
    """Augment an image array or an ``AugInput``; returns the result and the transforms."""
    aug_input = AugInput(inputs) if isinstance(inputs, np.ndarray) else inputs
    transforms = AugmentationList(augmentations)(aug_input)
    return (aug_input.image if isinstance(inputs, np.ndarray) else inputs), transforms


# Older names of the same.
apply_transform_gens = apply_augmentations
TransformGen = Augmentation
StandardAugInput = AugInput
