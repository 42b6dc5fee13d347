"""Loaders for training and evaluation."""

import logging
import operator
from collections.abc import Callable, Sequence
from itertools import chain, zip_longest
from typing import Any

import numpy as np
import torch
from detectron2._absent import absence_message
from detectron2.utils.comm import get_world_size
from detectron2.utils.env import seed_all_rng
from detectron2.utils.logger import log_first_n
from tabulate import tabulate
from torch.utils import data

from .catalog import DatasetCatalog, MetadataCatalog
from .common import AspectRatioGroupedDataset, DatasetFromList, MapDataset, ToIterableDataset
from .detection_utils import check_metadata_consistency
from .samplers import InferenceSampler, TrainingSampler

Entries = Sequence[dict[str, Any]]
Collate = Callable[[list[Any]], Any]
logger = logging.getLogger(__name__)


def filter_images_with_only_crowd_annotations(dataset_dicts: Entries) -> list[dict[str, Any]]:
    """The images that have an object which is no crowd."""
    usable = [d for d in dataset_dicts if any(not o.get("iscrowd", 0) for o in d["annotations"])]
    removed = len(dataset_dicts) - len(usable)
    logger.info("Left out %d images without usable objects; %d remain", removed, len(usable))
    return usable


def print_instances_class_histogram(dataset_dicts: Entries, class_names: Sequence[str]) -> None:
    """Log a table of the number of objects in each class (once for each distinct table)."""
    counts = np.zeros(len(class_names), dtype=int)
    for obj in chain.from_iterable(entry["annotations"] for entry in dataset_dicts):
        if not obj.get("iscrowd", 0):
            category = obj["category_id"]
            assert 0 <= category < len(counts), f"category_id {category} of {len(counts)} classes"
            counts[category] += 1
    names = [name if len(name) <= 13 else name[:11] + ".." for name in class_names]
    pairs = [*zip(names, counts.tolist(), strict=True), ("total", int(counts.sum()))]
    table = column_table(pairs, ["category", "#instances"])
    log_first_n(logging.INFO, f"Objects in each of {len(counts)} classes:\n{table}", key="message")


