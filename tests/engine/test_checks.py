"""Each mistake of the user gives one sentence that names it, before anything is built."""

import json
from pathlib import Path

import pytest
import torch
from detectron2.config import LazyConfig
from detectron2.data import DatasetCatalog
from omegaconf import OmegaConf

from efficient_detr.engine.checks import check_config, check_dataset, load_config
from efficient_detr.errors import UserError
from efficient_detr.ops import library
from tests.engine.tiny import write_project

COMMON = Path(__file__).parents[2] / "configs" / "common"


@pytest.fixture
def config_file(tmp_path: Path) -> str:
    return write_project(tmp_path)


def sentence(config_file: str, *overrides: str, eval_only: bool = False, num_gpus: int = 0) -> str:
    """The complaint about a config; it must be a single line."""

    def start() -> None:
        cfg = load_config(config_file, overrides)
        check_config(cfg, eval_only=eval_only, num_gpus=num_gpus)

    with pytest.raises(UserError) as caught:
        start()
    text = str(caught.value)
    assert "\n" not in text
    return text


@pytest.mark.parametrize("value", ["None", "null"])
def test_an_override_can_be_none(config_file: str, value: str) -> None:
    assert load_config(config_file, [f"model.width={value}"]).model.width is None


def test_a_sound_config_passes(config_file: str) -> None:
    cfg = load_config(config_file, ["train.max_iter=3", "model.width=16"])
    check_config(cfg)
    assert cfg.train.max_iter == 3
    assert cfg.model.width == 16, "an argument of the target, though the config does not set it"


@pytest.mark.parametrize("name", ["train", "optim", "schedule", "data/coco_detr"])
def test_the_common_configs_give_their_targets_known_arguments(name: str) -> None:
    from efficient_detr.engine.checks import check_arguments

    config = LazyConfig.load(str(COMMON / f"{name}.py"))
    assert len(config) > 0
    check_arguments(config)


@pytest.mark.parametrize(
    ("override", "hint"),
    [
        ("train.max_itr=3", "'train.max_iter'"),
        ("max_iter=3", "'train.max_iter'"),
        ("trian.max_iter=3", "'train.max_iter'"),
        ("model.num_clases=3", "'model.num_classes'"),
        ("model.widht=3", "'model.width'"),
        ("dataloader.train.mapper.augmentations.0.probability=1", "augmentations.0.prob"),
        ("dataloader.train.mapper.augmentations.7.prob=1", "'dataloader"),
        ("optimizer.learning_rate=1", "no key 'optimizer.learning_rate'"),
    ],
)
def test_an_unknown_override(config_file: str, override: str, hint: str) -> None:
    text = sentence(config_file, override)
    assert f"no key '{override.split('=')[0]}'" in text
    assert hint in text


def test_a_new_key_on_purpose(config_file: str) -> None:
    cfg = load_config(config_file, ["+train.my_note=hello"])
    assert cfg.train.my_note == "hello"


def test_a_malformed_override(config_file: str) -> None:
    assert "'train.max_iter'" in sentence(config_file, "train.max_iter")


def test_a_malformed_override_may_be_an_option_or_lack_quotes(config_file: str) -> None:
    text = sentence(config_file, "--allow-partial")
    assert (
        text
        == "'--allow-partial' stands among the overrides: put options of the command before them."
    )
    text = sentence(config_file, "train.output_dir=/a/(ü")
    assert "need inner quotes, e.g. \"train.output_dir='/a/b c'\"" in text


def test_counts_in_brackets_are_written_with_dots(config_file: str) -> None:
    name = "dataloader.train.mapper.augmentations"
    assert sentence(config_file, f"{name}[1].sample_style=range") == (
        f"The override '{name}[1].sample_style=range' counts in brackets: write "
        f"'{name}.1.sample_style' for '{name}[1].sample_style'."
    )
    load_config(config_file, [f"{name}.1.sample_style=range"])


