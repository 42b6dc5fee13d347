"""What augmentations are: random choices of transforms of an image and its boxes."""

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

    def _init(self, params: Mapping[str, Any]) -> None:
        """Set the entries of ``locals()`` of a constructor as attributes."""
        for name, value in params.items():
            if name != "self" and not name.startswith("_"):
                setattr(self, name, value)

    def get_transform(self, *args: Any) -> Transform:
        raise NotImplementedError

    def __call__(self, aug_input: Any) -> Transform:
        """Choose a transform, apply it to ``aug_input`` in place, and return it."""
        names = list(inspect.signature(self.get_transform).parameters)
        names = names if len(names) > 1 else ["image"]
        for name in names:
            if not hasattr(aug_input, name):
                raise AttributeError(f"{type(self)} needs '{name}', which {type(aug_input)} lacks")
        transform = self.get_transform(*(getattr(aug_input, name) for name in names))
        aug_input.transform(transform)
        return transform

    def __repr__(self) -> str:
        shown = []
        for name, parameter in inspect.signature(type(self)).parameters.items():
            if not hasattr(self, name):
                return super().__repr__()
            value = getattr(self, name)
            if value is not parameter.default:
                shown.append(f"{name}={pprint.pformat(value)}")
        return f"{type(self).__name__}({', '.join(shown)})"


class _TransformAsAugmentation(Augmentation):
    def __init__(self, transform: Transform) -> None:
        self.transform = transform

    def get_transform(self, image: np.ndarray) -> Transform:
        return self.transform

    def __repr__(self) -> str:
        return repr(self.transform)


def _transform_to_aug(transform_or_aug: Transform | Augmentation) -> Augmentation:
    if isinstance(transform_or_aug, Transform):
        return _TransformAsAugmentation(transform_or_aug)
    return transform_or_aug


class AugmentationList(Augmentation):
    """Augmentations and transforms one after the other, each on the result of those before it."""

    def __init__(self, augs: Sequence[Augmentation | Transform]) -> None:
        self.augs = [_transform_to_aug(aug) for aug in augs]

    def __call__(self, aug_input: Any) -> TransformList:
        return TransformList([aug(aug_input) for aug in self.augs])

    def __repr__(self) -> str:
        return f"AugmentationList[{', '.join(str(aug) for aug in self.augs)}]"


class AugInput:
    """What augmentations see and change: ``image``, and ``boxes`` (T, 4) in pixels as corners.

    Any other object with attributes and a method ``transform`` serves as well.
    """

    def __init__(self, image: np.ndarray, *, boxes: np.ndarray | None = None) -> None:
        assert image.ndim in (2, 3), f"an image is (H, W) or (H, W, C), got {image.shape}"
        self.image, self.boxes = image, boxes

    def transform(self, tfm: Transform) -> None:
        """Replace both by their transformed values."""
        self.image = tfm.apply_image(self.image)
        if self.boxes is not None:
            self.boxes = tfm.apply_box(self.boxes)


def apply_augmentations(
    augmentations: Sequence[Augmentation | Transform], inputs: np.ndarray
) -> tuple[np.ndarray, TransformList]:
    """Augment an image; returns the result and the transforms."""
    aug_input = AugInput(inputs)
    transforms = AugmentationList(augmentations)(aug_input)
    return aug_input.image, transforms


apply_transform_gens = apply_augmentations  # its older name
