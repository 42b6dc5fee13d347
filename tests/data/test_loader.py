"""The training loader: the batches are a function of seed and iteration."""

import itertools
from typing import Any

import numpy as np
import pytest
from detectron2.data.samplers import TrainingSampler
from detectron2.utils import comm

from efficient_detr.data.loader import BatchPlan, TrainLoader, build_train_loader
from efficient_detr.data.seeding import derive_seed
from efficient_detr.errors import UserError

Batches = list[list[dict[str, Any]]]


def records(number: int = 7) -> list[dict[str, Any]]:
    """Every second picture is wide."""
    return [{"id": i, "width": 30 if i % 2 else 20, "height": 25} for i in range(number)]


def with_noise(record: dict[str, Any]) -> dict[str, Any]:
    return {**record, "noise": np.random.rand()}


def fail(record: dict[str, Any]) -> dict[str, Any]:
    raise UserError(f"Image {record['id']} cannot be read (OSError: gone): restore it.")


def load(number: int = 12, *, start: int = 0, **options: Any) -> Batches:
    settings: dict[str, Any] = {"mapper": with_noise, "total_batch_size": 2, "seed": 5, **options}
    loader = build_train_loader(records(), **settings)
    loader.start_iteration = start
    return list(itertools.islice(loader, number))


def test_every_record_comes_once_an_epoch() -> None:
    ids = [x["id"] for batch in load(7, aspect_ratio_grouping=False) for x in batch]
    assert sorted(ids[:7]) == sorted(ids[7:]) == list(range(7))
    assert ids[:7] != ids[7:]


def test_wide_and_high_pictures_do_not_mix() -> None:
    for batch in load(12):
        assert len({x["width"] for x in batch}) == 1


@pytest.mark.parametrize("grouping", [True, False])
@pytest.mark.parametrize("workers", [0, 3])
def test_batches_do_not_depend_on_start_and_workers(grouping: bool, workers: int) -> None:
    options = {"aspect_ratio_grouping": grouping}
    whole = load(12, **options)
    assert load(7, start=5, num_workers=workers, **options) == whole[5:]


def test_the_same_record_gets_new_noise_each_time() -> None:
    drawn = [x["noise"] for batch in load(14) for x in batch]
    assert len(set(drawn)) == len(drawn)


def test_seeds_differ() -> None:
    assert load(4, seed=5) == load(4, seed=5)
    assert load(4, seed=5) != load(4, seed=6)


def test_loading_leaves_the_global_generators_alone() -> None:
    np.random.seed(1)
    expected = np.random.rand(2).tolist()
    np.random.seed(1)
    first = np.random.rand()
    load(3)
    assert [first, np.random.rand()] == expected


def test_ranks_share_the_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two processes of batch 1 see what one process of batch 2 sees, noise included."""
    alone = load(6, aspect_ratio_grouping=False)
    monkeypatch.setattr(comm, "get_world_size", lambda: 2)
    parts = []
    for rank in range(2):
        monkeypatch.setattr(comm, "get_rank", lambda rank=rank: rank)
        parts.append(load(6, aspect_ratio_grouping=False))
    assert [[a[0], b[0]] for a, b in zip(*parts, strict=True)] == alone


def test_plan_by_hand() -> None:
    # Without shuffling the stream is 0 1 2 0 1 2 ...; records 0 and 2 are high, 1 is wide.
    plan = BatchPlan(TrainingSampler(3, shuffle=False), wide=[False, True, False], batch_size=2)
    assert list(itertools.islice(plan, 3)) == [
        [(0, 0), (2, 2)],
        [(1, 1), (4, 1)],
        [(3, 0), (5, 2)],
    ]


def test_a_mapper_may_refuse_a_record() -> None:
    def only_even(record: dict[str, Any]) -> dict[str, Any] | None:
        return record if record["id"] % 2 == 0 else None

    ids = {x["id"] for batch in load(12, mapper=only_even) for x in batch}
    assert ids == {0, 2, 4, 6}


def test_a_mapper_that_refuses_everything_is_a_sentence() -> None:
    with pytest.raises(UserError, match="refused record"):
        load(1, mapper=lambda record: None)


@pytest.mark.parametrize("workers", [0, 1])
def test_an_error_of_a_worker_is_still_one_sentence(workers: int) -> None:
    with pytest.raises(UserError) as caught:
        load(1, mapper=fail, num_workers=workers)
    assert str(caught.value).startswith("Image ")
    assert str(caught.value).endswith("cannot be read (OSError: gone): restore it.")


@pytest.mark.parametrize("size", [0, 3])
def test_a_batch_that_cannot_be_divided(monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    monkeypatch.setattr(comm, "get_world_size", lambda: 2)
    with pytest.raises(UserError, match=f"total_batch_size={size}"):
        load(1, total_batch_size=size)


def test_state_carries_the_seed_and_notices_other_data(caplog: pytest.LogCaptureFixture) -> None:
    first = TrainLoader(records(), mapper=with_noise, total_batch_size=2, seed=5)
    second = TrainLoader(records(), mapper=with_noise, total_batch_size=2, seed=6)
    second.load_state_dict(first.state_dict())
    assert second.seed == 5
    assert "other batches" not in caplog.text
    third = TrainLoader(records(9), mapper=with_noise, total_batch_size=2, seed=6)
    third.load_state_dict(first.state_dict())
    assert "num_records=7, this run has 9" in caplog.text


def test_derived_seeds_are_spread() -> None:
    seeds = {derive_seed(1, stream, n) for stream in (1, 2) for n in range(500)}
    assert len(seeds) == 1000
    assert all(0 <= seed < 2**32 for seed in seeds)
