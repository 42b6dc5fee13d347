"""Batches of indices from one group each."""

from collections.abc import Iterator, Sequence

import numpy as np
from torch.utils.data.sampler import BatchSampler, Sampler


class GroupedBatchSampler(BatchSampler):
    """Collects the indices of another sampler by group and yields each group's full batches."""

    def __init__(self, sampler: Sampler[int], group_ids: Sequence[int], batch_size: int) -> None:
        """``group_ids``: the group of each index. Any other than a torch sampler: ValueError."""
        if not isinstance(sampler, Sampler):
            raise ValueError(f"sampler is a torch.utils.data.Sampler, got {sampler!r}")
        self.sampler, self.batch_size = sampler, batch_size
        self.group_ids = np.asarray(group_ids)
        assert self.group_ids.ndim == 1, "group_ids is a flat list"
        self.buffer_per_group: dict[int, list[int]] = {k: [] for k in set(self.group_ids.tolist())}

    def __iter__(self) -> Iterator[list[int]]:
        for idx in self.sampler:
            batch = self.buffer_per_group[int(self.group_ids[idx])]
            batch.append(idx)
            if len(batch) == self.batch_size:
                yield batch[:]
                batch.clear()

    def __len__(self) -> int:
        raise NotImplementedError("the number of grouped batches depends on the order")
