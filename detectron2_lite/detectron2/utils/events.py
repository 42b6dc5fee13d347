"""Scalars of a training run, and the writers that pass them on."""

import datetime
import json
import logging
import os
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from detectron2.utils.file_io import PathManager
from fvcore.common.history_buffer import HistoryBuffer

_storages: list["EventStorage"] = []


def get_event_storage() -> "EventStorage":
    """The innermost storage in use; AssertionError if there is none."""
    assert _storages, "get_event_storage() needs a 'with EventStorage(...)' around it."
    return _storages[-1]


def has_event_storage() -> bool:
    """Whether :func:`get_event_storage` would find one."""
    return bool(_storages)


class EventStorage:
    """The history of every scalar by iteration; a context manager."""

    def __init__(self, start_iter: int = 0) -> None:
        self.iter = start_iter
        self._history: dict[str, HistoryBuffer] = {}
        self._smoothing_hints: dict[str, bool] = {}
        self._latest: dict[str, tuple[float, int]] = {}
        self._prefix = ""
        self._images: list[tuple[str, Any, int]] = []

    def __enter__(self) -> "EventStorage":
        _storages.append(self)
        return self

    def __exit__(self, *exception: object) -> None:
        assert _storages.pop() is self, "EventStorages have to be left in order."

    def step(self) -> None:
        """Goes to the next iteration."""
        self.iter += 1

    def put_scalar(self, name: str, value: Any, smoothing_hint: bool = True) -> None:
        """Adds a number; the hint says that it is noisy, and has to stay the same."""
        name = self._prefix + name
        known = self._smoothing_hints.setdefault(name, smoothing_hint)
        assert known == smoothing_hint, f"Scalar {name} had another smoothing_hint before."
        self._history.setdefault(name, HistoryBuffer()).update(float(value), self.iter)
        self._latest[name] = (float(value), self.iter)

    def put_scalars(self, *, smoothing_hint: bool = True, **kwargs: Any) -> None:
        """:meth:`put_scalar` for each keyword argument."""
        for name, value in kwargs.items():
            self.put_scalar(name, value, smoothing_hint)

    def put_image(self, img_name: str, img_tensor: Any) -> None:
        """Keeps an RGB image (3, H, W), uint8 or float in [0, 1], for TensorBoard."""
        self._images.append((img_name, img_tensor, self.iter))

    def history(self, name: str) -> HistoryBuffer:
        """All values of a scalar; KeyError if there are none."""
        return self._history[name]

    def histories(self) -> dict[str, HistoryBuffer]:
        return self._history

    def latest(self) -> dict[str, tuple[float, int]]:
        """Latest value of each scalar and its iteration."""
        return self._latest

    def latest_with_smoothing_hint(self, window_size: int = 20) -> dict[str, tuple[float, int]]:
        """:meth:`latest`, but medians over the last ``window_size`` iterations if noisy."""
        smoothed = {}
        for name, (value, iteration) in self._latest.items():
            if self._smoothing_hints[name]:
                value = self._history[name].median(self.count_samples(name, window_size))
            smoothed[name] = (value, iteration)
        return smoothed

    def count_samples(self, name: str, window_size: int = 20) -> int:
        """Number of values that a scalar got within its last ``window_size`` iterations."""
        values = self._history[name].values()
        return sum(iteration > values[-1][1] - window_size for _, iteration in values)

    @contextmanager
    def name_scope(self, name: str) -> Iterator[None]:
        """Prefixes the names of all scalars put inside with ``name/``."""
        outer, self._prefix = self._prefix, name.rstrip("/") + "/"
        yield
        self._prefix = outer


class EventWriter:
    """Reads the current :class:`EventStorage` at each :meth:`write` and passes news on."""

    _last_write = -1

    def write(self) -> None:
        raise NotImplementedError

    def close(self) -> None: ...

    def _new_scalars(self, window_size: int) -> list[tuple[str, float, int]]:
        """(name, value, iteration) of what came after the last call."""
        latest = get_event_storage().latest_with_smoothing_hint(window_size)
        new = [(name, value, i) for name, (value, i) in latest.items() if i > self._last_write]
        self._last_write = max([i for _, _, i in new], default=self._last_write)
        return new


class JSONWriter(EventWriter):
    """Appends to a file one line of JSON for each iteration with new scalars."""

    def __init__(self, json_file: str, window_size: int = 20) -> None:
        self._file_handle = PathManager.open(json_file, "a")
        self._window_size = window_size

    def write(self) -> None:
        lines: defaultdict[int, dict[str, float]] = defaultdict(dict)
        for name, value, iteration in self._new_scalars(self._window_size):
            lines[iteration].update({name: value, "iteration": iteration})
        for scalars in lines.values():
            self._file_handle.write(json.dumps(scalars, sort_keys=True) + "\n")
        self._file_handle.flush()
        os.fsync(self._file_handle.fileno())

    def close(self) -> None:
        self._file_handle.close()


class TensorboardXWriter(EventWriter):
    """Writes scalars and images to TensorBoard files."""

    def __init__(self, log_dir: str, window_size: int = 20) -> None:
        self._log_dir, self._window_size = log_dir, window_size
        self._writer: Any = None  # until there is something to write

    def write(self) -> None:
        from torch.utils.tensorboard import SummaryWriter  # a slow import

        self._writer = self._writer or SummaryWriter(self._log_dir)
        for name, value, iteration in self._new_scalars(self._window_size):
            self._writer.add_scalar(name, value, iteration)
        images = get_event_storage()._images
        while images:
            self._writer.add_image(*images.pop(0))

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()


class CommonMetricPrinter(EventWriter):
    """Logs time left (with ``max_iter``), losses, ``[metric]`` scalars, times, rate, memory."""

    def __init__(self, max_iter: int | None = None, window_size: int = 20) -> None:
        self.logger = logging.getLogger(__name__)
        self._max_iter, self._window_size = max_iter, window_size

    def _medians(self, storage: EventStorage, part_of_name: str) -> str:
        return "  ".join(
            f"{name}: {history.median(storage.count_samples(name, self._window_size)):.4g}"
            for name, history in storage.histories().items()
            if part_of_name in name
        )

    def write(self) -> None:
        storage = get_event_storage()
        if storage.iter == self._max_iter:
            return  # the training is over: there is no progress to report
        histories, eta, times, rate, memory = storage.histories(), "", "", "N/A", ""
        if history := histories.get("time"):
            if self._max_iter is not None:
                seconds = history.median(1000) * (self._max_iter - storage.iter - 1)
                storage.put_scalar("eta_seconds", seconds, smoothing_hint=False)
                eta = f"eta: {datetime.timedelta(seconds=int(seconds))}  "
            times += f"time: {history.global_avg():.4f}  last_time: {history.latest():.4f}  "
        if history := histories.get("data_time"):
            mean = history.avg(storage.count_samples("data_time", self._window_size))
            times += f"data_time: {mean:.4f}  last_data_time: {history.latest():.4f}  "
        if history := histories.get("lr"):
            rate = f"{history.latest():.5g}"
        if torch.cuda.is_available():
            memory = f"max_mem: {torch.cuda.max_memory_allocated() / 2**20:.0f}M"
        losses, metrics = self._medians(storage, "loss"), self._medians(storage, "[metric]")
        values = f"{losses}  {metrics}  {times} lr: {rate}  {memory}"
        self.logger.info(f" {eta}iter: {storage.iter}  {values}")
