"""The command that converts checkpoints: files, formats, rows of classes, and how it refuses."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from efficient_detr.checkpoint.classes import coco_class_names
from efficient_detr.checkpoint.convert import export_checkpoint
from tests.checkpoint.tiny_detectors import random_weights, tiny_detector

ROOT = Path(__file__).parents[2]
SPEC = importlib.util.spec_from_file_location(
    "convert_checkpoint", ROOT / "tools" / "convert_checkpoint.py"
)
assert SPEC is not None and SPEC.loader is not None
command = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(command)

CONFIG = """
from tests.checkpoint.tiny_detectors import tiny_node

model = tiny_node("{family}", num_classes={num_classes})
"""
BIAS = "detector.decoder.heads.0.class_layer.bias"


@pytest.fixture(scope="module")
def weights() -> dict[str, Tensor]:
    return random_weights(tiny_detector("detr", num_classes=91))


@pytest.fixture(scope="module")
def published(weights: dict[str, Tensor], tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("published") / "detr.pth"
    torch.save({"model": export_checkpoint(weights, "detr"), "epoch": 1}, path)
    return str(path)


def write_config(folder: Path, family: str = "detr", num_classes: int = 80) -> str:
    path = folder / f"{family}.py"
    path.write_text(CONFIG.format(family=family, num_classes=num_classes))
    return str(path)


def read(path: str | Path) -> dict[str, Tensor]:
    stored: dict[str, Tensor] = torch.load(path, weights_only=True)["model"]
    return stored


def error(capsys: pytest.CaptureFixture[str], *args: str) -> str:
    assert command.main(list(args)) == 2
    text = capsys.readouterr().err
    assert text.startswith("Error: ") and text.count("\n") == 1
    return text


def test_a_published_file_gets_our_names_and_80_classes(
    published: str, weights: dict[str, Tensor], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "ours.pth"
    assert command.main([published, str(out)]) == 0
    stored = torch.load(out, weights_only=True)
    assert stored["model"].keys() == weights.keys()
    assert len(stored["model"][BIAS]) == 81
    assert stored["class_names"] == list(coco_class_names())
    printed = capsys.readouterr().out
    assert (
        "from 92 to 81 rows (2 weights)" in printed and "DETR of facebookresearch/detr" in printed
    )
    assert [path.name for path in tmp_path.iterdir()] == ["ours.pth"]


def test_a_config_decides_and_leaves_nothing_open(
    published: str, weights: dict[str, Tensor], tmp_path: Path
) -> None:
    out, config = str(tmp_path / "ours.pth"), write_config(tmp_path)
    assert command.main([published, out, "--config-file", config]) == 0
    assert len(read(out)[BIAS]) == 81
    args = ["--config-file", config, "--opts", "model.num_classes=91"]
    assert command.main([published, out, *args]) == 0
    assert torch.equal(read(out)[BIAS], weights[BIAS])


def test_class_rows_are_kept_on_request(
    published: str, weights: dict[str, Tensor], tmp_path: Path
) -> None:
    out = str(tmp_path / "ours.pth")
    assert command.main([published, out, "--class-rows", "91"]) == 0
    assert torch.equal(read(out)[BIAS], weights[BIAS])


def test_there_and_back(published: str, tmp_path: Path) -> None:
    ours, back = str(tmp_path / "ours.pth"), str(tmp_path / "back.pth")
    assert command.main([published, ours, "--class-rows", "91"]) == 0
    assert command.main([ours, back, "--to", "detr"]) == 0
    first, second = read(published), read(back)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_80_classes_go_back_to_91_category_numbers(published: str, tmp_path: Path) -> None:
    ours, back = str(tmp_path / "ours.pth"), str(tmp_path / "back.pth")
    assert command.main([published, ours]) == 0
    assert command.main([ours, back, "--to", "detr", "--class-rows", "91"]) == 0
    first, second = read(published)["class_embed.bias"], read(back)["class_embed.bias"]
    assert torch.equal(first[[1, 90, 91]], second[[1, 90, 91]])
    assert second[[0, 12]].eq(-20).all()


def test_from_one_layout_to_another_as_safetensors(published: str, tmp_path: Path) -> None:
    out = tmp_path / "model.safetensors"
    assert command.main([published, str(out), "--to", "huggingface_detr"]) == 0
    written = load_file(out)
    assert len(written["class_labels_classifier.bias"]) == 92
    assert "model.encoder.layers.0.self_attn.q_proj.weight" in written


def test_a_part_is_written_on_request(published: str, tmp_path: Path) -> None:
    out, config = str(tmp_path / "ours.pth"), write_config(tmp_path, "dino")
    args = [published, out, "--config-file", config, "--allow-partial"]
    assert command.main(args) == 0
    stored = read(out)
    assert "detector.backbone.stem.conv1.weight" in stored
    assert all(tensor.device.type == "cpu" for tensor in stored.values())


def test_a_backbone_gets_its_place_in_detectors(published: str, tmp_path: Path) -> None:
    out, back = str(tmp_path / "backbone.pth"), str(tmp_path / "back.pth")
    assert command.main([published, out, "--from", "torchvision_resnet"]) == 0
    assert all(key.startswith("detector.backbone.") for key in read(out))
    assert command.main([out, back, "--to", "torchvision_resnet"]) == 0
    assert torch.equal(read(back)["conv1.weight"], read(published)["backbone.0.body.conv1.weight"])


def test_another_model_is_refused_and_nothing_is_written(
    published: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, config = tmp_path / "ours.pth", write_config(tmp_path, "dino")
    text = error(capsys, published, str(out), "--config-file", config)
    assert f"The checkpoint {published} (DETR of facebookresearch/detr) does not fit" in text
    assert f"the model of {config}: " in text
    assert not out.exists()


@pytest.mark.parametrize(
    ("args", "text"),
    [
        (["{file}", "{file}"], "would replace its own source"),
        (["{file}", "{folder}/x.txt"], "must end in .pth or .safetensors"),
        (["{file}", "{folder}/none/x.pth"], "does not exist: make it first"),
        (["{file}", "{folder}/x.pth", "--to", "dert"], "no checkpoint format 'dert'"),
        (["{file}", "{folder}/x.pth", "--from", "dert"], "no checkpoint format 'dert'"),
        (["{file}", "{folder}/x.pth", "--opts", "a=1"], "name it with --config-file"),
        (["{folder}/none.pth", "{folder}/x.pth"], "none.pth cannot be loaded"),
        (["{file}", "{folder}/x.pth", "--config-file", "none.py"], "does not exist"),
        (
            ["{file}", "{folder}/x.pth", "--config-file", "a.py", "--class-rows", "91"],
            "--opts model.num_classes=91",
        ),
    ],
)
def test_wrong_commands_are_refused(
    args: list[str],
    text: str,
    published: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    filled = [arg.format(file=published, folder=tmp_path) for arg in args]
    assert text in error(capsys, *filled)
    assert list(tmp_path.iterdir()) == []


def test_the_formats_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_info:
        command.main(["--list-formats"])
    assert exit_info.value.code == 0
    printed = capsys.readouterr().out
    assert "huggingface_deformable_detr_v5" in printed and "torchvision's ResNet" in printed


def test_the_result_says_what_it_was_compared_with(
    published: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, config = str(tmp_path / "ours.pth"), write_config(tmp_path)
    assert command.main([published, out]) == 0
    last = capsys.readouterr().out.splitlines()[-1]
    assert "not compared with any model" in last and "--config-file" in last
    assert command.main([published, out, "--config-file", config]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == f"They fill the model of {config}."
    backbone = ["--from", "torchvision_resnet"]
    assert command.main([published, out, "--config-file", config, *backbone]) == 0
    last = capsys.readouterr().out.splitlines()[-1]
    model = tiny_detector("detr", num_classes=80).state_dict()
    filled = sum(name.startswith("detector.backbone.") for name in model)
    assert last.startswith(f"Only {filled} of the {len(model)} weights of the model of {config}")


def test_an_option_after_the_overrides(
    published: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--config-file", write_config(tmp_path), "--opts", "model.num_classes=80"]
    text = error(capsys, published, str(tmp_path / "ours.pth"), *options, "--allow-partial")
    assert "'--allow-partial' stands among the overrides" in text


def test_an_output_that_cannot_be_written(
    published: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "ours.pth"
    out.mkdir()
    text = error(capsys, published, str(out))
    assert f"{out} cannot be written (Is a directory): " in text
