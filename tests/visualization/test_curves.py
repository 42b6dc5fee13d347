import json

import numpy as np
import pytest

from efficient_detr.errors import UserError
from efficient_detr.visualization.curves import curves_figure, read_metrics, save_curves


def write(path, *lines):
    texts = [line if isinstance(line, str) else json.dumps(line) + "\n" for line in lines]
    path.write_text("".join(texts))
    return path


class TestReadMetrics:
    def test_scalars_become_series(self, tmp_path):
        path = write(
            tmp_path / "metrics.json",
            {"iteration": 19, "total_loss": 3.0, "lr": 0.1},
            {"iteration": 39, "total_loss": 2.0, "lr": 0.1, "bbox/AP": 12.5},
        )
        metrics = read_metrics(path)
        assert metrics["total_loss"] == [(19, 3.0), (39, 2.0)]
        assert metrics["bbox/AP"] == [(39, 12.5)]
        assert "iteration" not in metrics

    def test_nan_is_left_out(self, tmp_path):
        path = write(tmp_path / "m.json", '{"iteration": 1, "bbox/APl": NaN, "bbox/AP": 2.0}\n')
        assert read_metrics(path) == {"bbox/AP": [(1, 2.0)]}

    def test_the_last_record_of_an_iteration_counts(self, tmp_path):
        path = write(
            tmp_path / "m.json",
            {"iteration": 20, "total_loss": 9.0},
            {"iteration": 40, "total_loss": 8.0},
            {"iteration": 20, "total_loss": 5.0},
        )
        assert read_metrics(path)["total_loss"] == [(20, 5.0), (40, 8.0)]

    def test_a_line_that_is_being_written_is_ignored(self, tmp_path):
        path = write(tmp_path / "m.json", {"iteration": 20, "total_loss": 9.0}, '{"iteration": 4')
        assert read_metrics(path)["total_loss"] == [(20, 9.0)]

    @pytest.mark.parametrize("line", ['{"iteration"\n', "[1]\n", '{"total_loss": 1.0}\n'])
    def test_a_broken_line_is_named(self, tmp_path, line):
        path = write(tmp_path / "m.json", line, {"iteration": 20, "total_loss": 9.0})
        with pytest.raises(UserError, match=r"Line 1 of .*m\.json"):
            read_metrics(path)

    def test_a_missing_file_is_named(self, tmp_path):
        with pytest.raises(UserError, match=r"absent\.json"):
            read_metrics(tmp_path / "absent.json")


class TestCurves:
    METRICS = {
        "total_loss": [(0, 5.0), (20, 4.0), (40, 3.5)],
        "bbox/AP": [(40, 30.0)],
        "bbox/AP50": [(40, 60.0)],
    }

    def test_each_panel_draws_its_scalars(self):
        loss, precision, rate = curves_figure(self.METRICS).axes
        (line,) = loss.lines
        np.testing.assert_array_equal(line.get_xydata(), self.METRICS["total_loss"])
        assert [line.get_label() for line in precision.lines] == ["AP (30)", "AP50 (60)"]
        assert precision.get_ylim() == (0, 100)
        assert len(rate.lines) == 0
        assert [text.get_text() for text in rate.texts] == ["no values"]

    def test_the_file_is_a_picture(self, tmp_path):
        source = write(tmp_path / "metrics.json", {"iteration": 1, "total_loss": 2.0, "lr": 0.1})
        path = save_curves(source, tmp_path / "curves.png")
        assert path.read_bytes().startswith(b"\x89PNG")
