"""Tables of keys, read and written."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch
from torch import Tensor

from efficient_detr.checkpoint.conversion import (
    Copy,
    Drop,
    Packed,
    Rename,
    Row,
    Spread,
    below,
    convert_keys,
    matches_template,
    read_keys,
    write_keys,
)


def state_of(*keys: str, shape: tuple[int, ...] = (2, 3)) -> dict[str, Tensor]:
    """Random weights, all different."""
    return {key: torch.rand(shape) for key in keys}


def same(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(
        torch.equal(first[key], second[key]) for key in first
    )


# Templates ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("template", "key", "expected"),
    [
        ("a.{layer}.b", "a.12.b", True),
        ("a.{layer}.b", "a.x.b", False),
        ("a.{layer}.b", "a.1.b.c", False),
        ("a.{layer}.b", "outer.a.1.b", False),
        ("a.{layer}.*", "a.1.b.c", True),
        ("a.{layer}.*", "a.1.", False),  # nothing is no rest
        ("a.{layer}.b{part}.*", "a.1.b2.c", True),
        ("a.{layer}.b.{layer}", "a.3.b.3", True),
        ("a.{layer}.b.{layer}", "a.3.b.4", False),
        ("a.b", "axb", False),  # dots are dots
    ],
)
def test_templates(template: str, key: str, expected: bool) -> None:
    assert matches_template(template, key) is expected


# Renaming ----------------------------------------------------------------------------------------

BLOCKS: list[Row] = [
    Rename("stage{stage}.{block}.norm.*", "stages.{stage}.blocks.{block}.norm.*"),
    Rename("stage{stage}.{block}.weight", "stages.{stage}.blocks.{block}.matrix"),
]


def test_numbers_and_the_rest_of_a_key_are_kept() -> None:
    state = state_of("stage3.11.norm.bias", "stage0.2.weight")
    converted = convert_keys(state, BLOCKS)
    assert converted["stages.3.blocks.11.norm.bias"] is state["stage3.11.norm.bias"]
    assert converted["stages.0.blocks.2.matrix"] is state["stage0.2.weight"]
    assert same(write_keys(converted, BLOCKS), state)


@pytest.mark.parametrize("key", ["stage1.2.bias", "model.stage1.2.weight", "epoch", ""])
def test_unknown_keys_are_named(key: str) -> None:
    state = state_of("stage1.2.weight", key)
    assert read_keys(state, BLOCKS).unknown == [key]
    with pytest.raises(KeyError, match=f"no rule for checkpoint key {key}: is this the right"):
        convert_keys(state, BLOCKS)


def test_a_name_without_a_place_is_named() -> None:
    with pytest.raises(KeyError, match=r"the layout has no place for stages\.0\.bias"):
        write_keys(state_of("stages.0.bias"), BLOCKS)


def test_the_first_row_that_matches_decides() -> None:
    rows: list[Row] = [Rename("a.b.*", "first.*"), Rename("a.*", "second.*"), Drop("*", "rest")]
    found = read_keys(state_of("a.b.x", "a.c.x", "c.x"), rows)
    assert found.sources == {"first.x": ("a.b.x",), "second.c.x": ("a.c.x",)}
    assert found.dropped == {"c.x": "rest"}


def test_names_of_the_model_decide_between_rows() -> None:
    """One key can stand for different parts; without a model the first row has it."""
    rows: list[Row] = [Drop("table", "computed"), Rename("table", "relative"), Rename("*", "own.*")]
    for known, name in (
        ((), None),
        (("relative",), "relative"),
        (("own.table",), "own.table"),
        (("own.table", "relative"), "relative"),
    ):
        found = read_keys(state_of("table"), rows, known)
        assert list(found.state) == ([name] if name else [])
        assert found.dropped == ({} if name else {"table": "computed"})


def test_two_keys_of_one_name() -> None:
    rows: list[Row] = [Rename("a.*", "c.*"), Rename("b.*", "c.*")]
    with pytest.raises(KeyError, match=r"checkpoint key b\.x and another both become c\.x"):
        convert_keys(state_of("a.x", "b.x"), rows)


def test_pointwise_convolutions_are_linear_layers() -> None:
    rows: list[Row] = [Rename("conv.*", "linear.*", pointwise=True)]
    state = state_of("conv.weight", shape=(4, 3, 1, 1)) | state_of("conv.bias", shape=(4,))
    converted = convert_keys(state, rows)
    assert torch.equal(converted["linear.weight"], state["conv.weight"].flatten(1))
    assert converted["linear.bias"] is state["conv.bias"]
    assert same(write_keys(converted, rows), state)


# Packing -----------------------------------------------------------------------------------------

ATTENTION: list[Row] = [
    Packed(tuple(f"{{layer}}.{name}.weight" for name in "qkv"), "layers.{layer}.packed"),
    Rename("{layer}.out.*", "layers.{layer}.output.*"),
]


def test_parts_are_stacked_in_the_order_of_the_row() -> None:
    state = state_of("5.v.weight", "5.q.weight", "0.k.weight", "5.k.weight", "5.out.weight")
    state |= state_of("0.q.weight", "0.v.weight")
    found = read_keys(state, ATTENTION)
    expected = torch.cat([state[f"5.{name}.weight"] for name in "qkv"])
    assert torch.equal(found.state["layers.5.packed"], expected)
    assert found.sources["layers.0.packed"] == ("0.q.weight", "0.k.weight", "0.v.weight")
    assert same(write_keys(found.state, ATTENTION), state)


def test_missing_parts_are_named() -> None:
    state = state_of("1.q.weight", "1.v.weight")
    found = read_keys(state, ATTENTION)
    assert found.incomplete == {"layers.1.packed": ["1.k.weight"]} and found.state == {}
    with pytest.raises(KeyError, match=r"has no 1\.k\.weight, a part of layers\.1\.packed"):
        convert_keys(state, ATTENTION)


def test_a_part_beside_the_whole() -> None:
    rows: list[Row] = [*ATTENTION, Rename("{layer}.packed", "layers.{layer}.packed")]
    with pytest.raises(KeyError, match=r"1\.q\.weight and another both become layers\.1\.packed"):
        convert_keys(state_of("1.packed", *(f"1.{name}.weight" for name in "qkv")), rows)


# Copies and constants ----------------------------------------------------------------------------

HEADS: list[Row] = [
    Rename("heads.0.*", "head.*"),
    Copy("heads.1.*", "head.*"),
    Copy("decoder.heads.{number}.*", "head.*"),
]


def test_copies_are_not_read_but_compared() -> None:
    weight = torch.rand(2, 2)
    state = {f"heads.{number}.weight": weight.clone() for number in (0, 1)}
    found = read_keys(state, HEADS)
    assert found.state["head.weight"] is state["heads.0.weight"] and found.different == []
    assert found.dropped == {"heads.1.weight": "copies of other weights"}
    state["heads.1.weight"] += 1e-6
    assert read_keys(state, HEADS).different == ["heads.1.weight"]


def test_a_copy_is_read_where_the_weight_is_missing() -> None:
    rows: list[Row] = [Rename("a", "ours"), Copy("b", "ours"), Copy("c", "ours")]
    state = state_of("b")
    for further, different in ((state["b"].clone(), []), (state["b"] + 1, ["c"])):
        read = read_keys(state | {"c": further}, rows)
        assert read.state["ours"] is state["b"] and read.sources == {"ours": ("b",)}
        assert list(read.dropped) == ["c"] and read.different == different


def test_one_weight_can_be_several_of_ours() -> None:
    rows = below([Spread("head.*", ("heads.0.*", "heads.1.*"))], "in.", "our.")
    state = state_of("in.head.bias")
    read = read_keys(state, rows, known=["our.heads.0.bias"])
    assert read.state.keys() == {"our.heads.0.bias", "our.heads.1.bias"}
    assert all(tensor is state["in.head.bias"] for tensor in read.state.values())
    assert set(read.sources.values()) == {("in.head.bias",)} and not read.unknown
    # Written it is only by rows for each.
    with pytest.raises(KeyError, match=r"no place for our.heads.0.bias"):
        write_keys(read.state, rows)


def test_without_values_only_shapes_of_copies_are_compared() -> None:
    state = {key: torch.empty(2, 2, device="meta") for key in ("heads.0.weight", "heads.1.weight")}
    assert read_keys(state, HEADS).different == []
    state["heads.1.weight"] = torch.empty(3, 2, device="meta")
    assert read_keys(state, HEADS).different == ["heads.1.weight"]


def test_copies_are_written() -> None:
    head = state_of("head.weight", "head.bias")
    written = write_keys(head, HEADS[:2])
    assert written == {
        f"heads.{number}.{kind}": head[f"head.{kind}"]
        for number in (0, 1)
        for kind in ("weight", "bias")
    }


def test_constants_are_dropped_and_written_again() -> None:
    def ones(shapes: Mapping[str, tuple[int, ...]]) -> Tensor:
        return torch.ones(shapes["classes.bias"])

    rows: list[Row] = [
        Rename("classes.*", "head.*"),
        Drop("loss.weight", "a constant", ones),
        Drop("counter", "counts"),
    ]
    state = state_of("classes.bias", shape=(7,)) | {"loss.weight": torch.ones(7)}
    found = read_keys(state | {"counter": torch.tensor(3)}, rows)
    assert found.dropped == {"loss.weight": "a constant", "counter": "counts"}
    assert same(write_keys(found.state, rows), state)


# Modules inside others ---------------------------------------------------------------------------


def test_rows_below_a_module() -> None:
    inner: list[Row] = [
        Packed(("q.*", "k.*"), "projection.*"),
        Rename("out{part}.*", "output.{part}.*"),
        Copy("again.*", "output.0.*"),
        Drop("index", "computed"),
    ]
    rows = below(inner, "stages.{stage}.attention.", "blocks.{stage}.")
    names = ("q.bias", "k.bias", "out0.bias", "index")
    state = state_of(*(f"stages.2.attention.{name}" for name in names))
    found = read_keys(state, rows)
    assert set(found.state) == {"blocks.2.projection.bias", "blocks.2.output.0.bias"}
    assert found.dropped == {"stages.2.attention.index": "computed"}
    written = write_keys(found.state, rows)
    assert set(written) == set(state) - set(found.dropped) | {"stages.2.attention.again.bias"}


@pytest.mark.parametrize("shared", [True, False])
def test_values_tell_a_shared_head_from_heads_of_layers(shared: bool) -> None:
    """Their keys are the same, but a model with a head a layer must not take a shared one."""
    rows = [Rename("head.0.*", "heads.0.*"), Copy("head.1.*", "heads.0.*")]
    rows += [Rename("head.0.*", "heads.0.*"), Rename("head.1.*", "heads.1.*")]
    first = torch.arange(3.0)
    state = {"head.0.bias": first, "head.1.bias": first.clone() if shared else first + 1}
    read = read_keys(state, rows, known={"heads.0.bias", "heads.1.bias"})
    if shared:
        assert list(read.state) == ["heads.0.bias"]
        assert read.dropped == {"head.1.bias": "copies of other weights"}
    else:
        assert torch.equal(read.state["heads.1.bias"], first + 1)
    assert not read.different
