"""Says so, by name, when a script asks for a part of Detectron2 that this subset leaves out."""

import dis
import sys
from collections.abc import Callable
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from types import ModuleType
from typing import Any


def absence_message(name: str) -> str:
    """The sentence for something, such as a dotted name, that only the real Detectron2 has."""
    real = "install the real Detectron2 (github.com/facebookresearch/detectron2)"
    return f"{name} is not in detectron2_lite; {real}"


def absent_name_getter(module_name: str) -> Callable[[str], Any]:
    """The ``__getattr__`` (PEP 562) of a module: AttributeError, or ImportError in a from-import,
    where Python would drop the text of an AttributeError.
    """

    def get_absent_name(name: str) -> Any:
        submodule = sys.modules.get(f"{module_name}.{name}")
        if submodule is not None:  # not yet bound to its package (circular import)
            return submodule
        message = absence_message(f"{module_name}.{name}")
        caller = sys._getframe(1)
        if caller.f_code.co_code[caller.f_lasti] == dis.opmap["IMPORT_FROM"]:
            raise ImportError(message, name=module_name)
        raise AttributeError(message)

    return get_absent_name


class _Loader(SourceFileLoader):
    def exec_module(self, module: ModuleType) -> None:
        vars(module)["__getattr__"] = absent_name_getter(module.__name__)
        super().exec_module(module)


class Finder:
    """First entry of ``sys.meta_path``: modules of detectron2 say what they lack."""

    @staticmethod
    def find_spec(fullname: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if not fullname.startswith("detectron2."):
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is None:
            raise ModuleNotFoundError(absence_message(fullname), name=fullname)
        if isinstance(spec.loader, SourceFileLoader):
            spec.loader = _Loader(fullname, spec.loader.path)
        return spec
