"""Files with published weights of backbones, as `train.init_checkpoint`."""

from __future__ import annotations

import logging
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from detectron2.config import instantiate
from detectron2.modeling import SwinTransformer
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from yacs.config import CfgNode

from efficient_detr.engine.checkpointer import AtomicCheckpointer
from efficient_detr.errors import UserError
from efficient_detr.modeling.classifier import ImageClassifier
from tests.checkpoint.test_backbones import NORMS, TESTS, Outer, below, classifier, tiny_config

State = dict[str, Tensor]


@pytest.fixture(scope="module")
def weights() -> State:
    """A small published model."""
    tensors = load_file(TESTS / "golden/dat_tiny.safetensors")
    return {k.partition(".")[2]: v for k, v in tensors.items() if k.startswith("w.")}


class Detector(nn.Module):
    """A model with a backbone and weights that no file of a backbone should touch."""

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.detector = Outer("backbone", backbone)
        self.head = nn.Linear(64, 10)
        self.norm = nn.LayerNorm(64)


def new_detector() -> Detector:
    return Detector(instantiate(tiny_config()))


def tiny_swin(window: int = 2, **options: Any) -> SwinTransformer:
    """One block at 8 channels, two at 16, one at 32 and one at 64."""
    return SwinTransformer(
        embed_dim=8,
        depths=(1, 2, 1, 1),
        num_heads=(1, 1, 1, 1),
        window_size=window,
        drop_path_rate=0.0,
        **options,
    )


def is_loaded(model: Detector, weights: State) -> None:
    """Whether the first and a reshaped weight have the values of the file, and the head has not."""
    backbone: Any = model.detector.backbone
    assert torch.equal(
        backbone.stages[0].merging.convolution.weight, weights["patch_proj.0.weight"]
    )
    key = backbone.stages[2].blocks[1].attention.key.weight
    assert torch.equal(key, weights["stages.2.attns.1.proj_k.weight"][:, :, 0, 0])
    assert not torch.equal(model.head.weight, weights["cls_head.weight"])
    assert torch.equal(model.norm.weight, torch.ones(64))


def settings() -> CfgNode:
    """As in the files of the authors' training code."""
    node = CfgNode({"MODEL": {"TYPE": "dat", "DEPTHS": [2, 2], "DROP": 0.1}, "NOTE": None})
    node.freeze()
    return node


@pytest.mark.parametrize(
    "content",
    [
        lambda w: {"model": w},
        lambda w: {"model": w, "optimizer": {"state": {0: {"step": 3}}}, "max_accuracy": 82.0},
        lambda w: {"model": w, "config": settings(), "epoch": 299},
        lambda w: w,
        lambda w: {
            "meta": {"CLASSES": ("cat", "dog"), "epoch": 12},
            "state_dict": {f"backbone.{k}": v for k, v in w.items()}
            | {"neck.fpn_convs.0.conv.weight": torch.zeros(2, 2)},
        },
    ],
    ids=["model", "optimizer", "settings", "bare", "state_dict"],
)
@pytest.mark.parametrize("query", ["", "?matching_heuristics=True"])
def test_published_files(tmp_path: Path, weights: State, content: Any, query: str) -> None:
    path = tmp_path / "published.pth"
    torch.save(content(weights), path)
    model = new_detector()
    AtomicCheckpointer(model, allow_partial=True).load(f"{path}{query}")
    is_loaded(model, weights)


def test_files_of_old_torch(tmp_path: Path, weights: State) -> None:
    path = tmp_path / "old.pth"
    content = {"model": weights, "config": settings()}
    torch.save(content, path, _use_new_zipfile_serialization=False)
    model = new_detector()
    AtomicCheckpointer(model).load(str(path))
    is_loaded(model, weights)


