"""The benchmark of backbones: its parts are the backbone, and its memory is what is used."""

from __future__ import annotations

import importlib
import json
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch

TOOLS = Path(__file__).parents[2] / "tools"
CPU = torch.device("cpu")

with pytest.MonkeyPatch.context() as _patch:
    _patch.syspath_prepend(str(TOOLS))
    bench: Any = importlib.import_module("bench_backbones")
    memory: Any = importlib.import_module("kernel_benchmark.memory")

DAT = """
from efficient_detr.modeling.backbones.dat_variants import StageSpecification, dat

model = dat(
    [
        StageSpecification("{attention}", 8, 1),
        StageSpecification("LS", 16, 2),
        StageSpecification("L", 24, 2),
        StageSpecification("LD", 32, 2),
    ],
    image_size=64,
)
"""
SWIN = """
from detectron2.config import LazyCall as L
from detectron2.modeling import SwinTransformer

model = L(SwinTransformer)(
    embed_dim=8, depths=[1, 2, 1, 1], num_heads=[1, 1, 2, 2], drop_path_rate=0.0
)
"""
FILES = {
    "dat": DAT.format(attention="L"),
    "dat_large": DAT.format(attention="D"),
    "swin": SWIN,
    "linear": "from detectron2.config import LazyCall as L\nfrom torch.nn import Linear\n"
    "model = L(Linear)(in_features=1, out_features=1)\n",
}


@pytest.fixture
def files(tmp_path: Path) -> dict[str, str]:
    for name, text in FILES.items():
        (tmp_path / f"{name}.py").write_text(text)
    return {name: str(tmp_path / f"{name}.py") for name in FILES}


# Parts -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["dat", "swin"])
def test_parts_make_up_the_backbone(name: str, files: dict[str, str]) -> None:
    """Together they have all parameters but the norms of the outputs, none of them twice."""
    backbone = bench.build(files[name], False, CPU)
    modules = chain.from_iterable(bench.modules_of(backbone).values())
    parts = [id(one) for module in modules for one in module.parameters()]
    norms = ("output_norms", "norm0", "norm1", "norm2", "norm3")
    everything = [
        id(one) for name, one in backbone.named_parameters() if not name.startswith(norms)
    ]
    assert sorted(parts) == sorted(everything)


@pytest.mark.parametrize("name", ["dat", "swin"])
def test_parts_get_what_the_backbone_gives_them(name: str, files: dict[str, str]) -> None:
    """The output of a part's last block is the input of the next part's first module."""
    backbone = bench.build(files[name], False, CPU)
    works = bench.record_parts(backbone, bench.draw_image((64, 96), CPU), 1000, False)
    assert tuple(works) == bench.PARTS
    with torch.no_grad():
        for before, after in zip(bench.PARTS[1:4], bench.PARTS[2:5], strict=True):
            module, args, kwargs = works[before].calls[-1]
            found = module(*args, **kwargs)
            torch.testing.assert_close(found, works[after].calls[0][1][0])


