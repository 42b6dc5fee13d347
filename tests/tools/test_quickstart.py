import importlib.util
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "tools" / "quickstart.py"

RESULTS = {
    "bbox": {"AP": 75.0, "AP50": 96.0, "APl": None},
    "flops": {
        "GFLOPs": 0.2,
        "parameters": 1234567.0,
        "GFLOPs-backbone": 0.15,
        "GFLOPs-denoising": 0.0,
        "GFLOPs-decoder": 0.05,
        "tokens-total": 244.7,
    },
}


@pytest.fixture(scope="module")
def quickstart():
    """The script as a module; by its path, because other projects install a package `tools`."""
    spec = importlib.util.spec_from_file_location("quickstart_script", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class TestSummarize:
    def test_average_precisions_become_shares(self, quickstart):
        assert quickstart.summarize(RESULTS, 300.04) == {
            "AP": pytest.approx(0.75),
            "AP50": pytest.approx(0.96),
            "gflops": 0.2,
            "parameters": 1234567,
            "train_seconds": 300.0,
        }

    def test_what_was_not_measured_is_none(self, quickstart):
        summary = quickstart.summarize({"flops": {"parameters": 7.0}}, 1.0)
        assert summary["AP"] is summary["AP50"] is summary["gflops"] is None
        assert summary["parameters"] == 7


class TestDescribe:
    def rows(self, quickstart, summary):
        lines = quickstart.describe(summary).splitlines()
        return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line]

    def test_the_tables_hold_accuracy_cost_and_stages(self, quickstart):
        rows = self.rows(quickstart, {**quickstart.summarize(RESULTS, 301.0), **RESULTS})
        assert rows[0] == ["AP", "AP50", "GFLOPs", "parameters", "training (s)"]
        assert rows[2] == ["0.750", "0.960", "0.200", "1,234,567", "301"]
        assert rows[3] == ["stage", "GFLOPs", "share"]
        # 0.15 and 0.05 of 0.2; a stage that costs nothing is left out.
        assert rows[5:] == [["backbone", "0.1500", "75.0%"], ["decoder", "0.0500", "25.0%"]]

    def test_a_dash_stands_for_what_was_not_measured(self, quickstart):
        rows = self.rows(quickstart, quickstart.summarize({}, 12.0))
        assert rows[2] == ["-", "-", "-", "-", "12"]
        assert len(rows) == 3


class TestCommand:
    def test_a_mistyped_override_is_an_error_before_anything_happens(
        self, quickstart, capsys, tmp_path
    ):
        status = quickstart.main(["train.max_itr=5", f"train.output_dir={tmp_path / 'out'}"])
        assert status == 2
        assert "train.max_itr" in capsys.readouterr().err
        assert list(tmp_path.iterdir()) == []
