"""Local files, http(s) addresses and detectron2:// names, opened in the same way."""

from typing import Any

from iopath.common.file_io import HTTPURLHandler, PathHandler
from iopath.common.file_io import PathManager as PathManagerBase

PathManager = PathManagerBase()


class Detectron2Handler(PathHandler):
    """Maps detectron2://NAME to Detectron2's download server, with a cache on disk."""

    def _get_supported_prefixes(self) -> list[str]:
        return ["detectron2://"]

    def _get_local_path(self, path: str, force: bool = False, **kwargs: Any) -> str:
        name = path.removeprefix("detectron2://")
        address = f"https://dl.fbaipublicfiles.com/detectron2/{name}"
        return PathManager.get_local_path(address, force=force, **kwargs)


PathManager.register_handler(HTTPURLHandler())
PathManager.register_handler(Detectron2Handler())
