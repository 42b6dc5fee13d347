"""Samplers whose indices are split over the processes of a distributed run."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from torch.utils.data.sampler import Sampler

from detectron2.utils import comm


class _EndlessSampler(Sampler[int]):
    """Epoch after epoch of shuffled indices, of which each process takes every world-size-th."""

    def __init__(self, shuffle: bool, seed: int | None) -> None:
        self._shuffle = shuffle
        self._seed = int(comm.shared_random_seed() if seed is None else seed)
        self._rank = comm.get_rank()
        self._world_size = comm.get_world_size()

    def _epoch(self, generator: torch.Generator) -> Tensor:
        """Indices of one epoch before shuffling."""
        raise NotImplementedError

    def _indices(self) -> Iterator[int]:
        generator = torch.Generator()
        generator.manual_seed(self._seed)
        while True:
            indices = self._epoch(generator)
            if self._shuffle:
                indices = indices[torch.randperm(len(indices), generator=generator)]
            yield from indices.tolist()

    def __iter__(self) -> Iterator[int]:
        return islice(self._indices(), self._rank, None, self._world_size)


class TrainingSampler(_EndlessSampler):
    """Endless shuffled indices 0 ... size - 1."""

    def __init__(self, size: int, shuffle: bool = True, seed: int | None = None) -> None:
        """Set up the stream.

        Args:
            size: number of samples.
            shuffle: otherwise every epoch is in order.
            seed: equal in all processes; None draws one that they share.

        Raises:
            TypeError: ``size`` is not an int.
            ValueError: ``size`` is not positive.
        """
        if not isinstance(size, int):
            raise TypeError(f"size of TrainingSampler is an int, got {type(size)}")
        if size <= 0:
            raise ValueError(f"size of TrainingSampler is positive, got {size}")
        super().__init__(shuffle, seed)
        self._size = size

    def _epoch(self, generator: torch.Generator) -> Tensor:
        return torch.arange(self._size)


class RepeatFactorTrainingSampler(_EndlessSampler):
    """Endless indices in which images of rare classes come more often (LVIS, arXiv:1908.03195)."""

    def __init__(
        self, repeat_factors: Tensor, *, shuffle: bool = True, seed: int | None = None
    ) -> None:
        """Set up the stream.

        Args:
            repeat_factors: how often each sample comes in an epoch, (samples,); fractions are
                rounded up or down at random, anew in each epoch.
            shuffle: otherwise every epoch is in order.
            seed: equal in all processes; None draws one that they share.
        """
        super().__init__(shuffle, seed)
        self._int_part = torch.trunc(repeat_factors)
        self._frac_part = repeat_factors - self._int_part

    @staticmethod
    def repeat_factors_from_category_frequency(
        dataset_dicts: Sequence[dict[str, Any]], repeat_thresh: float, sqrt: bool = True
    ) -> Tensor:
        """Repeat factors of images, ``max over classes c of max(1, sqrt(t / f(c)))``.

        Args:
            dataset_dicts: images with ``annotations`` that have a ``category_id``.
            repeat_thresh: t; classes in a smaller fraction f(c) of the images are repeated.
            sqrt: take the square root, as the paper does (appendix B.2).

        Returns:
            float32 (images,); 1 for images without objects.
        """
        present = [{obj["category_id"] for obj in d["annotations"]} for d in dataset_dicts]
        counts = Counter(category for categories in present for category in categories)
        ratios = {c: repeat_thresh * len(present) / count for c, count in counts.items()}
        factors = {c: max(1.0, math.sqrt(r) if sqrt else r) for c, r in ratios.items()}
        per_image = [max((factors[c] for c in categories), default=1.0) for categories in present]
        return torch.tensor(per_image, dtype=torch.float32)

    def _epoch(self, generator: torch.Generator) -> Tensor:
        rounded_up = torch.rand(len(self._frac_part), generator=generator) < self._frac_part
        repeats = self._int_part.long() + rounded_up.long()
        return torch.repeat_interleave(torch.arange(len(repeats)), repeats)


class InferenceSampler(Sampler[int]):
    """Every index once: each process gets a contiguous range, the first ones one index more."""

    def __init__(self, size: int) -> None:
        """Split ``size`` samples (at least 1)."""
        assert size > 0, "there is nothing to evaluate: the dataset is empty"
        rank, world_size = comm.get_rank(), comm.get_world_size()
        share, left = divmod(size, world_size)
        begin = rank * share + min(rank, left)
        self._local_indices = range(begin, begin + share + int(rank < left))

    def __iter__(self) -> Iterator[int]:
        yield from self._local_indices

    def __len__(self) -> int:
        return len(self._local_indices)
