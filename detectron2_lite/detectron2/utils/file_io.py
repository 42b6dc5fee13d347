"""Local files, http(s) addresses and detectron2:// names, opened in the same way."""

from typing import Any

from iopath.common.file_io import HTTPURLHandler, PathHandler
from iopath.common.file_io import PathManager as PathManagerBase

PathManager = PathManagerBase()


class Detectron2Handler(PathHandler):
    """Maps detectron2://NAME to Detectron2's download server, with a cache on disk."""

    PREFIX = "detectron2://"
    S3_DETECTRON2_PREFIX = "https://dl.fbaipublicfiles.com/detectron2/"

    def _get_supported_prefixes(self) -> list[str]:
        return [self.PREFIX]

    def _get_local_path(self, path: str, force: bool = False, **kwargs: Any) -> str:
        address = self.S3_DETECTRON2_PREFIX + path.removeprefix(self.PREFIX)
        return PathManager.get_local_path(address, force=force, **kwargs)

    def _open(self, path: str, mode: str = "r", buffering: int = -1, **kwargs: Any) -> Any:
        return PathManager.open(self._get_local_path(path), mode, buffering, **kwargs)


PathManager.register_handler(HTTPURLHandler())
PathManager.register_handler(Detectron2Handler())
__all__ = ["PathManager", "PathHandler"]