@pytest.mark.parametrize("name", ["dat", "swin"])
def test_training_computes_all_gradients(
    name: str, files: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    gradients: list[Any] = []
    grad = torch.autograd.grad
    monkeypatch.setattr(
        torch.autograd, "grad", lambda *args, **kwargs: gradients.append(grad(*args, **kwargs))
    )
    backbone = bench.build(files[name], True, CPU)
    works = bench.record_parts(backbone, bench.draw_image((64, 64), CPU), 1000, True)
    counted = []
    for work in works.values():
        work()
        assert all(one is not None for one in gradients[-1])
        counted.append(len(gradients[-1]))
    assert counted[-1] == len(list(backbone.parameters()))
    # Of what each module but the stem's first is given as well, less the norms of the outputs.
    modules = sum(len(work.calls) for work in list(works.values())[:-1])
    norms = 2 * len(backbone.output_shape())
    assert sum(counted[:-1]) == counted[-1] - norms + modules - 1


def test_logits_of_the_largest_attention(files: dict[str, str]) -> None:
    """At 64 x 96, stage 3 has 2 x 3 cells and 2 heads, stage 0 has 16 x 24 cells and 1 head."""
    image = bench.draw_image((64, 96), CPU)
    assert bench.most_logits(bench.build(files["dat"], False, CPU), image) == 2 * 6 * 6
    assert bench.most_logits(bench.build(files["dat_large"], False, CPU), image) == 384 * 384
    assert bench.most_logits(bench.build(files["swin"], False, CPU), image) == 0


# Memory ------------------------------------------------------------------------------------------


WORK = """
import json
import torch
from kernel_benchmark.memory import peak_memory

def work():
    first = torch.ones(10_000_000)
    second = torch.ones(5_000_000)
    del first, second
    torch.ones(2_500_000)

device = torch.device("cpu")
first = peak_memory(work, device)
torch.ones(50_000_000)
again = peak_memory(work, device)
less = peak_memory(lambda: torch.ones(10_000_000), device)
print(json.dumps([first, again, less]))
"""


def test_peak_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Work that has 40 and 20 MB at a time, then 10; in a process of its own, as in the commands.

    The allocator of a process that has done much may have kept what the work then takes.
    """
    monkeypatch.syspath_prepend(str(TOOLS))
    script = tmp_path / "script.py"
    script.write_text(WORK)
    first, again, less = memory.in_own_process(str(script), [], "the work")
    if first is None:
        pytest.skip("this operating system does not tell the largest memory of a process")
    # Again, and after something larger: what was freed counts again, what is past does not. The
    # allocator may keep the 10 MB beside the others for a moment.
    assert 57e6 < again < 75e6
    assert 38e6 < less < 50e6


@pytest.mark.gpu
def test_peak_memory_of_a_gpu() -> None:
    device = torch.device("cuda")
    peak = memory.peak_memory(lambda: torch.ones(10_000_000, device=device), device)
    assert peak == pytest.approx(40e6, rel=0.05)


# The command -------------------------------------------------------------------------------------


def test_command(files: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of 256 x 256 pixels, 4096 queries and keys make 67 MB of logits."""
    path = tmp_path / "new" / "found.json"
    arguments = ["--config-file", files["dat_large"], files["swin"], "--sizes", "256x256"]
    arguments += ["--rounds", "1", "--threads", "1", "--max-logits", "1000000", "--markdown"]
    assert bench.main([*arguments, "--json", str(path)]) == 0
    printed = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| 256x")]
    assert len(printed) == 2 * 3  # time and memory of three contenders
    found = json.loads(path.read_text())
    assert not found["training"] and found["rounds"] == 1
    rows = {(row["backbone"], row["chunks"], row["part"]): row for row in found["rows"]}
    contenders = {("dat_large", "in chunks"), ("dat_large", "at once"), ("swin", "")}
    assert {key[:2] for key in rows} == contenders and len(rows) == 3 * len(bench.PARTS)
    assert all(row["milliseconds"] > 0 for row in rows.values())
    for contender in contenders:
        parts = [rows[(*contender, part)]["milliseconds"] for part in bench.PARTS]
        assert parts[-1] == pytest.approx(sum(parts[:-1]), rel=0.75)
    peaks = {key: row["peak_bytes"] for key, row in rows.items()}
    if None not in peaks.values():
        for part in ("stage 0", "whole"):
            saved = peaks["dat_large", "at once", part] - peaks["dat_large", "in chunks", part]
            assert saved > 60e6


def test_machine_and_numbers_of_the_table() -> None:
    rows = [
        bench.Row((64, 96), "dat", "", part, 12.345 * factor, 1.0, 0.0, factor * 1_000_000)
        for factor, part in enumerate(bench.PARTS, start=1)
    ]
    times, peaks = (bench.table(rows, name, "github") for name in ("milliseconds", "peak_bytes"))
    assert [cell.strip() for cell in times.splitlines()[2].split("|")[1:-1]] == [
        *("64x96", "dat", "", "12.3", "24.7", "37.0", "49.4", "61.7", "74.1")
    ]
    assert [cell.strip() for cell in peaks.splitlines()[2].split("|")[4:-1]] == list("123456")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--rounds", "0"], "--rounds must be at least 1, not 0."),
        (["--max-logits", "0"], "--max-logits must be at least 1, not 0."),
        (["--config-file", "a/x.py", "b/x.py"], "must differ in name"),
        (["--config-file", "nowhere.py"], "nowhere.py does not exist"),
        (["--config-file", "linear"], "has no DAT and no Swin Transformer"),
        (["--json", "/dev/null/found.json"], "--json /dev/null/found.json cannot be written"),
        (["--json", "."], "--json . cannot be written (it is a folder)"),
    ],
)
def test_errors(
    arguments: list[str],
    message: str,
    files: dict[str, str],
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert bench.main([files.get(argument, argument) for argument in arguments]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("size", ["224", "16x64", "ax2"])
def test_sizes(size: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        bench.parse(["--sizes", size])
    assert "give HEIGHTxWIDTH" in capsys.readouterr().err


def test_the_default_configs_are_there() -> None:
    for file in bench.DEFAULT_CONFIGS:
        assert Path(file).is_file()
        assert bench.load_config(file, []).model is not None
