import pytest

from efficient_detr.files import replaced_file


def test_a_complete_file_takes_its_place(tmp_path):
    path = tmp_path / "results.json"
    path.write_text("old")
    with replaced_file(path) as partial:
        partial.write_text("new")
        assert path.read_text() == "old"
        assert partial.parent == tmp_path
        assert partial.suffix == ".json"
    assert path.read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]


def test_an_error_leaves_what_was_there_and_nothing_else(tmp_path):
    path = tmp_path / "results.json"
    path.write_text("old")

    def fail_half_way():
        with replaced_file(path) as partial:
            partial.write_text("half")
            raise RuntimeError("disk full")

    with pytest.raises(RuntimeError, match="disk full"):
        fail_half_way()
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_nothing_written_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError), replaced_file(tmp_path / "never.txt"):
        pass
