"""The installer behind `make install`: what it installs, what it leaves alone, how it recovers."""

import json
from pathlib import Path

import pytest

from tools import install
from tools.install import Environment, InstallationError, Options, Situation, Versions

DEFAULT = Options(torch="torch==2.13.0", torch_is_default=True, detectron2="")
NOTHING: Versions = dict.fromkeys(("torch", "torchvision", "detectron2", "efficient_detr"))
CONSTRAINTS = Path("constraints.txt")


class FakeMachine:
    """Stands in for `python -m venv` and `pip install`: notes the calls, installs nothing."""

    def __init__(self, environment: Path) -> None:
        self.environment = environment
        self.versions: Versions | None = None
        self.installed: list[str] = []
        self.fails_at = ""
        self.killed_at = ""

    def run(self, command: list[str], what: str) -> None:
        if "venv" in command:
            self.environment.mkdir(exist_ok=True)
            self.versions = {**NOTHING, "python": "3.12"}
            return
        name = what.removeprefix("Installing ")
        if name == self.fails_at:
            raise InstallationError(what)
        if name == self.killed_at:
            raise KeyboardInterrupt
        assert self.versions is not None
        self.installed.append(name)
        version = "0.6.dev0+lite" if name == "detectron2" else "2.13.0"
        self.versions = {**self.versions, name: version}

    def calls_of(self, options: Options = DEFAULT) -> list[str]:
        """The steps that one run of the installer carries out."""
        self.installed.clear()
        install.install(Environment(self.environment), options, None)
        return list(self.installed)


ALL_STEPS = ["torch", "requirements", "detectron2", "efficient_detr"]


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeMachine:
    fake = FakeMachine(tmp_path / "venv")
    monkeypatch.setattr(install, "run", fake.run)
    monkeypatch.setattr(Environment, "probe", lambda self: fake.versions)
    monkeypatch.setattr(install, "environment_module", lambda: "venv")
    monkeypatch.setattr(install, "KERNEL_RECORD", tmp_path / "_kernels_build.json")
    install.KERNEL_RECORD.write_text("{}")
    for name in install.BUILD_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    return fake


def test_a_second_call_installs_nothing(machine: FakeMachine) -> None:
    assert machine.calls_of() == ALL_STEPS
    assert machine.calls_of() == []


def test_a_failed_step_is_done_again_and_the_finished_ones_are_not(machine: FakeMachine) -> None:
    machine.fails_at = "detectron2"
    with pytest.raises(InstallationError):
        machine.calls_of()
    machine.fails_at = ""
    assert machine.calls_of() == ["detectron2", "efficient_detr"]


def test_a_killed_installation_starts_afresh(machine: FakeMachine) -> None:
    machine.killed_at = "requirements"
    with pytest.raises(KeyboardInterrupt):
        machine.calls_of()
    rubbish = machine.environment / "half_a_package"
    rubbish.mkdir()
    machine.killed_at = ""
    assert machine.calls_of() == ALL_STEPS
    assert not rubbish.exists()


def test_a_folder_of_somebody_else_is_left_alone(machine: FakeMachine) -> None:
    machine.environment.mkdir()
    (machine.environment / "thesis.tex").touch()
    with pytest.raises(InstallationError, match="holds no working Python"):
        machine.calls_of()
    assert (machine.environment / "thesis.tex").exists()


def test_another_python_than_the_one_of_the_environment_is_refused(machine: FakeMachine) -> None:
    machine.calls_of()
    with pytest.raises(
        InstallationError, match=r"has Python 3\.12, but PYTHON= names Python 3\.13"
    ):
        install.install(Environment(machine.environment), DEFAULT, "3.13")


def test_a_package_removed_by_hand_comes_back(machine: FakeMachine) -> None:
    machine.calls_of()
    machine.versions = {**(machine.versions or {}), "detectron2": None}
    assert machine.calls_of() == ["detectron2"]


def test_a_real_detectron2_installed_by_hand_stays(machine: FakeMachine) -> None:
    machine.calls_of()
    machine.versions = {**(machine.versions or {}), "detectron2": "0.6"}
    assert machine.calls_of() == []


def test_later_steps_may_not_replace_torch(machine: FakeMachine) -> None:
    machine.calls_of()
    text = Environment(machine.environment).constraints.read_text()
    assert text == "torch==2.13.0\n"


def situation(
    options: Options = DEFAULT,
    stamp: str = "",
    torch: str | None = None,
    detectron2: str | None = None,
) -> Situation:
    versions = {**NOTHING, "python": "3.12", "torch": torch, "detectron2": detectron2}
    return Situation(options, versions, stamp, CONSTRAINTS)


def test_torch_of_an_existing_environment_stays() -> None:
    assert install.torch_step(situation(torch="2.11.0+cu130")).arguments is None


def test_torch_that_is_too_old_is_refused() -> None:
    with pytest.raises(InstallationError, match=r"has torch 2\.9\.1, but the project needs 2\.11"):
        install.torch_step(situation(torch="2.9.1"))


