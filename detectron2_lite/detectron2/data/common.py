"""Datasets made from lists, functions and samplers."""

import copy as copy_module
import logging
import pickle
import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from detectron2.utils.serialize import PicklableWrapper
from torch.utils import data
from torch.utils.data.sampler import Sampler

logger = logging.getLogger(__name__)


class MapDataset(data.Dataset):
    """Another dataset with a function applied to each sample.

    Where the function returns None, a random different sample is taken. Over an iterable dataset
    the constructor returns an ``IterableDataset``, which leaves such samples out.
    """

    def __new__(cls, dataset: Any, map_func: Callable[[Any], Any]) -> Any:
        if isinstance(dataset, data.IterableDataset):
            return _MapIterableDataset(dataset, map_func)
        return super().__new__(cls)

    def __getnewargs__(self) -> tuple[Any, Any]:
        return self._dataset, self._map_func

    def __init__(self, dataset: Any, map_func: Callable[[Any], Any]) -> None:
        self._dataset = dataset
        self._map_func = PicklableWrapper(map_func)
        self._rng = random.Random(42)
        self._fallback_candidates = set(range(len(dataset)))

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, idx: int) -> Any:
        current, failures = int(idx), 0
        while (sample := self._map_func(self._dataset[current])) is None:
            failures += 1
            self._fallback_candidates.discard(current)
            if not self._fallback_candidates:
                raise ValueError("the map function returned None for every sample of the dataset")
            current = self._rng.choice(list(self._fallback_candidates))
            if failures >= 3:
                logger.warning("No usable sample for index %d after %d attempts", idx, failures)
        self._fallback_candidates.add(current)
        return sample


class _MapIterableDataset(data.IterableDataset):
    def __init__(self, dataset: Any, map_func: Callable[[Any], Any]) -> None:
        self._dataset = dataset
        self._map_func = PicklableWrapper(map_func)

    def __len__(self) -> int:
        return len(self._dataset)

    def __iter__(self) -> Iterator[Any]:
        return (s for s in map(self._map_func, self._dataset) if s is not None)


class _SerializedList:
    """Pickled elements in one tensor: forked workers share it, since nothing counts references."""

    def __init__(self, elements: Sequence[Any]) -> None:
        pickled = [pickle.dumps(element, -1) for element in elements]
        self._ends = torch.tensor(np.cumsum([len(entry) for entry in pickled], dtype=np.int64))
        self._bytes = torch.frombuffer(bytearray().join(pickled), dtype=torch.uint8)
        size = len(self._bytes) / 2**20
        logger.info("Serialized %d dataset entries to %.2f MiB", len(pickled), size)

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, idx: int) -> Any:
        start = 0 if idx == 0 else int(self._ends[idx - 1])
        return pickle.loads(self._bytes[start : int(self._ends[idx])].numpy().data)


class DatasetFromList(data.Dataset):
    """A list as a dataset."""

    def __init__(
        self, lst: Sequence[Any], copy: bool = True, serialize: bool | Callable[..., Any] = True
    ) -> None:
        """Keep the elements pickled in shared memory (``serialize``), or as they are.

        Accesses return fresh objects in the first case, deep copies in the second if ``copy``. A
        callable ``serialize`` turns the list into another container instead.
        """
        if not (isinstance(serialize, bool) or callable(serialize)):
            raise TypeError(f"serialize is a bool or a callable, got {serialize!r}")
        self._copy = copy and serialize is False
        container = _SerializedList if serialize is True else serialize
        self._lst = container(lst) if container else lst

    def __len__(self) -> int:
        return len(self._lst)

    def __getitem__(self, idx: int) -> Any:
        return copy_module.deepcopy(self._lst[idx]) if self._copy else self._lst[idx]


class ToIterableDataset(data.IterableDataset):
    """The samples of a dataset in the order of a sampler."""

    def __init__(
        self,
        dataset: data.Dataset,
        sampler: Sampler,
        shard_sampler: bool = True,
        shard_chunk_size: int = 1,
    ) -> None:
        """Combine both.

        With ``shard_sampler`` the workers of a loader share the order: they take turns after
        ``shard_chunk_size`` samples (the batch size, if each worker makes whole batches).
        """
        assert not isinstance(dataset, data.IterableDataset), dataset
        assert isinstance(sampler, Sampler), sampler
        self.dataset, self.sampler = dataset, sampler
        self.shard_sampler, self.shard_chunk_size = shard_sampler, shard_chunk_size

    def __iter__(self) -> Iterator[Any]:
        worker = data.get_worker_info() if self.shard_sampler else None
        for position, idx in enumerate(self.sampler):
            turn = position // self.shard_chunk_size
            if worker is None or turn % worker.num_workers == worker.id:
                yield self.dataset[idx]

    def __len__(self) -> int:
        return len(self.sampler)  # type: ignore[arg-type]


class AspectRatioGroupedDataset(data.IterableDataset):
    """Batches in which all images are wider than high, or none; less padding is wasted."""

    def __init__(self, dataset: Any, batch_size: int) -> None:
        """Group an iterable of dictionaries with ``width`` and ``height``."""
        self.dataset = dataset
        self.batch_size = batch_size
        self._buckets: tuple[list[Any], list[Any]] = ([], [])

    def __iter__(self) -> Iterator[list[Any]]:
        for sample in self.dataset:
            bucket = self._buckets[sample["width"] <= sample["height"]]
            bucket.append(sample)
            if len(bucket) == self.batch_size:
                batch = bucket[:]  # a copy, and emptied first: the caller may keep the batch
                bucket.clear()
                yield batch
