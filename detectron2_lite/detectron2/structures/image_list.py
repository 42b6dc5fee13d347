"""Images of differing sizes in one padded tensor."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


class ImageList:
    """B images in ``tensor`` (B, ..., H, W), padded at the bottom and on the right.

    ``image_sizes`` holds their (height, width) without padding; while ``torch.jit.trace`` runs
    these are tensors (2,), so that the graph does not freeze them.
    """

    def __init__(self, tensor: Tensor, image_sizes: list[tuple[int, int]]) -> None:
        self.tensor = tensor
        self.image_sizes = image_sizes

    def __len__(self) -> int:
        return len(self.image_sizes)

    def __getitem__(self, idx: int) -> Tensor:
        """Image ``idx`` without its padding."""
        height, width = self.image_sizes[idx][0], self.image_sizes[idx][1]
        return self.tensor[idx, ..., :height, :width]

    def to(self, *args: Any, **kwargs: Any) -> ImageList:
        """The same images after ``Tensor.to``."""
        return ImageList(self.tensor.to(*args, **kwargs), self.image_sizes)

    @property
    def device(self) -> torch.device:
        """Where the images lie."""
        return self.tensor.device

    @staticmethod
    def from_tensors(
        tensors: Sequence[Tensor],
        size_divisibility: int = 0,
        pad_value: float = 0.0,
        padding_constraints: Mapping[str, int] | None = None,
    ) -> ImageList:
        """Pad B images (..., H_i, W_i) with ``pad_value`` to the smallest common size.

        The padded height and width are multiples of ``size_divisibility`` where that is above 1.
        ``padding_constraints`` may hold ``square_size``, the side of the padded images, and a
        ``size_divisibility`` that has precedence (see ``Backbone.padding_constraints``).
        """
        assert isinstance(tensors, (list, tuple)) and len(tensors) > 0
        for image in tensors:
            assert isinstance(image, Tensor), type(image)
            assert image.shape[:-2] == tensors[0].shape[:-2], "images differ in more than size"
        constraints = padding_constraints or {}
        divisor = constraints.get("size_divisibility", size_divisibility)
        sizes: list[Any] = [tuple(image.shape[-2:]) for image in tensors]
        if torch.jit.is_tracing():
            sizes = [torch.stack(size) for size in sizes]
        height, width = _padded_size(sizes, divisor, constraints.get("square_size", 0))
        if len(tensors) == 1:
            image = tensors[0]
            padding = [0, width - image.shape[-1], 0, height - image.shape[-2]]
            batch = F.pad(image, padding, value=pad_value).unsqueeze(0)
        else:
            shape = [len(tensors), *tensors[0].shape[:-2], height, width]
            batch = tensors[0].new_full(shape, pad_value)
            for index, image in enumerate(tensors):
                batch[index, ..., : image.shape[-2], : image.shape[-1]].copy_(image)
        return ImageList(batch.contiguous(), sizes)


def _padded_size(sizes: list[Any], divisor: int, square_size: int) -> list[Any]:
    """Common (height, width): Python ints, or tensors that follow the sizes while tracing."""
    tracing = torch.jit.is_tracing()
    largest = (torch.stack(sizes) if tracing else torch.tensor(sizes)).max(0).values
    if square_size > 0:
        largest = torch.full_like(largest, square_size)
    if divisor > 1:
        largest = (largest + (divisor - 1)).div(divisor, rounding_mode="floor") * divisor
    return list(largest.unbind()) if tracing else largest.tolist()
