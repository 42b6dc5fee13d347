"""The command ``demo.py`` and the predictor behind it."""

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from detectron2.data import transforms as T
from detectron2.data.detection_utils import read_image
from detectron2.structures import Instances
from PIL import Image

import demo
from efficient_detr.engine.checks import load_config
from efficient_detr.engine.predictor import Predictor, output_paths, picture_files, read_picture
from efficient_detr.errors import UserError
from tests.engine.tiny import TinyDetector, write_project


@pytest.fixture
def config_file(tmp_path: Path) -> str:
    """A config with weights that are sure of class 1."""
    path = write_project(tmp_path)
    torch.manual_seed(0)
    model = TinyDetector(num_classes=3)
    torch.nn.init.zeros_(model.classes.weight)
    model.classes.bias.data = torch.tensor([0.0, 4.0, 0.0])
    torch.save({"model": model.state_dict()}, tmp_path / "weights.pth")
    return path


def run(config_file: str, tmp_path: Path, *arguments: str) -> int:
    command = ["--config-file", config_file, "--output", str(tmp_path / "out"), *arguments]
    return demo.main([*command, "--opts", f"train.init_checkpoint={tmp_path}/weights.pth"])


def test_boxes_are_drawn(config_file: str, tmp_path: Path) -> None:
    assert run(config_file, tmp_path, "--input", str(tmp_path / "val")) == 0
    names = [path.name for path in sorted((tmp_path / "out").iterdir())]
    assert names == [f"{i}.png" for i in range(1, 7)]
    drawn = np.asarray(Image.open(tmp_path / "out" / "1.png").convert("RGB"))
    original = np.asarray(Image.open(tmp_path / "val" / "1.png"))
    assert drawn.shape[:2] == original.shape[:2]
    assert (drawn != original).any()