@pytest.mark.parametrize(
    ("override", "hint"),
    [
        ("train.max_iter=0", "train.max_iter=0 is not allowed: give an integer of 1 or more."),
        ("train.max_iter=1e3", "train.max_iter=1000.0 is not allowed"),
        ("train.max_iter=true", "train.max_iter=True is not allowed"),
        ("train.max_iter=many", "train.max_iter='many' is not allowed"),
        ("train.seed=null", "train.seed=null is not allowed: give an integer."),
        ("train.clip_max_norm=-1", "give a number of 0 or more"),
        ("train.clip_max_norm=nan", "train.clip_max_norm=nan is not allowed"),
        ("train.log_period=0", "train.log_period=0"),
        ("train.checkpointer.period=0", "train.checkpointer.period=0"),
        ("train.checkpointer=null", "lacks train.checkpointer.period"),
        ("train.eval_period=-1", "train.eval_period=-1"),
        ("train.flops_images=-1", "train.flops_images=-1"),
        ("optimizer.lr=-0.1", "optimizer.lr=-0.1"),
        ("optimizer.lr=fast", "optimizer.lr='fast'"),
        ("dataloader.train.num_workers=-1", "dataloader.train.num_workers=-1"),
        ("dataloader.test.num_workers=0.5", "dataloader.test.num_workers=0.5"),
        ("train.output_dir=''", "give a text that is not empty"),
        ("train.output_dir=3", "train.output_dir=3 is not allowed"),
        ("train.seed=${train.absent}", "train.seed cannot be read"),
        ("train.device=gpu", "train.device=gpu is not allowed: give cpu, cuda or"),
        ("train.device=meta", "train.device=meta is not allowed"),
        ("train.device=null", "train.device=None is not allowed"),
        ("model=null", "lacks model:"),
        ("optimizer=null", "lacks optimizer:"),
        ("train=null", "lacks train:"),
        ("train=3", "train=3 is not allowed"),
    ],
)
def test_a_value_that_is_not_allowed(config_file: str, override: str, hint: str) -> None:
    assert hint in sentence(config_file, override)


def test_values_at_the_border(config_file: str) -> None:
    overrides = ["train.seed=-1", "train.clip_max_norm=null", "optimizer.lr=0", "train.max_iter=1"]
    check_config(load_config(config_file, overrides))


@pytest.mark.parametrize("below", ["", "/run"])
def test_an_output_folder_that_cannot_be_made(config_file: str, tmp_path: Path, below: str) -> None:
    (tmp_path / "taken").write_text("")
    folder = f"{tmp_path}/taken{below}"
    text = sentence(config_file, f"train.output_dir={folder}")
    assert text.startswith(f"The folder train.output_dir={folder} cannot be made (")


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("config.py", "model = 1 / 0"),
        ("config.py", "raise RuntimeError('two\\nlines')"),
        ("config.yaml", ""),
        ("config.yaml", "- 1"),
        ("config.yaml", "a: [1"),
    ],
)
def test_a_config_that_fails(tmp_path: Path, file: str, content: str) -> None:
    (tmp_path / file).write_text(content)
    assert f"{file} cannot be loaded: " in sentence(str(tmp_path / file))


@pytest.mark.parametrize("split", ["train", "val"])
def test_an_incomplete_annotation_is_found_at_the_start(
    config_file: str, tmp_path: Path, split: str
) -> None:
    path = tmp_path / f"{split}.json"
    content = json.loads(path.read_text())
    del content["annotations"][3]["iscrowd"]
    path.write_text(json.dumps(content))
    assert sentence(config_file) == (
        f'Annotation 4 (image 2) in {path} lacks iscrowd: add "iscrowd": 0.'
    )


def test_deletion_is_refused(config_file: str) -> None:
    assert "keys cannot be deleted" in sentence(config_file, "~train.max_iter")


def test_an_override_below_a_number(config_file: str) -> None:
    assert "no key 'train.max_iter.x'" in sentence(config_file, "train.max_iter.x=3")


def test_no_config() -> None:
    assert "--config-file" in sentence("")


def test_a_missing_config(tmp_path: Path) -> None:
    assert "absent.py does not exist" in sentence(str(tmp_path / "absent.py"))


def test_a_config_of_another_kind(tmp_path: Path) -> None:
    (tmp_path / "config.txt").write_text("")
    assert "config.txt must be a .py or .yaml file" in sentence(str(tmp_path / "config.txt"))


def test_a_config_with_a_syntax_error(tmp_path: Path) -> None:
    (tmp_path / "config.py").write_text("model = (")
    assert "config.py cannot be loaded" in sentence(str(tmp_path / "config.py"))


def test_a_config_that_imports_a_missing_one(tmp_path: Path) -> None:
    (tmp_path / "config.py").write_text("from .absent import model")
    text = sentence(str(tmp_path / "config.py"))
    assert "config.py cannot be loaded" in text
    assert "absent.py" in text


def test_a_config_without_its_parts(tmp_path: Path) -> None:
    (tmp_path / "config.py").write_text("model = dict()\ntrain = dict()")
    text = sentence(str(tmp_path / "config.py"))
    assert "lacks dataloader and optimizer and lr_multiplier" in text
    text = sentence(str(tmp_path / "config.py"), eval_only=True)
    assert "lacks dataloader:" in text


def test_a_config_without_an_option_of_training(config_file: str) -> None:
    path = Path(config_file)
    path.write_text(path.read_text().replace("clip_max_norm=0.1,", "").replace("log_period=2,", ""))
    text = sentence(config_file)
    assert "lacks train.clip_max_norm and train.log_period: import it" in text
    check_config(load_config(config_file, []), eval_only=True)


