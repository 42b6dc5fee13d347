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
        self.tensor, self.image_sizes = tensor, image_sizes

    def __len__(self) -> int:
        return len(self.image_sizes)

    def __getitem__(self, idx: int) -> Tensor:
        """Image ``idx`` without its padding."""
        height, width = self.image_sizes[idx][0], self.image_sizes[idx][1]
        return self.tensor[idx, ..., :height, :width]

    def to(self, *args: Any, **kwargs: Any) -> ImageList:
        return ImageList(self.tensor.to(*args, **kwargs), self.image_sizes)

    @property
    def device(self) -> torch.device:
        return self.tensor.device

    @staticmethod
    def from_tensors(
        tensors: Sequence[Tensor],
        size_divisibility: int = 0,
        pad_value: float = 0.0,
        padding_constraints: Mapping[str, int] | None = None,
    ) -> ImageList:
        """Pad images (..., H_i, W_i) to the smallest common multiple of ``size_divisibility``.

        ``padding_constraints`` may hold ``square_size`` and a preferred ``size_divisibility``.
        """
        constraints = padding_constraints or {}
        divisor = max(constraints.get("size_divisibility", size_divisibility), 1)
        sizes: list[Any] = [tuple(image.shape[-2:]) for image in tensors]
        tracing = torch.jit.is_tracing()
        if tracing:
            sizes = [torch.stack(size) for size in sizes]
        largest = (torch.stack(sizes) if tracing else torch.tensor(sizes)).max(0).values
        if constraints.get("square_size", 0) > 0:
            largest = torch.full_like(largest, constraints["square_size"])
        if divisor > 1:
            largest = (largest + (divisor - 1)).div(divisor, rounding_mode="floor") * divisor
        height, width = largest.unbind() if tracing else largest.tolist()
        padded = []
        for image in tensors:
            padding: Any = [0, width - image.shape[-1], 0, height - image.shape[-2]]
            padded.append(F.pad(image, padding, value=pad_value))
        batch = padded[0].unsqueeze(0) if len(padded) == 1 else torch.stack(padded)
        return ImageList(batch.contiguous(), sizes)
