"""Datasets made from lists, functions and other datasets."""

import copy as copy_module
import pickle
import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from detectron2.utils.serialize import PicklableWrapper
from torch.utils import data


class MapDataset(data.Dataset):
    """Another dataset with a function applied; where it returns None, another sample is drawn."""

    def __init__(self, dataset: Any, map_func: Callable[[Any], Any]) -> None:
        self._dataset = dataset
        self._map_func = PicklableWrapper(map_func)
        self._rng = random.Random(42)

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, idx: int) -> Any:
        for _ in range(1000):
            sample = self._map_func(self._dataset[idx])
            if sample is not None:
                return sample
            idx = self._rng.randrange(len(self))
        raise ValueError("the map function returned None for 1000 samples of the dataset")


class _SerializedList:
    """Pickled elements in one tensor: forked workers share it, since nothing counts references."""

    def __init__(self, elements: Sequence[Any]) -> None:
        pickled = [pickle.dumps(element, -1) for element in elements]
        self._ends = torch.tensor(np.cumsum([len(entry) for entry in pickled], dtype=np.int64))
        self._bytes = torch.frombuffer(bytearray().join(pickled), dtype=torch.uint8)

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, idx: int) -> Any:
        start = 0 if idx == 0 else int(self._ends[idx - 1])
        return pickle.loads(self._bytes[start : int(self._ends[idx])].numpy().data)


class DatasetFromList(data.Dataset):
    """A list as a dataset, pickled in shared memory, or deep-copied at each access if ``copy``."""

    def __init__(self, lst: Sequence[Any], copy: bool = True, serialize: bool = True) -> None:
        self._copy = copy and not serialize
        self._lst = _SerializedList(lst) if serialize else lst

    def __len__(self) -> int:
        return len(self._lst)

    def __getitem__(self, idx: int) -> Any:
        return copy_module.deepcopy(self._lst[idx]) if self._copy else self._lst[idx]


class AspectRatioGroupedDataset(data.IterableDataset):
    """Batches of dictionaries with ``width`` > ``height`` in all or none; saves padding."""

    def __init__(self, dataset: Any, batch_size: int) -> None:
        self.dataset, self.batch_size = dataset, batch_size
        self._buckets: tuple[list[Any], list[Any]] = ([], [])

    def __iter__(self) -> Iterator[list[Any]]:
        for sample in self.dataset:
            bucket = self._buckets[sample["width"] <= sample["height"]]
            bucket.append(sample)
            if len(bucket) == self.batch_size:
                batch = bucket[:]  # a copy, and emptied first: the caller may keep the batch
                bucket.clear()
                yield batch