def test_file_of_the_converter_for_swin(tmp_path: Path) -> None:
    """Detectron2's converter writes a pickle that asks for matching by the ends of names."""
    published = tiny_swin(out_indices=()).state_dict()
    head = {"norm.weight": torch.full((64,), 5.0), "head.weight": torch.full((10, 64), 5.0)}
    arrays = {key: value.numpy() for key, value in (published | head).items()}
    path = tmp_path / "swin.pkl"
    content = {"model": arrays, "__author__": "third_party", "matching_heuristics": True}
    path.write_bytes(pickle.dumps(content))
    model = Detector(tiny_swin(out_indices=(1, 2, 3)))
    AtomicCheckpointer(model).load(str(path))
    for name, value in published.items():
        assert torch.equal(model.state_dict()[f"detector.backbone.{name}"], value)
    assert (model.norm.weight == 1).all() and (model.head.weight < 5).all()
    assert (model.state_dict()["detector.backbone.norm3.weight"] == 1).all()


def test_table_of_what_happened(
    tmp_path: Path, weights: State, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "published.pth"
    torch.save({"model": weights}, path)
    with caplog.at_level(logging.INFO):
        AtomicCheckpointer(new_detector()).load(str(path))
    (record,) = [r for r in caplog.records if "DAT weights" in r.message]
    # To evaluate such a model is an error of the user, to train it is not.
    assert record.levelno == logging.WARNING
    for text in (
        f"{path} loaded into detector.backbone",
        "4 other weights keep their initial values",
        "1x1 convolutions to linear layers",
        "parts of a classification head (4 weights)",
        f"detector.backbone.{NORMS[0]}",
    ):
        # Long cells of the table are wrapped.
        assert text in " ".join(record.message.split())
    assert "head.bias" not in caplog.text


def test_table_is_no_warning_where_all_is_loaded(
    tmp_path: Path, weights: State, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "published.pth"
    torch.save({"model": weights}, path)
    model = classifier(instantiate(tiny_config()), num_classes=10)
    with caplog.at_level(logging.INFO, logger="efficient_detr"):
        AtomicCheckpointer(model).load(str(path))
        trained = AtomicCheckpointer(new_detector(), trainer=nn.Linear(1, 1))
        trained.load(str(path), checkpointables=[])
    assert [r.levelno for r in caplog.records if "DAT weights" in r.message] == [logging.INFO] * 2
    assert torch.equal(model.head.weight, weights["cls_head.weight"])
    assert torch.equal(model.state_dict()[f"backbone.{NORMS[1]}"], weights["cls_norm.norm.bias"])


def messages(caplog: pytest.LogCaptureFixture, text: str) -> list[tuple[int, str]]:
    return [(r.levelno, r.message) for r in caplog.records if text in r.message]


@pytest.mark.parametrize("kind", ["dat", "dat detector", "swin", "swin detector"])
def test_a_random_head_is_a_warning(
    tmp_path: Path, weights: State, caplog: pytest.LogCaptureFixture, kind: str
) -> None:
    if kind.startswith("dat"):
        model = classifier(instantiate(tiny_config()), num_classes=10)
        state = {k: v for k, v in weights.items() if not k.startswith("cls_")}
    else:
        model = classifier(tiny_swin(out_indices=(3,)), num_classes=10)
        state = dict(tiny_swin(out_indices=()).state_dict())
    if kind.endswith("detector"):
        norm = "norms.3.norm" if kind.startswith("dat") else "norm3"
        state |= {f"{norm}.weight": torch.ones(64), f"{norm}.bias": torch.zeros(64)}
        state = {f"backbone.{k}": v for k, v in state.items()}
        state["neck.weight"] = torch.zeros(1)
    torch.save({"state_dict": state}, tmp_path / "headless.pth")
    with caplog.at_level(logging.INFO, logger="efficient_detr"):
        AtomicCheckpointer(model, allow_partial=True).load(str(tmp_path / "headless.pth"))
    ((level, text),) = messages(caplog, "weights of")
    assert level == logging.WARNING
    assert "the head is random and the predictions are meaningless" in text
    assert ("only the backbone is taken from the file, not neck" in text) == kind.endswith("tor")


def test_a_detector_of_others_under_a_training(
    tmp_path: Path, weights: State, caplog: pytest.LogCaptureFixture
) -> None:
    state = {f"backbone.{k}": v for k, v in weights.items()}
    state |= {"dn_query.weight": torch.zeros(1), "transformer.level_embeds": torch.zeros(1)}
    torch.save(state, tmp_path / "detector.pth")
    model = new_detector()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    given: Any
    for given in ({}, {"trainer": nn.Linear(1, 1)}):
        with pytest.raises(
            UserError, match=r"detector.pth \(DAT .*dn_query, trans.*--from dat"
        ) as error:
            AtomicCheckpointer(model, **given).load(str(tmp_path / "detector.pth"), [])
        assert "\n" not in str(error.value)
    assert all(torch.equal(value, before[n]) for n, value in model.state_dict().items())
    with caplog.at_level(logging.INFO, logger="efficient_detr"):
        trained = AtomicCheckpointer(model, allow_partial=True, trainer=nn.Linear(1, 1))
        trained.load(str(tmp_path / "detector.pth"), checkpointables=[])
    is_loaded(model, weights)
    ((level, text),) = messages(caplog, "DAT weights")
    assert level == logging.WARNING
    assert "only the backbone is taken from the file, not dn_query, transformer" in text
    assert "predictions are meaningless" not in text


@pytest.mark.parametrize("kind", ["dat", "swin"])
def test_our_own_classifier_under_a_detector(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, kind: str
) -> None:
    def backbone() -> nn.Module:
        if kind == "dat":
            return instantiate(tiny_config())
        return tiny_swin(out_indices=(3,))

    saved, model = classifier(backbone(), num_classes=10), Detector(backbone())
    head = model.head.weight.clone()
    AtomicCheckpointer(saved, str(tmp_path)).save("ours")
    with caplog.at_level(logging.INFO, logger="efficient_detr"):
        trained = AtomicCheckpointer(model, trainer=nn.Linear(1, 1))
        trained.load(str(tmp_path / "ours.pth"), checkpointables=[])
    loaded: Any = model.detector.backbone
    for name, value in saved.backbone.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value), name
    assert torch.equal(model.head.weight, head)
    assert [level for level, _ in messages(caplog, "weights of")] == [logging.INFO]


@pytest.mark.parametrize("kind", ["classifier", "detector", "parallel", "published detector"])
def test_same_names_with_windows_of_another_size(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, kind: str
) -> None:
    """Windows of 2 have tables of 3 x 3 numbers, windows of 3 tables of 5 x 5."""
    saved, wider = tiny_swin(out_indices=(3,)), tiny_swin(out_indices=(3,), window=3)
    name = "layers.3.blocks.0.attn.relative_position_bias_table"
    nn.init.constant_(saved.get_parameter(name), 2.5)
    old: nn.Module = Detector(saved) if kind == "detector" else classifier(saved, 10)
    model: nn.Module = Detector(wider) if kind == "detector" else classifier(wider, 10)
    state = dict(old.state_dict())
    if kind == "parallel":
        state = {f"module.{key}": tensor for key, tensor in state.items()}
    if kind == "published detector":
        state = {f"backbone.{key}": tensor for key, tensor in saved.state_dict().items()}
        state["rpn_head.weight"] = torch.zeros(1)
    torch.save({"model": state}, tmp_path / "windows.pth")
    with caplog.at_level(logging.INFO):
        allowed = AtomicCheckpointer(model, allow_partial=kind == "published detector")
        allowed.load(str(tmp_path / "windows.pth"))
    torch.testing.assert_close(wider.get_parameter(name), torch.full((25, 1), 2.5))
    # One block has one table; all others are as in the file.
    assert torch.equal(wider.get_parameter("norm3.weight"), saved.get_parameter("norm3.weight"))
    index = wider.get_buffer("layers.3.blocks.0.attn.relative_position_index")
    assert index.numel() == 9 * 9 and index.max() == 24
    assert "shapes differ" not in caplog.text
    if kind != "published detector":
        assert "9x1 to 25x1 (5 weights)" in caplog.text
        assert not [r for r in caplog.records if r.levelno >= logging.WARNING]


@pytest.mark.parametrize("query", ["", "?matching_heuristics=True"])
def test_safetensors(tmp_path: Path, weights: State, query: str) -> None:
    path = tmp_path / "published.safetensors"
    save_file({key: tensor.contiguous() for key, tensor in weights.items()}, path)
    model = new_detector()
    AtomicCheckpointer(model).load(f"{path}{query}")
    is_loaded(model, weights)


@pytest.mark.parametrize("content", [b"", b"PK", b"\x80\x02}.", b"\xff" * 64])
def test_damaged_safetensors(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "damaged.safetensors"
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"damaged\.safetensors cannot be loaded") as error:
        AtomicCheckpointer(new_detector()).load(str(path))
    assert "\n" not in str(error.value)


def test_safetensors_without_weights(tmp_path: Path) -> None:
    save_file({}, tmp_path / "empty.safetensors")
    with pytest.raises(UserError, match="holds no weights"):
        AtomicCheckpointer(new_detector()).load(str(tmp_path / "empty.safetensors"))


@pytest.mark.parametrize("kind", ["detector", "classifier"])
def test_our_own_files_load_as_before(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, kind: str
) -> None:
    def new() -> nn.Module:
        swin = tiny_swin(out_indices=(3,))
        return classifier(swin) if kind == "classifier" else Detector(swin)

    saved, model = new(), new()
    AtomicCheckpointer(saved, str(tmp_path)).save("ours")
    with caplog.at_level(logging.INFO):
        AtomicCheckpointer(model).load(str(tmp_path / "ours.pth"))
    assert all(map(torch.equal, model.state_dict().values(), saved.state_dict().values()))
    assert "Swin weights" not in caplog.text


def test_a_file_of_ours_after_a_published_one(
    tmp_path: Path, weights: State, caplog: pytest.LogCaptureFixture
) -> None:
    """The table of one file is not shown again for the next."""
    torch.save({"model": weights}, tmp_path / "published.pth")
    checkpointer = AtomicCheckpointer(new_detector(), str(tmp_path))
    checkpointer.load(str(tmp_path / "published.pth"))
    checkpointer.save("ours")
    with caplog.at_level(logging.INFO):
        caplog.clear()
        checkpointer.load(str(tmp_path / "ours.pth"))
    assert "DAT weights" not in caplog.text


def test_resume_does_not_convert(tmp_path: Path, weights: State) -> None:
    path = tmp_path / "published.pth"
    torch.save({"model": weights, "trainer": {}}, path)
    model = new_detector()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(UserError, match="does not belong to this config"):
        AtomicCheckpointer(model, trainer=nn.Identity()).resume(str(path))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_refusals_name_the_file(tmp_path: Path, weights: State) -> None:
    path = tmp_path / "published.pth"
    torch.save({"model": weights}, path)
    with pytest.raises(UserError, match=r"published\.pth \(DAT .*the model has none"):
        AtomicCheckpointer(nn.Linear(3, 2)).load(str(path))
    config = tiny_config()
    config.stages[0].blocks = config.stages[0].blocks[:1]
    with pytest.raises(
        UserError, match=r"published\.pth .*stages\.0\.attns\.1\.\S+ \(ours: backbone\.stages\.0\."
    ):
        AtomicCheckpointer(below("backbone", instantiate(config))).load(str(path))


def test_other_number_of_classes_is_refused(tmp_path: Path, weights: State) -> None:
    path = tmp_path / "published.pth"
    torch.save({"model": weights}, path)
    model: ImageClassifier = classifier(instantiate(tiny_config()), num_classes=11)
    with pytest.raises(UserError, match=r"\(10\b.*head\.\w+ has \(11\b.*num_classes=10"):
        AtomicCheckpointer(model).load(str(path))


class Malicious:
    """An entry of settings that creates a folder when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


def test_settings_do_not_run_code(tmp_path: Path, weights: State) -> None:
    trace = tmp_path / "trace"
    allowed = list(torch.serialization.get_safe_globals())
    with_code = CfgNode({"A": 1})
    dict.__setitem__(with_code, "B", Malicious(trace))
    for config in (Malicious(trace), with_code):
        torch.save({"model": weights, "config": config}, tmp_path / "evil.pth")
        with pytest.raises(UserError, match="refused"):
            AtomicCheckpointer(new_detector()).load(str(tmp_path / "evil.pth"))
    assert not trace.exists()
    assert set(torch.serialization.get_safe_globals()) == set(allowed)
