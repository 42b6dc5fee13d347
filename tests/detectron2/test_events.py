"""The history of scalars and its writers."""

import json
import logging
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from detectron2.utils.events import (
    CommonMetricPrinter,
    EventStorage,
    EventWriter,
    JSONWriter,
    TensorboardXWriter,
    get_event_storage,
    has_event_storage,
)


def _lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_storages_are_stacked() -> None:
    with pytest.raises(AssertionError):
        get_event_storage()
    assert not has_event_storage()
    with EventStorage(3) as outer:
        assert (get_event_storage(), outer.iter) == (outer, 3)
        with EventStorage() as inner:
            assert get_event_storage() is inner
        assert get_event_storage() is outer
        assert has_event_storage()
    with pytest.raises(AssertionError):
        get_event_storage()


def test_scalars_and_scopes() -> None:
    with EventStorage(5) as storage:
        storage.put_scalars(loss=torch.tensor(2.0))
        with storage.name_scope("head"):
            storage.put_scalar("loss", 3, smoothing_hint=False)
        storage.step()
        storage.put_scalar("loss", 1)
    assert storage.latest() == {"loss": (1.0, 6), "head/loss": (3.0, 5)}
    assert storage.history("loss").values() == [(2.0, 5), (1.0, 6)]
    with pytest.raises(KeyError):
        storage.history("nothing")


def test_hints_may_not_change() -> None:
    with EventStorage() as storage:
        storage.put_scalar("a", 1, smoothing_hint=False)
        with pytest.raises(AssertionError, match="a"):
            storage.put_scalar("a", 1)


def test_windows_count_iterations_not_samples() -> None:
    with EventStorage() as storage:
        for storage.iter in range(10):
            storage.put_scalar("always", storage.iter)
            if storage.iter % 3 == 0:
                storage.put_scalar("third", storage.iter)
    assert storage.count_samples("always", 4) == 4
    # Up to its last sample at 9, the window of 4 holds 6, excluded, to 9: two samples.
    assert storage.count_samples("third", 4) == 2
    smoothed = storage.latest_with_smoothing_hint(4)
    assert smoothed == {"always": (7.5, 9), "third": (7.5, 9)}


def test_json_lines_hold_what_is_new(tmp_path: Path) -> None:
    file = tmp_path / "metrics.json"
    with EventStorage() as storage:
        writer = JSONWriter(str(file), window_size=2)
        for storage.iter in range(4):
            storage.put_scalar("loss", storage.iter)
            if storage.iter == 2:
                storage.put_scalar("AP", 0.5, smoothing_hint=False)
            if storage.iter % 2 == 1:
                writer.write()
        writer.write()
        writer.close()
    assert _lines(file) == [
        {"iteration": 1, "loss": 0.5},
        {"iteration": 3, "loss": 2.5},
        {"iteration": 2, "AP": 0.5},
    ]
    assert file.read_text().splitlines()[0] == '{"iteration": 1, "loss": 0.5}'


def test_json_files_are_continued(tmp_path: Path) -> None:
    file = tmp_path / "metrics.json"
    for start in (0, 7):
        with EventStorage(start) as storage:
            storage.put_scalar("a", 1)
            writer = JSONWriter(str(file))
            writer.write()
            writer.close()
    assert [line["iteration"] for line in _lines(file)] == [0, 7]


def _printed(caplog: pytest.LogCaptureFixture, max_iter: int | None) -> str:
    logging.getLogger("detectron2").propagate = True
    with (
        caplog.at_level(logging.INFO, logger="detectron2.utils.events"),
        EventStorage(9) as storage,
    ):
        storage.put_scalars(total_loss=2.0, loss_class=1.25, time=60.0, data_time=0.5, AP=3.0)
        storage.put_scalar("lr", 0.001, smoothing_hint=False)
        storage.put_scalar("[metric]scale", 8.0)
        CommonMetricPrinter(max_iter).write()
    return re.sub(r"max_mem.*", "", caplog.text.split(" eta")[-1].split("  iter")[-1])


def test_printed_line(caplog: pytest.LogCaptureFixture) -> None:
    text = _printed(caplog, max_iter=20)
    assert "eta: 0:10:00  iter: 9  total_loss: 2  loss_class: 1.25  [metric]scale: 8" in caplog.text
    assert "time: 60.0000  last_time: 60.0000  data_time: 0.5000  last_data_time: 0.5000" in text
    assert "lr: 0.001" in text
    assert "AP" not in text


def test_nothing_is_printed_of_the_end(caplog: pytest.LogCaptureFixture) -> None:
    _printed(caplog, max_iter=None)
    assert "eta" not in caplog.text
    assert "iter: 9" in caplog.text
    caplog.clear()
    _printed(caplog, max_iter=9)
    assert not caplog.text


def test_tensorboard_files(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with EventStorage(4) as storage:
        writer = TensorboardXWriter(str(tmp_path))
        assert not list(tmp_path.iterdir()), "no file before there is anything to write"
        storage.put_scalar("loss", 2.0)
        storage.put_image("picture", torch.zeros(3, 4, 5, dtype=torch.uint8))
        writer.write()
        writer.write()  # the image does not come again
        writer.close()
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [(4, 2.0)]
    (image,) = events.Images("picture")
    assert (image.step, image.width, image.height) == (4, 5, 4)


def test_writers_are_a_class_to_derive_from() -> None:
    with pytest.raises(NotImplementedError):
        EventWriter().write()
    EventWriter().close()
