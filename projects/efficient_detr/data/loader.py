"""A training loader whose batch number N is a function of (seed, N) alone.

Detectron2's own loader restarts its stream whenever training resumes, and the order in which its
workers deliver decides which images share a batch. Here the main process plans the batches (sampler
and aspect-ratio grouping need no image) and workers only carry the plan out, so a resumed run skips
the batches it has consumed without reading them, and any number of workers gives the same batches.
"""

import itertools
import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from detectron2.data import DatasetFromList
from detectron2.data.samplers import TrainingSampler
from detectron2.utils import comm
from torch.utils.data import DataLoader, Dataset, Sampler

from efficient_detr.data.seeding import AUGMENTATION_STREAM, derive_seed, temporary_seed
from efficient_detr.errors import UserError

logger = logging.getLogger(__name__)

Record = dict[str, Any]
Mapper = Callable[[Record], Record | None]

# A sample of the plan: (position in the global stream of samples, index of the record).
PlannedSample = tuple[int, int]

# A mapper may return None to refuse a record; so many refusals in a row mean that it refuses all.
_MAX_REFUSALS = 100


class BatchPlan(Sampler[list[PlannedSample]]):
    """The endless sequence of this process's batches, from any iteration on.

    Args:
        index_stream: Detectron2 training sampler: endless record indices of this process, the same
            ones each time it is iterated.
        wide: for each record whether it is wider than high. Batches are then made of either wide or
            high pictures, which saves padding; None puts all into one group.
        batch_size: samples a batch, of this process.
        start_iteration: number of batches to leave out at the beginning.
    """

    def __init__(
        self,
        index_stream: Sampler[int],
        *,
        wide: Sequence[bool] | None,
        batch_size: int,
        start_iteration: int = 0,
    ) -> None:
        self.index_stream = index_stream
        self.wide = wide
        self.batch_size = batch_size
        self.start_iteration = start_iteration

    def __iter__(self) -> Iterator[list[PlannedSample]]:
        return itertools.islice(self._batches(), self.start_iteration, None)

    def _batches(self) -> Iterator[list[PlannedSample]]:
        rank, world_size = comm.get_rank(), comm.get_world_size()
        groups: dict[bool, list[PlannedSample]] = {True: [], False: []}
        for number, index in enumerate(self.index_stream):
            group = groups[self.wide[index] if self.wide is not None else True]
            group.append((number * world_size + rank, index))
            if len(group) == self.batch_size:
                yield group.copy()
                group.clear()


class SeededDataset(Dataset[Record]):
    """Maps a planned sample to a model input, under random numbers of its own.

    Args:
        records: the dataset records.
        mapper: turns a record into a model input, or returns None to refuse it: then the next
            record of the data set takes its place.
        seed: seed of the run.
    """

    def __init__(self, records: DatasetFromList, mapper: Mapper, seed: int) -> None:
        self.records = records
        self.mapper = mapper
        self.seed = seed

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, sample: PlannedSample) -> Record:
        position, index = sample
        with temporary_seed(derive_seed(self.seed, AUGMENTATION_STREAM, position)):
            for candidate in range(index, index + min(len(self), _MAX_REFUSALS)):
                mapped = self.mapper(self.records[candidate % len(self)])
                if mapped is not None:
                    return mapped
        raise UserError(
            f"The mapper {type(self.mapper).__name__} refused record {index} and every record that "
            "was tried in its place: check dataloader.train.mapper."
        )


class TrainLoader:
    """Endless iterable of training batches; each batch is a list of model inputs.

    Args:
        records: dataset records with ``width`` and ``height`` if ``aspect_ratio_grouping``.
        mapper: see :class:`SeededDataset`.
        total_batch_size: images an iteration over all processes.
        seed: seed of the run, >= 0; negative for a random one, agreed upon by all processes.
        sampler: Detectron2 training sampler, or None for shuffling without replacement.
        aspect_ratio_grouping: see :class:`BatchPlan`.
        num_workers: data-loading processes; 0 loads in the main process.

    Raises:
        UserError: if the batch cannot be divided among the processes.
    """

    def __init__(
        self,
        records: Sequence[Record],
        *,
        mapper: Mapper,
        total_batch_size: int,
        seed: int = -1,
        sampler: Sampler[int] | None = None,
        aspect_ratio_grouping: bool = True,
        num_workers: int = 0,
    ) -> None:
        world_size = comm.get_world_size()
        if total_batch_size < 1 or total_batch_size % world_size != 0:
            raise UserError(
                f"dataloader.train.total_batch_size={total_batch_size} must be a positive multiple "
                f"of the number of processes, {world_size}."
            )
        self.total_batch_size = total_batch_size
        self.batch_size = total_batch_size // world_size
        self.num_workers = num_workers
        self.seed = seed if seed >= 0 else comm.shared_random_seed()
        self.start_iteration = 0
        self._wide = [r["width"] > r["height"] for r in records] if aspect_ratio_grouping else None
        self._records = DatasetFromList(list(records), copy=False)
        self._mapper = mapper
        self._sampler = sampler

    def __iter__(self) -> Iterator[list[Record]]:
        sampler = self._sampler
        if sampler is None:
            sampler = TrainingSampler(len(self._records), seed=self.seed)
        plan = BatchPlan(
            sampler,
            wide=self._wide,
            batch_size=self.batch_size,
            start_iteration=self.start_iteration,
        )
        loader: DataLoader[Record] = DataLoader(
            SeededDataset(self._records, self._mapper, self.seed),
            batch_sampler=plan,
            num_workers=self.num_workers,
            collate_fn=_keep_list,
            # It draws a seed for its workers, which must not come from the global generator.
            generator=torch.Generator().manual_seed(self.seed),
        )
        return iter(loader)

    def state_dict(self) -> dict[str, int]:
        """What decides the batches: seed, number of records and total batch size."""
        return {
            "seed": self.seed,
            "num_records": len(self._records),
            "total_batch_size": self.total_batch_size,
        }

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Take over the seed of a checkpoint; warn if the batches cannot be the same any more."""
        self.seed = state["seed"]
        for key, current in self.state_dict().items():
            if state[key] != current:
                logger.warning(
                    "The checkpoint was trained with %s=%d, this run has %d: training goes on, but "
                    "with other batches than an uninterrupted run.",
                    key,
                    state[key],
                    current,
                )


def build_train_loader(
    dataset: Sequence[Record],
    *,
    mapper: Mapper,
    total_batch_size: int,
    seed: int = -1,
    sampler: Sampler[int] | None = None,
    aspect_ratio_grouping: bool = True,
    num_workers: int = 0,
) -> TrainLoader:
    """Like Detectron2's ``build_detection_train_loader``, for resumable training.

    Args:
        dataset: dataset records, e.g. of :func:`efficient_detr.data.datasets.detection_dataset`.
        mapper: turns a record into a model input.
        total_batch_size: images an iteration over all processes.
        seed: seed of the run, >= 0; negative for a random one.
        sampler: Detectron2 training sampler, built with a fixed seed.
        aspect_ratio_grouping: make batches of either wide or high pictures.
        num_workers: data-loading processes a GPU.

    Returns:
        The loader.
    """
    return TrainLoader(
        dataset,
        mapper=mapper,
        total_batch_size=total_batch_size,
        seed=seed,
        sampler=sampler,
        aspect_ratio_grouping=aspect_ratio_grouping,
        num_workers=num_workers,
    )


def _keep_list(batch: list[Record]) -> list[Record]:
    """Images of a batch differ in size; the model pads them."""
    return batch
