"""Checkpoints by address: downloaded once, kept in a cache, and verified."""

from __future__ import annotations

import contextlib
import hashlib
import http.client
import logging
import os
import re
import time
from dataclasses import dataclass
from typing import Any
from urllib.parse import parse_qsl, urlencode, urlsplit

from detectron2.utils.file_io import PathManager
from iopath.common.file_io import get_cache_dir

from efficient_detr.checkpoint.files import DamagedCheckpointError, read_checkpoint
from efficient_detr.errors import UserError

logger = logging.getLogger(__name__)

_MATCHING = ("matching_heuristics", "True")
# What hosts add to links without any meaning for the file.
_MEANINGLESS = "download"

# As in names of torch.hub. Detectron2's own names end in six or nine decimal digits, and some in a
# date, so digits alone prove nothing.
_DIGEST_IN_NAME = re.compile(r"[-_](?=\d*[a-f])([0-9a-f]{8,64})\.\w+$")
_DIGEST_IN_FRAGMENT = re.compile(r"sha256=([0-9a-fA-F]{8,64})")
_BLOCK = 1 << 20
# Clocks of file systems are not those of the system.
_CLOCK_SECONDS = 1.0


@dataclass(frozen=True)
class Address:
    """An address of a checkpoint.

    Attributes:
        url: where the file is, without anything that says how to take it.
        matching: whether Detectron2 is asked to match weights by the ends of their names.
        digest: first digits of the file's SHA-256, '' if unknown.
    """

    url: str
    matching: bool = False
    digest: str = ""

    @property
    def name(self) -> str:
        """Name of the file."""
        return self.url.rpartition("/")[2]


def is_address(path: str) -> bool:
    """Whether a path is an address such as https://... or detectron2://..."""
    return "://" in path


def parse_address(text: str) -> Address:
    """Take an address apart.

    Args:
        text: the address of a file, for which its name may hold the first digits of its SHA-256
            before the ending, after a dash or an underscore (``detr-r50-e632da11.pth``). It may be
            followed by ``?matching_heuristics=True`` and by ``#sha256=`` with 8 to 64 digits.

    Raises:
        UserError: if something else follows, or there is no file name.
    """
    parts = urlsplit(text)
    if parts.scheme == "file":
        raise UserError(
            f"{text} is a file of this machine: give its path without file://. Addresses may begin "
            "with https://, http:// or detectron2://."
        )
    queries = parse_qsl(parts.query, keep_blank_values=True)
    unknown = [pair for pair in queries if pair != _MATCHING and pair[0] != _MEANINGLESS]
    if unknown:
        raise UserError(
            f"The address {text} ends in ?{urlencode(unknown)}, which has no meaning here: "
            "download the file yourself and give its path."
        )
    digest = _DIGEST_IN_FRAGMENT.fullmatch(parts.fragment)
    if parts.fragment and digest is None:
        raise UserError(
            f"The address {text} ends in #{parts.fragment}: only #sha256= with 8 to 64 digits of "
            "the file's SHA-256 may follow."
        )
    url = f"{parts.scheme}://{parts.netloc}{parts.path}"
    address = Address(url, _MATCHING in queries, digest[1].lower() if digest else "")
    if not parts.netloc or not address.name or not parts.path:
        raise UserError(
            f"The address {text} names no file: give one such as https://host/folder/weights.pth, "
            "http://... or detectron2://..."
        )
    named = _DIGEST_IN_NAME.search(address.name)
    return address if digest or named is None else Address(url, address.matching, named[1])


def download(address: Address) -> str:
    """Get the file behind an address from Detectron2's cache, or into it.

    The cache is the folder that the environment variable FVCORE_CACHE names, or
    ``~/.torch/iopath_cache``. A download that breaks off leaves no file there. A progress bar shows
    how far it is.

    Args:
        address: of the file; its digest is compared with the file, also with one in the cache.

    Returns:
        Path of the file.

    Raises:
        UserError: if it cannot be downloaded, or is another file than the digest says; then it is
            deleted.
    """
    started = time.time()
    try:
        path = str(PathManager.get_local_path(address.url, **_own_folder(address)))
    except (OSError, http.client.HTTPException, ValueError, AssertionError) as error:
        reason = " ".join(str(error).split()).rstrip(".") or type(error).__name__
        raise UserError(
            f"{address.url} cannot be downloaded ({reason}): check the address and the connection, "
            "or give the path of a file that you downloaded elsewhere."
        ) from error
    if not os.path.isfile(path):
        raise UserError(
            f"{address.url} cannot be downloaded, because nothing here knows such addresses: use "
            "https://, http:// or detectron2://."
        )
    if os.path.getmtime(path) < started - _CLOCK_SECONDS:
        logger.info("%s is taken from the cache: %s", address.url, path)
    if address.digest:
        _verify(address, path)
    return path


def read_download(path: str, name: str) -> dict[str, Any]:
    """Read a file that `download` returned, and delete it if it is damaged.

    It may be half a file, or a page that says why there is none.

    Args:
        path: the file.
        name: what messages call it, such as its address.

    Returns:
        As `read_checkpoint`.

    Raises:
        DamagedCheckpointError: if it cannot be read; the next download gets it anew.
        UserError: if it holds code, or no weights.
    """
    try:
        return read_checkpoint(path, name)
    except DamagedCheckpointError:
        _discard(path)
        raise


def _discard(path: str) -> None:
    # Another process may have been faster.
    with contextlib.suppress(FileNotFoundError):
        os.remove(path)
    logger.warning("%s was deleted from the cache.", path)


def _own_folder(address: Address) -> dict[str, str]:
    """A part of the cache for each host: the cache itself only looks at the path on the host."""
    parts = urlsplit(address.url)
    if parts.scheme not in ("http", "https"):
        return {}
    return {"cache_dir": os.path.join(get_cache_dir(), parts.netloc.replace(":", "_"))}


def _verify(address: Address, path: str) -> None:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    found = digest.hexdigest()
    if found.startswith(address.digest):
        logger.info("The SHA-256 of %s begins with %s, as it should.", path, address.digest)
        return
    _discard(path)
    raise UserError(
        f"The file at {address.url} is not the one that its address promises, but damaged or "
        f"tampered with, and was deleted: its SHA-256 is {found} and does not begin with "
        f"{address.digest}; try again, or ask its authors."
    )