def column_table(pairs: Sequence[tuple[Any, Any]], headers: Sequence[str]) -> str:
    """A table of name and value with up to three pairs in a row."""
    columns = 2 * min(3, len(pairs))
    cells = list(chain.from_iterable(pairs))
    rows = zip_longest(*(cells[start::columns] for start in range(columns)))
    headers = [*headers] * (columns // 2)
    return tabulate(rows, headers=headers, tablefmt="pipe", floatfmt=".3f", numalign="left")


def get_detection_dataset_dicts(
    names: str | Sequence[str],
    filter_empty: bool = True,
    min_keypoints: int = 0,
    proposal_files: Sequence[str] | None = None,
    check_consistency: bool = True,
) -> Any:
    """Load one or several registered datasets and join them to a list of images.

    A registered torch Dataset is returned as it is. ``filter_empty`` leaves out images without
    objects other than crowds. ``check_consistency`` requires equal ``thing_classes`` (ValueError)
    and logs how many objects each has. No images: AssertionError; a name that is not registered:
    KeyError; keypoints or proposals: NotImplementedError.
    """
    if min_keypoints > 0 or proposal_files is not None:
        raise NotImplementedError(absence_message("loading of keypoints and proposals"))
    names = [names] if isinstance(names, str) else names
    assert len(names) > 0, "no dataset is named"
    loaded = [DatasetCatalog.get(name) for name in names]
    if isinstance(loaded[0], data.Dataset):
        return data.ConcatDataset(loaded) if len(loaded) > 1 else loaded[0]
    for name, entries in zip(names, loaded, strict=True):
        assert len(entries) > 0, f"dataset '{name}' has no images"
    joined = list(chain.from_iterable(loaded))
    if "annotations" in joined[0]:
        if filter_empty:
            joined = filter_images_with_only_crowd_annotations(joined)
        if check_consistency and hasattr(MetadataCatalog.get(names[0]), "thing_classes"):
            check_metadata_consistency("thing_classes", names)
            print_instances_class_histogram(joined, MetadataCatalog.get(names[0]).thing_classes)
    assert joined, f"no image of {', '.join(names)} has an object"
    return joined


def build_batch_data_loader(
    dataset: Any,
    sampler: data.Sampler | None,
    total_batch_size: int,
    *,
    aspect_ratio_grouping: bool = False,
    num_workers: int = 0,
    collate_fn: Collate | None = None,
    drop_last: bool = True,
    single_gpu_batch_size: int | None = None,
    prefetch_factor: int = 2,
    persistent_workers: bool = False,
    pin_memory: bool = False,
    seed: int | None = None,
    **kwargs: Any,
) -> Any:
    """Batch a mapped dataset; see :func:`build_detection_train_loader` for the arguments.

    AssertionError if the batch size cannot be divided among the processes, an iterable dataset
    has a sampler, or incomplete batches are to be kept with grouping; ValueError if both kinds of
    batch size are given.
    """
    if single_gpu_batch_size:
        if total_batch_size:
            raise ValueError("give total_batch_size or single_gpu_batch_size, not both")
        batch_size = single_gpu_batch_size
    else:
        processes = get_world_size()
        batch_size = total_batch_size // processes
        fits = batch_size > 0 and batch_size * processes == total_batch_size
        assert fits, f"total_batch_size {total_batch_size} is no multiple of {processes} processes"
    if isinstance(dataset, data.IterableDataset):
        assert sampler is None, "an iterable dataset has its own order and takes no sampler"
    else:
        assert sampler is not None, "a dataset with indices needs a sampler"
        dataset = ToIterableDataset(dataset, sampler, shard_chunk_size=batch_size)
    if seed is not None:
        kwargs["generator"] = torch.Generator()
        kwargs["generator"].manual_seed(seed)
    kwargs.update(
        num_workers=num_workers,
        worker_init_fn=worker_init_reset_seed,
        prefetch_factor=prefetch_factor if num_workers > 0 else None,
        persistent_workers=persistent_workers,
        pin_memory=pin_memory,
    )
    if not aspect_ratio_grouping:
        kwargs.update(drop_last=drop_last, collate_fn=collate_fn or trivial_batch_collator)
        return data.DataLoader(dataset, batch_size=batch_size, **kwargs)
    assert drop_last, "aspect_ratio_grouping never yields incomplete batches"
    singles = data.DataLoader(dataset, collate_fn=operator.itemgetter(0), **kwargs)
    batches = AspectRatioGroupedDataset(singles, batch_size)
    return batches if collate_fn is None else MapDataset(batches, collate_fn)


def _map_dataset(dataset: Any, mapper: Callable[[Any], Any] | None) -> Any:
    if isinstance(dataset, list):
        dataset = DatasetFromList(dataset, copy=False)
    return dataset if mapper is None else MapDataset(dataset, mapper)


def build_detection_train_loader(
    dataset: Any,
    *,
    mapper: Callable[[Any], Any] | None,
    sampler: data.Sampler | None = None,
    total_batch_size: int,
    aspect_ratio_grouping: bool = True,
    num_workers: int = 0,
    collate_fn: Collate | None = None,
    **kwargs: Any,
) -> Any:
    """An endless loader of training batches of ``total_batch_size`` images over all processes.

    Args:
        dataset: a list of dictionaries or a torch Dataset.
        mapper: from an entry to a model's input, see ``DatasetMapper``; None keeps entries.
        sampler: the order; default a shuffled :class:`TrainingSampler`. None for iterables.
        total_batch_size: a multiple of the number of processes.
        aspect_ratio_grouping: batch landscape and portrait images apart (by the entries' sizes).
        num_workers: loader processes.
        collate_fn: from a list of inputs to a batch; default keeps the list.
        kwargs: further arguments of :func:`build_batch_data_loader`.
    """
    dataset = _map_dataset(dataset, mapper)
    if not isinstance(dataset, data.IterableDataset):
        sampler = TrainingSampler(len(dataset)) if sampler is None else sampler
        assert isinstance(sampler, data.Sampler), f"sampler is a torch Sampler, got {sampler!r}"
    kwargs.update(aspect_ratio_grouping=aspect_ratio_grouping, num_workers=num_workers)
    return build_batch_data_loader(
        dataset, sampler, total_batch_size, collate_fn=collate_fn, **kwargs
    )


def build_detection_test_loader(
    dataset: Any,
    *,
    mapper: Callable[[Any], Any] | None,
    sampler: data.Sampler | None = None,
    batch_size: int = 1,
    num_workers: int = 0,
    collate_fn: Collate | None = None,
) -> data.DataLoader:
    """A loader of every image once, split over processes by :class:`InferenceSampler`.

    The arguments are those of :func:`build_detection_train_loader`; ``batch_size`` is that of one
    process.
    """
    dataset = _map_dataset(dataset, mapper)
    if isinstance(dataset, data.IterableDataset):
        assert sampler is None, "an iterable dataset has its own order and takes no sampler"
    elif sampler is None:
        sampler = InferenceSampler(len(dataset))
    return data.DataLoader(
        dataset,
        batch_size=batch_size,
        sampler=sampler,
        num_workers=num_workers,
        collate_fn=collate_fn or trivial_batch_collator,
    )


def trivial_batch_collator(batch: list[Any]) -> list[Any]:
    """A batch as the list it already is."""
    return batch


def worker_init_reset_seed(worker_id: int) -> None:
    """Seed Python, NumPy and PyTorch in a loader process, differently in each."""
    seed_all_rng(torch.initial_seed() % 2**31 + worker_id)
