"""The order in which samples are visited, split over the processes of a distributed run."""

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import chain, islice
from typing import Any

import torch
from detectron2.utils import comm
from torch import Tensor
from torch.utils.data.sampler import Sampler


class TrainingSampler(Sampler[int]):
    """Endless shuffled indices, of which each process takes every world-size-th.

    ``seed`` is equal in all processes; None draws one that they share.
    """

    def __init__(self, size: int, shuffle: bool = True, seed: int | None = None) -> None:
        if not isinstance(size, int):
            raise TypeError(f"size of TrainingSampler is an int, got {type(size)}")
        if size <= 0:
            raise ValueError(f"size of TrainingSampler is positive, got {size}")
        self._size, self._shuffle = size, shuffle
        self._seed = int(comm.shared_random_seed() if seed is None else seed)
        self._rank, self._world_size = comm.get_rank(), comm.get_world_size()

    def _epoch(self, generator: torch.Generator) -> Tensor:
        """Indices of one epoch before shuffling."""
        return torch.arange(self._size)

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


class RepeatFactorTrainingSampler(TrainingSampler):
    """Endless indices in which images of rare classes come more often (LVIS, arXiv:1908.03195).

    ``repeat_factors`` (samples,) are rounded up or down at random, anew in each epoch.
    """

    def __init__(
        self, repeat_factors: Tensor, *, shuffle: bool = True, seed: int | None = None
    ) -> None:
        super().__init__(len(repeat_factors), shuffle, seed)
        self._int_part = torch.trunc(repeat_factors)
        self._frac_part = repeat_factors - self._int_part

    @staticmethod
    def repeat_factors_from_category_frequency(
        dataset_dicts: Sequence[dict[str, Any]], repeat_thresh: float, sqrt: bool = True
    ) -> Tensor:
        """``max over classes c of max(1, sqrt(threshold / f(c)))``, float32 (images,).

        f(c) is the fraction of images with class c (appendix B.2 of the paper).
        """
        present = [{obj["category_id"] for obj in d["annotations"]} for d in dataset_dicts]
        counts = Counter(chain.from_iterable(present))
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
        assert size > 0, "there is nothing to evaluate: the dataset is empty"
        rank = comm.get_rank()
        share, left = divmod(size, comm.get_world_size())
        begin = rank * share + min(rank, left)
        self._local_indices = range(begin, begin + share + int(rank < left))

    def __iter__(self) -> Iterator[int]:
        return iter(self._local_indices)

    def __len__(self) -> int:
        return len(self._local_indices)