def test_a_new_default_replaces_the_old_default_but_no_choice_of_the_user() -> None:
    new = Options("torch==2.14.0", torch_is_default=True, detectron2="")
    after_default = situation(new, stamp="default: torch==2.13.0", torch="2.13.0")
    assert install.torch_step(after_default).arguments == ["torch==2.14.0"]
    after_choice = situation(new, stamp="asked for: torch==2.12.0", torch="2.12.0")
    assert install.torch_step(after_choice).arguments is None


def test_torch_may_be_given_with_options_of_pip() -> None:
    asked = Options("torch==2.12.0 torchvision --pre", torch_is_default=False, detectron2="")
    step = install.torch_step(situation(asked, torch="2.13.0"))
    assert step.arguments == ["torch==2.12.0", "torchvision", "--pre"]


@pytest.mark.parametrize("installed", [None, "0.6.dev0+lite"])
def test_lite_where_there_is_no_real_detectron2(installed: str | None) -> None:
    step = install.detectron2_step(situation(torch="2.13.0", detectron2=installed))
    assert step.arguments is not None
    assert step.arguments[-1] == str(install.LITE)


@pytest.mark.parametrize("installed", [None, "0.6.dev0+lite", "0.6"])
def test_detectron2_that_is_asked_for(installed: str | None) -> None:
    asked = Options("torch", torch_is_default=True, detectron2="../detectron2")
    step = install.detectron2_step(situation(asked, torch="2.13.0", detectron2=installed))
    assert step.arguments is not None
    assert "../detectron2" in step.arguments
    assert str(install.LITE) not in step.arguments


def test_digest_depends_on_contents_and_order(tmp_path: Path) -> None:
    first, second, absent = tmp_path / "a", tmp_path / "b", tmp_path / "c"
    first.write_text("1")
    second.write_text("2")
    assert install.digest([first, second]) == install.digest([first, second])
    assert install.digest([first, second]) != install.digest([second, first])
    assert install.digest([first, absent]) != install.digest([first])
    before = install.digest([first])
    first.write_text("3")
    assert install.digest([first]) != before


def test_a_python_without_venv_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(install, "can_import", lambda module: module == "venv")
    with pytest.raises(InstallationError, match="apt install python3-venv"):
        install.environment_module()
    monkeypatch.setattr(install, "can_import", lambda module: module in ("venv", "virtualenv"))
    assert install.environment_module() == "virtualenv"


def test_the_project_is_built_again_when_its_kernels_may_have_changed(
    machine: FakeMachine, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine.calls_of()
    install.KERNEL_RECORD.unlink()  # make clean
    assert machine.calls_of() == ["efficient_detr"]
    install.KERNEL_RECORD.write_text("{}")
    assert machine.calls_of() == []
    monkeypatch.setenv("EFFICIENT_DETR_BUILD_CUDA", "1")
    assert machine.calls_of() == ["efficient_detr"]
    assert machine.calls_of() == []
    monkeypatch.setattr(install.shutil, "which", lambda name: f"/new/{name}")
    assert machine.calls_of() == ["efficient_detr"]
    monkeypatch.setattr(install, "kernel_sources", lambda folder: "edited")
    assert machine.calls_of() == ["efficient_detr"]
    machine.versions = {**(machine.versions or {}), "torch": "2.14.0"}
    assert "efficient_detr" in machine.calls_of()
    assert machine.calls_of() == []


def test_kernel_sources_are_told_apart_by_name_and_content(tmp_path: Path) -> None:
    folder = tmp_path / "kernels"
    (folder / "a").mkdir(parents=True)
    (folder / "a" / "cpu.cpp").write_text("1")
    first = install.kernel_sources(folder)
    (folder / "README.md").write_text("not compiled")
    assert install.kernel_sources(folder) == first
    (folder / "a" / "cpu.cpp").write_text("2")
    second = install.kernel_sources(folder)
    (folder / "a").rename(folder / "b")
    third = install.kernel_sources(folder)
    (folder / "b" / "shared.cuh").touch()
    assert len({first, second, third, install.kernel_sources(folder)}) == 4


def test_what_the_build_noted_is_reported_in_one_line_a_device(tmp_path: Path) -> None:
    record = tmp_path / "record.json"
    assert install.kernel_report(record) == []
    failed = {"state": "failed", "reason": "compiling them failed (no)", "log": "build/cpu.log"}
    record.write_text(json.dumps({"cpu": failed, "cuda": {"state": "not needed"}}))
    assert install.kernel_report(record) == [
        "operators on cpu: plain PyTorch, which is slower, because the kernels were not built: "
        "compiling them failed (no); see build/cpu.log"
    ]
    record.write_text(json.dumps({"cpu": {"state": "built", "compiler": "g++ 12"}, "cuda": {}}))
    assert install.kernel_report(record) == ["operators on cpu: compiled"]
