"""Joining registered datasets, and loaders for training and evaluation."""

import logging
from collections import Counter
from collections.abc import Callable, Sequence
from itertools import chain
from typing import Any

import torch
from detectron2.utils.comm import get_world_size
from detectron2.utils.env import seed_all_rng
from tabulate import tabulate
from torch.utils import data

from .catalog import DatasetCatalog, MetadataCatalog
from .common import AspectRatioGroupedDataset, DatasetFromList, MapDataset
from .samplers import InferenceSampler, TrainingSampler

Entries = Sequence[dict[str, Any]]
Function = Callable[[Any], Any]
logger = logging.getLogger(__name__)


def print_instances_class_histogram(dataset_dicts: Entries, class_names: Sequence[str]) -> None:
    """Log how many objects other than crowds each class has."""
    objects = chain.from_iterable(entry["annotations"] for entry in dataset_dicts)
    counts = Counter(obj["category_id"] for obj in objects if not obj.get("iscrowd", 0))
    rows = [(name, counts[index]) for index, name in enumerate(class_names)]
    table = tabulate(rows, headers=("category", "#instances"), tablefmt="pipe")
    logger.info("Objects in each of %d classes (%d in all):\n%s", len(rows), counts.total(), table)


def get_detection_dataset_dicts(
    names: str | Sequence[str], filter_empty: bool = True, *, check_consistency: bool = True
) -> list[dict[str, Any]]:
    """Join registered datasets, without images of no object but crowds if ``filter_empty``.

    AssertionError if no image is left, ValueError if ``thing_classes`` are inconsistent.
    """
    names = [names] if isinstance(names, str) else names
    loaded = [DatasetCatalog.get(name) for name in names]
    for name, entries in zip(names, loaded, strict=True):
        assert len(entries) > 0, f"dataset '{name}' has no images"
        classes = [MetadataCatalog.get(n).get("thing_classes") for n in (names[0], name)]
        if check_consistency and classes[0] != classes[1]:
            raise ValueError(f"thing_classes of '{names[0]}' and '{name}' differ: {classes}")
    joined = list(chain.from_iterable(loaded))
    if filter_empty and joined and "annotations" in joined[0]:
        usable = [d for d in joined if any(not o.get("iscrowd", 0) for o in d["annotations"])]
        logger.info("%d of %d images have usable objects", len(usable), len(joined))
        joined = usable
    assert joined, f"no image of {', '.join(names)} has an object"
    return joined


def _map_dataset(dataset: Any, mapper: Function | None) -> Any:
    if isinstance(dataset, list):
        dataset = DatasetFromList(dataset, copy=False)
    return dataset if mapper is None else MapDataset(dataset, mapper)


def build_detection_train_loader(
    dataset: Any,
    *,
    mapper: Function | None,
    sampler: data.Sampler | None = None,
    total_batch_size: int,
    aspect_ratio_grouping: bool = True,
    num_workers: int = 0,
    collate_fn: Function | None = None,
    **kwargs: Any,
) -> Any:
    """An endless loader of a list or map-style dataset; ``kwargs`` are those of ``DataLoader``."""
    dataset = _map_dataset(dataset, mapper)
    batch_size, rest = divmod(total_batch_size, get_world_size())
    fits = batch_size > 0 and rest == 0
    assert fits, f"total_batch_size {total_batch_size} is no multiple of {get_world_size()}"
    kwargs.update(num_workers=num_workers, worker_init_fn=worker_init_reset_seed)
    kwargs["sampler"] = TrainingSampler(len(dataset)) if sampler is None else sampler
    if not aspect_ratio_grouping:
        kwargs["collate_fn"] = collate_fn or trivial_batch_collator
        return data.DataLoader(dataset, batch_size, drop_last=True, **kwargs)
    assert collate_fn is None, "grouped batches are lists; set aspect_ratio_grouping to False"
    singles = data.DataLoader(dataset, batch_size=None, collate_fn=trivial_batch_collator, **kwargs)
    return AspectRatioGroupedDataset(singles, batch_size)


def build_detection_test_loader(
    dataset: Any,
    *,
    mapper: Function | None,
    sampler: data.Sampler | None = None,
    batch_size: int = 1,
    num_workers: int = 0,
    collate_fn: Function | None = None,
) -> data.DataLoader:
    """A loader of every image once, ``batch_size`` of them at a time in each process."""
    dataset = _map_dataset(dataset, mapper)
    return data.DataLoader(
        dataset,
        batch_size=batch_size,
        sampler=InferenceSampler(len(dataset)) if sampler is None else sampler,
        num_workers=num_workers,
        collate_fn=collate_fn or trivial_batch_collator,
    )


def trivial_batch_collator(batch: Any) -> Any:
    """A batch as the list it already is."""
    return batch


def worker_init_reset_seed(worker_id: int) -> None:
    """Seed Python, NumPy and PyTorch in a loader process, differently in each."""
    seed_all_rng(torch.initial_seed() % 2**31 + worker_id)
