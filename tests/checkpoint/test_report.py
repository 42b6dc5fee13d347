"""The table that says what became of every weight."""

from __future__ import annotations

from efficient_detr.checkpoint.report import ConversionReport


def full_report() -> ConversionReport:
    report = ConversionReport("DETR", "")
    report.matched = ["a"]
    report.renamed = {"b": "their_b", "c": "their_c"}
    report.packed = {"d": ("q", "k", "v")}
    report.reshaped = {"e": ((2, 2, 1, 1), (2, 2))}
    report.resized = {"f": ((9, 2), (25, 2))}
    report.class_rows = {"g": "from 91 to 80 rows", "h": "from 91 to 80 rows"}
    report.dropped = {"x": "copies of other weights", "y": "copies of other weights", "z": "odd"}
    report.unexpected = {"u": "no place in the model"}
    report.initial = ["i"]
    return report


def rows_of(table: str) -> dict[str, list[str]]:
    lines = [line for line in table.splitlines()[2:] if line]
    return {line.split("  ")[0].strip(): line.split("  ", 1)[1].split() for line in lines}


def test_counts_add_up() -> None:
    report = full_report()
    assert report.filled == 8
    assert report.read == 1 + 2 + 3 + 1 + 1 + 2 + 3 + 1
    assert rows_of(report.table())["all"] == ["14", "9"]


def test_every_fate_has_a_line_with_counts_and_reasons() -> None:
    rows = rows_of(full_report().table())
    assert rows["taken as they are"] == ["1", "1"]
    assert rows["renamed"] == ["2", "2", "their_b", "->", "b"]
    assert rows["joined"] == ["3", "1", "q", "+", "k", "+", "v", "->", "d"]
    assert rows["reshaped"][:2] == ["1", "1"]
    assert " ".join(rows["resized"]) == "1 1 9x2 to 25x2 (1 weight)"
    assert " ".join(rows["rows of classes taken"]) == "2 2 from 91 to 80 rows (2 weights)"
    assert " ".join(rows["left out"]) == "3 copies of other weights (2 weights); odd (1 weight)"
    assert " ".join(rows["without a place"]) == "1 u (no place in the model)"
    assert " ".join(rows["left at their initial values"]) == "1 i"


def test_what_did_not_happen_has_no_line() -> None:
    report = ConversionReport("DETR", "", matched=["a"])
    assert list(rows_of(report.table())) == ["taken as they are", "all"]


def test_many_reasons_are_cut_short() -> None:
    report = ConversionReport("DETR", "", dropped={str(i): f"reason {i % 9}" for i in range(12)})
    assert report.table().replace("\n", " ").split("; ")[-1].split()[:4] == [
        "3",
        "others",
        "(3",
        "weights)",
    ]


def test_lines_are_not_longer_than_a_terminal() -> None:
    name = "transformer.encoder.layers.0.self_attn.in_proj_weight"
    report = ConversionReport("DETR", "")
    report.packed = {name: (name, name, name)}
    report.initial = [name] * 9
    report.unexpected = {name: "300 queries instead of 100"}
    table = report.table()
    assert max(map(len, table.splitlines())) <= 120
    assert table.count(name) == 4 + 3 + 1


def test_parts_outside_the_backbone_are_named_once() -> None:
    report = ConversionReport("Swin", "detector.backbone")
    report.leave_out_parts(["model.neck.a", "model.neck.b", "model.head.c"], "model.backbone.")
    assert report.parts == ["neck", "head"]
    assert set(report.dropped.values()) == {
        "of neck, outside the backbone",
        "of head, outside the backbone",
    }