def test_an_argument_that_the_target_does_not_take(config_file: str) -> None:
    text = sentence(config_file, "+model.widht=3")
    assert "'model.widht' is unknown: TinyDetector takes no argument 'widht'" in text
    assert "did you mean 'width'" in text


def test_a_target_that_cannot_be_imported(config_file: str) -> None:
    text = sentence(config_file, "model._target_=tests.engine.tiny.Absent")
    assert "'tests.engine.tiny.Absent' cannot be imported" in text


def test_a_missing_checkpoint(config_file: str) -> None:
    text = sentence(config_file, "train.init_checkpoint=absent.pth")
    assert "absent.pth does not exist" in text


def test_an_address_is_not_looked_for_on_the_disk(config_file: str) -> None:
    for address in ("detectron2://a/b.pkl", "https://a/b-0123abcd.pth#sha256=0123abcd"):
        check_config(load_config(config_file, [f"train.init_checkpoint='{address}'"]))


def test_an_address_without_a_meaning(config_file: str) -> None:
    text = sentence(config_file, "train.init_checkpoint='https://a/b.pth#md5=0123abcd'")
    assert "only #sha256=" in text


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_a_gpu_that_is_not_there(config_file: str) -> None:
    assert "add train.device=cpu" in sentence(config_file, "train.device=cuda")


def test_more_gpus_than_there_are(config_file: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    text = sentence(config_file, "train.device=cuda", num_gpus=3)
    assert text == "--num-gpus 3, but this machine has 2: use fewer."
    assert "are cuda:0 to cuda:1" in sentence(config_file, "train.device='cuda:2'")


def test_an_implementation_that_does_not_exist(
    config_file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(library.ENVIRONMENT_VARIABLE, "fast")
    assert sentence(config_file).startswith("EFFICIENT_DETR_OPS is 'fast'; it can be auto,")
    monkeypatch.setenv(library.ENVIRONMENT_VARIABLE, "compiled")
    monkeypatch.setattr(library, "_loader", library.KernelLoader(tmp_path))
    assert "were asked for on cpu, but the CPU kernels are not built" in sentence(config_file)
    monkeypatch.setenv(library.ENVIRONMENT_VARIABLE, "pytorch")
    check_config(load_config(config_file, []))


def test_an_unknown_precision(config_file: str) -> None:
    assert "float16 or bfloat16" in sentence(config_file, "train.amp.dtype=half")


def test_an_unknown_data_set(config_file: str) -> None:
    name = "dataloader.test.dataset"
    text = sentence(
        config_file,
        f"{name}.names=coco_2017_vall",
        f"{name}.json_file=null",
        f"{name}.image_root=null",
    )
    assert "no data set 'coco_2017_vall'; did you mean" in text
    assert "'coco_2017_val'" in text


def test_a_missing_annotation_file(config_file: str, tmp_path: Path) -> None:
    (tmp_path / "train.json").unlink()
    text = sentence(config_file)
    assert f"lacks its annotation file {tmp_path}/train.json" in text
    assert "DETECTRON2_DATASETS" in text


def test_a_missing_image_folder(config_file: str, tmp_path: Path) -> None:
    (tmp_path / "val").rename(tmp_path / "elsewhere")
    assert f"lacks its image folder {tmp_path}/val" in sentence(config_file, eval_only=True)


def test_evaluation_does_not_need_the_training_set(config_file: str, tmp_path: Path) -> None:
    (tmp_path / "train.json").unlink()
    check_config(load_config(config_file, []), eval_only=True)


def test_the_wrong_number_of_classes(config_file: str) -> None:
    text = sentence(config_file, "model.num_classes=80")
    assert "has 3 classes (square, disc, cross), but the model has 80" in text
    assert "add model.num_classes=3" in text


def test_an_annotation_file_of_another_format(config_file: str, tmp_path: Path) -> None:
    (tmp_path / "train.json").write_text(json.dumps([1, 2]))
    assert "is not in COCO format" in sentence(config_file)


def test_files_that_are_still_to_be_given() -> None:
    config = LazyConfig.load(str(COMMON / "data" / "custom_detr.py"))
    with pytest.raises(UserError, match=r"dataloader\.train\.dataset\.json_file is not set"):
        check_dataset(config, "train")


def test_a_data_set_without_a_name_is_left_alone() -> None:
    config = OmegaConf.create({"dataloader": {"train": {"dataset": {"anything": 1}}}})
    known = set(DatasetCatalog.list())
    check_dataset(config, "train")
    assert set(DatasetCatalog.list()) == known