def test_above_the_threshold_nothing_is_drawn(
    config_file: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    # The score is e^4 / (e^4 + 2) = 0.965.
    picture = str(tmp_path / "val" / "1.png")
    with caplog.at_level(logging.INFO, logger="efficient_detr"):
        assert run(config_file, tmp_path, "--input", picture, "--confidence-threshold", "0.96") == 0
        assert run(config_file, tmp_path, "--input", picture, "--confidence-threshold", "0.97") == 0
    counts = [r.getMessage() for r in caplog.records if "detections" in r.getMessage()]
    assert "1 detections" in counts[0]
    assert "0 detections" in counts[1]


def test_an_unreadable_picture_is_a_sentence_and_the_others_go_on(
    config_file: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    broken = tmp_path / "broken.jpg"
    broken.write_text("no picture")
    good = str(tmp_path / "val" / "2.png")
    with caplog.at_level(logging.ERROR, logger="efficient_detr"):
        assert run(config_file, tmp_path, "--input", str(broken), "absent.jpg", good) == 0
    errors = [r.getMessage() for r in caplog.records if r.levelno == logging.ERROR]
    assert errors == [
        f"{broken} cannot be read as a picture and is left out.",
        "absent.jpg cannot be read as a picture and is left out.",
    ]
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["2.png"]


def test_a_picture_that_the_model_refuses_is_named_and_the_others_go_on(
    config_file: str,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    forward = TinyDetector.forward

    def picky(self: TinyDetector, inputs: list[dict[str, Any]]) -> Any:
        if inputs[0]["width"] == 32:
            raise UserError("Too small.")
        return forward(self, inputs)

    monkeypatch.setattr(TinyDetector, "forward", picky)
    pictures = [str(tmp_path / "val" / f"{i}.png") for i in (2, 1)]
    with caplog.at_level(logging.ERROR, logger="efficient_detr"):
        assert run(config_file, tmp_path, "--input", *pictures) == 0
        assert run(config_file, tmp_path, "--input", pictures[0]) == 1
    errors = [r.getMessage() for r in caplog.records if r.levelno == logging.ERROR]
    assert errors == [f"{pictures[0]} is left out: Too small."] * 2
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["1.png"]


def test_a_picture_that_cannot_be_resized(config_file: str) -> None:
    path = "dataloader.test.mapper.augmentations.0.max_size"
    predictor = Predictor(load_config(config_file, [f"{path}=32"]))
    with pytest.raises(UserError, match="A picture of 1000 x 1 pixels cannot be resized"):
        predictor(np.zeros((1, 1000, 3), dtype=np.uint8))


def test_a_result_that_cannot_be_written_leaves_nothing(
    config_file: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "out" / "1.png").mkdir(parents=True)
    pictures = [str(tmp_path / "val" / f"{i}.png") for i in (1, 2)]
    with caplog.at_level(logging.ERROR, logger="efficient_detr"):
        assert run(config_file, tmp_path, "--input", *pictures) == 0
    errors = [r.getMessage() for r in caplog.records if r.levelno == logging.ERROR]
    assert errors == [f"{tmp_path}/out/1.png cannot be written: Is a directory."]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["1.png", "2.png"]


def test_an_output_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("")
    with pytest.raises(UserError, match="taken/out cannot be made"):
        output_paths(["a.jpg"], f"{tmp_path}/taken/out")


CLASSIFIER = """
from detectron2.config import LazyCall as L
from efficient_detr.modeling.classifier import ImageClassifier
model = L(ImageClassifier)(backbone=1, feature="p3", channels=1, num_classes=1)
train = dict(device="cpu", init_checkpoint="")
"""


@pytest.mark.parametrize(
    ("config", "text"),
    [
        (CLASSIFIER, "choose a detector, or classify pictures with tools/classify.py"),
        ("train = dict(device='cpu', init_checkpoint='')", "The config lacks model"),
        ("model = dict()\ntrain = dict(device='cpu')", "The config lacks train.init_checkpoint"),
    ],
)
def test_configs_of_something_else(
    tmp_path: Path, config: str, text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """The classifier could not be built: it is refused before."""
    (tmp_path / "config.py").write_text(config)
    command = ["--config-file", str(tmp_path / "config.py"), "--input", "a.jpg"]
    assert demo.main([*command, "--output", str(tmp_path / "out")]) == 2
    assert text in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_known_classes_must_be_as_many_as_the_models(
    config_file: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = Path(config_file)
    text = path.read_text().replace(f'names="tiny_{tmp_path.name}_val"', 'names="coco_2017_val"')
    text = text.replace(f'json_file="{tmp_path}/val.json"', "json_file=None")
    path.write_text(text.replace(f'image_root="{tmp_path}/val"', "image_root=None"))
    assert run(config_file, tmp_path, "--input", str(tmp_path / "val")) == 2
    assert capsys.readouterr().err.endswith("add model.num_classes=80.\n")


def test_if_all_pictures_fail_the_status_says_so(config_file: str, tmp_path: Path) -> None:
    assert run(config_file, tmp_path, "--input", "absent.jpg") == 1


def test_a_mistake_is_one_line_on_stderr(
    config_file: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    assert run(config_file, tmp_path, "--input", str(empty)) == 2
    assert capsys.readouterr().err == (
        f"Error: --input {empty} names no picture: check the folder or pattern.\n"
    )


def test_the_predictor_answers_in_pixels_of_the_given_picture(
    config_file: str, tmp_path: Path
) -> None:
    overrides = [f"train.init_checkpoint={tmp_path}/weights.pth"]
    predictor = Predictor(load_config(config_file, overrides))
    image = np.full((50, 100, 3), 128, dtype=np.uint8)
    instances = predictor(image)
    assert instances.image_size == (50, 100)
    box = instances.pred_boxes.tensor[0]
    # The tiny detector's boxes are 0.4 of the picture wide and high.
    torch.testing.assert_close(box[2:] - box[:2], torch.tensor([40.0, 20.0]))
    assert instances.pred_classes.tolist() == [1]
    assert predictor.metadata.thing_classes == ["square", "disc", "cross"]


def test_the_predictor_resizes_as_the_evaluation_does(
    config_file: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    predictor = Predictor(load_config(config_file, []))
    seen = []

    def listen(module: torch.nn.Module, inputs: tuple[list[dict[str, torch.Tensor]]]) -> None:
        seen.append(inputs[0][0]["image"].shape)

    predictor.model.register_forward_pre_hook(listen)
    predictor(np.zeros((64, 128, 3), dtype=np.uint8))
    assert seen == [(3, 32, 64)]


def test_the_predictor_gives_the_channels_that_the_config_asks_for(config_file: str) -> None:
    predictor = Predictor(load_config(config_file, ["dataloader.test.mapper.image_format=BGR"]))
    seen = []

    def listen(module: torch.nn.Module, inputs: tuple[list[dict[str, torch.Tensor]]]) -> None:
        seen.append(inputs[0][0]["image"].float().mean(dim=(1, 2)).tolist())

    predictor.model.register_forward_pre_hook(listen)
    image = np.zeros((32, 32, 3), dtype=np.uint8)
    image[:, :, 0] = 200  # red
    predictor(image)
    assert seen == [[0.0, 0.0, 200.0]]


def test_a_demo_needs_no_data_set(config_file: str, tmp_path: Path) -> None:
    for split in ("train", "val"):
        (tmp_path / f"{split}.json").rename(tmp_path / f"moved_{split}.json")
    predictor = Predictor(load_config(config_file, []))
    image = np.zeros((32, 32, 3), dtype=np.uint8)
    assert predictor.draw(image, predictor(image)).get_image().shape == (32, 32, 3)


def test_equal_detections_give_equal_pictures(config_file: str) -> None:
    predictor = Predictor(load_config(config_file, []))
    image = np.full((40, 40, 3), 128, dtype=np.uint8)
    instances = predictor(image)
    first, second = (predictor.draw(image, instances).get_image() for _ in range(2))
    assert (first == second).all()


@pytest.mark.filterwarnings("error:The given NumPy array is not writable")
def test_a_picture_of_one_pixel(config_file: str, tmp_path: Path) -> None:
    predictor = Predictor(load_config(config_file, []))
    predictor.augmentations = T.AugmentationList([])
    predictor.model = OneBox()
    image = np.zeros((1, 1, 3), dtype=np.uint8)
    image.setflags(write=False)
    assert len(predictor(image)) == 1


class OneBox(torch.nn.Module):
    """Finds the same in every picture."""

    def forward(self, batched_inputs: list[dict[str, Any]]) -> list[dict[str, Instances]]:
        return [{"instances": Instances((1, 1), scores=torch.ones(1))}]


@pytest.mark.parametrize("ending", ["png", "tif", "pgm"])
def test_grey_values_of_16_bits_are_scaled(tmp_path: Path, ending: str) -> None:
    """257 steps of 16 bits are one of 8, so that white stays white."""
    path = str(tmp_path / f"grey.{ending}")
    values = np.array([[0, 257, 385], [386, 255 * 257, 128 * 257]], dtype=np.uint16)
    Image.fromarray(values).save(path)
    picture = read_picture(path)
    assert picture.dtype == np.uint8
    np.testing.assert_array_equal(picture[..., 0], [[0, 1, 1], [2, 255, 128]])
    np.testing.assert_array_equal(picture[..., 1:], picture[..., :1].repeat(2, axis=2))


@pytest.mark.parametrize("dtype", [np.int32, np.float32])
def test_values_of_32_bits_are_refused(tmp_path: Path, dtype: type) -> None:
    path = str(tmp_path / "grey.tif")
    Image.fromarray(np.full((2, 3), 1000, dtype=dtype)).save(path)
    with pytest.raises(UserError, match=r"grey\.tif has 32 bits a value and is left out"):
        read_picture(path)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA"])
def test_other_pictures_are_read_as_training_does(tmp_path: Path, mode: str) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    path = str(tmp_path / "picture.png")
    Image.fromarray(pixels).convert(mode).save(path)
    picture = read_picture(path)
    np.testing.assert_array_equal(picture, read_image(path, format="RGB"))
    assert picture.flags.writeable


def test_folders_patterns_and_files(tmp_path: Path) -> None:
    for name in ("b.jpg", "a.PNG", "notes.txt"):
        (tmp_path / name).write_text("")
    expected = [str(tmp_path / name) for name in ("a.PNG", "b.jpg")]
    assert picture_files([str(tmp_path)]) == expected
    assert picture_files([str(tmp_path / "*.jpg"), str(tmp_path)]) == expected[::-1]
    assert picture_files(["absent.jpg"]) == ["absent.jpg"]
    with pytest.raises(UserError, match="names no picture"):
        picture_files([str(tmp_path / "*.gif")])


def test_output_names(tmp_path: Path) -> None:
    out = tmp_path / "out"
    paths = output_paths(["x/a.jpg", "y/a.jpg", "z/c.gif"], str(out))
    assert [Path(path).name for path in paths] == ["a.jpg", "a_2.jpg", "c.png"]
    (tmp_path / "a.jpg").write_text("")
    with pytest.raises(UserError, match="would replace"):
        output_paths([str(tmp_path / "a.jpg")], str(tmp_path))
    with pytest.raises(UserError, match="is a file"):
        output_paths(["x/a.jpg"], str(tmp_path / "a.jpg"))
