"""Checkpoints by address, from a server on this machine."""

from __future__ import annotations

import contextlib
import hashlib
import io
import logging
import os
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from torch import nn

from efficient_detr.checkpoint.downloads import Address, download, is_address, parse_address
from efficient_detr.engine.checkpointer import AtomicCheckpointer
from efficient_detr.errors import UserError


class Server(ThreadingHTTPServer):
    """Serves bytes by name and counts how often it is asked.

    Attributes:
        files: path -> content.
        asked: the paths of all requests.
        cut: whether connections end after half a file.
    """

    files: dict[str, bytes]
    asked: list[str]
    cut = False

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.files, self.asked = {}, []

    def add(self, name: str, content: bytes) -> str:
        """The address of a new file."""
        self.files[f"/{name}"] = content
        return f"http://127.0.0.1:{self.server_port}/{name}"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        self.server.asked.append(self.path)
        content = self.server.files.get(self.path)
        if content is None:
            self.send_error(404)
            return
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content[: len(content) // 2] if self.server.cut else content)

    def log_message(self, *_: object) -> None:
        """Nothing to the terminal."""


@contextlib.contextmanager
def running() -> Iterator[Server]:
    with Server() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


@pytest.fixture
def server() -> Iterator[Server]:
    with running() as server:
        yield server


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, and no proxy between this machine and itself."""
    monkeypatch.setenv("FVCORE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    return tmp_path / "cache"


def saved(model: nn.Module) -> bytes:
    buffer = io.BytesIO()
    torch.save({"model": model.state_dict()}, buffer)
    return buffer.getvalue()


def files(folder: Path) -> list[str]:
    """Names of the files below a folder, apart from locks."""
    names = [path.name for path in folder.rglob("*") if path.is_file()]
    return [name for name in names if not name.endswith(".lock")]


@pytest.mark.parametrize("query", ["", "?download=true", "?matching_heuristics=True"])
def test_a_model_by_address(server: Server, cache: Path, query: str) -> None:
    source, model = nn.Linear(3, 2), nn.Linear(3, 2)
    content = saved(source)
    digest = hashlib.sha256(content).hexdigest()
    address = server.add(f"linear-{digest[:8]}.pth", content)
    AtomicCheckpointer(model).load(f"{address}{query}#sha256={digest}")
    assert torch.equal(model.weight, source.weight)
    assert files(cache) == [f"linear-{digest[:8]}.pth"]


def test_the_second_time_it_comes_from_the_cache(
    server: Server, cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    address = server.add("linear.pth", saved(nn.Linear(3, 2)))
    with caplog.at_level(logging.INFO):
        path = download(parse_address(address))
        assert "from the cache" not in caplog.text
        os.utime(path, (1e9, 1e9))
        assert download(parse_address(address)) == path
    assert f"{address} is taken from the cache: {path}" in caplog.text
    assert server.asked == ["/linear.pth"]
    assert str(cache) in path


def test_equal_paths_on_two_servers(server: Server) -> None:
    first = download(parse_address(server.add("linear.pth", b"first")))
    with running() as other:
        second = download(parse_address(other.add("linear.pth", b"second")))
    assert Path(first).read_bytes() == b"first"
    assert Path(second).read_bytes() == b"second"


@pytest.mark.parametrize("where", ["name", "fragment"])
def test_another_file_than_the_digest_says_is_deleted(
    server: Server, cache: Path, where: str
) -> None:
    content = saved(nn.Linear(3, 2))
    name = "linear-deadbeef.pth" if where == "name" else "linear.pth"
    address = server.add(name, content)
    fragment = "" if where == "name" else "#sha256=deadbeef"
    digest = hashlib.sha256(content).hexdigest()
    with pytest.raises(UserError, match=f"not the one.*deleted.*{digest}") as error:
        AtomicCheckpointer(nn.Linear(3, 2)).load(address + fragment)
    assert "\n" not in str(error.value)
    assert address in str(error.value)
    assert files(cache) == []
    # No advice to trust it all the same.
    assert f"sha256={digest[:8]}" not in str(error.value)
    # A digest in the fragment counts more than the name.
    assert os.path.isfile(download(parse_address(f"{address}#sha256={digest[:8]}")))


def test_a_download_that_breaks_off_leaves_nothing(server: Server, cache: Path) -> None:
    source, model = nn.Linear(3, 2), nn.Linear(3, 2)
    address = server.add("linear.pth", saved(source))
    server.cut = True
    with pytest.raises(UserError, match=r"linear\.pth cannot be downloaded") as error:
        AtomicCheckpointer(model).load(address)
    assert "\n" not in str(error.value)
    assert files(cache) == []
    server.cut = False
    AtomicCheckpointer(model).load(address)
    assert torch.equal(model.weight, source.weight)


@pytest.mark.parametrize("content", [b"<html>Sign in to continue</html>", b"PK", b"\x80"])
def test_what_cannot_be_read_does_not_stay(server: Server, cache: Path, content: bytes) -> None:
    address = server.add("linear.pth", content)
    with pytest.raises(UserError, match="cannot be loaded") as error:
        AtomicCheckpointer(nn.Linear(3, 2)).load(address)
    assert address in str(error.value)
    assert files(cache) == []


def test_damaged_values_do_not_stay(server: Server, cache: Path) -> None:
    source = nn.Linear(64, 64)
    content = saved(source)
    values = source.weight.detach().numpy().tobytes()
    assert content.count(values) == 1
    address = server.add("linear.pth", content.replace(values, values[:-4] + b"\x01\x02\x03\x04"))
    with pytest.raises(UserError, match="Bad CRC-32"):
        AtomicCheckpointer(nn.Linear(64, 64)).load(address)
    assert files(cache) == []


def test_no_such_file(server: Server) -> None:
    address = server.add("a.pth", b"").replace("/a.pth", "/b.pth")
    with pytest.raises(UserError, match=r"b\.pth cannot be downloaded .*404"):
        AtomicCheckpointer(nn.Linear(3, 2)).load(address)


def test_no_such_server() -> None:
    # Nothing can listen on port 0.
    with pytest.raises(UserError, match=r"^http://127.0.0.1:0/a\.pth cannot be downloaded"):
        download(parse_address("http://127.0.0.1:0/a.pth"))


@pytest.mark.parametrize(
    ("name", "digest"),
    [
        ("detr-r50-e632da11.pth", "e632da11"),
        ("swin_t-704ceda3.pth", "704ceda3"),
        ("detr_r50_20210419_220030-a12b9512.pth", "a12b9512"),
        (f"model_{'0a' * 32}.safetensors", "0a" * 32),
        ("model_final_280758.pkl", ""),
        ("model_final_997cc7.pkl", ""),
        ("deformable_detr_20220815.pth", ""),
        ("checkpoint0011.pth", ""),
        ("dino-E632DA11.pth", ""),
        ("e632da11.pth", ""),
    ],
)
def test_digests_in_names(name: str, digest: str) -> None:
    assert parse_address(f"https://host/folder/{name}").digest == digest


def test_parts_of_an_address() -> None:
    text = "detectron2://Folder/a-e632da11.pkl?matching_heuristics=True#sha256=0123456789ABCDEF"
    url = "detectron2://Folder/a-e632da11.pkl"
    assert parse_address(text) == Address(url, matching=True, digest="0123456789abcdef")
    assert is_address(text)
    assert not is_address("folder/a.pth")


@pytest.mark.parametrize(
    ("address", "match"),
    [
        ("https://host/a.pth#md5=0123456789", "#md5=0123456789: only #sha256="),
        ("https://host/a.pth#sha256=0123456", "8 to 64"),
        ("https://host/a.pth?token=1", r"\?token=1, which has no meaning"),
        ("https://host/", "names no file"),
        ("https:///a.pth", "names no file"),
        ("https://host", "names no file: give one such as https://"),
        ("file:///folder/a.pth", "without file://"),
    ],
)
def test_addresses_that_are_none(address: str, match: str) -> None:
    with pytest.raises(UserError, match=match):
        parse_address(address)


def test_an_unknown_kind_of_address() -> None:
    with pytest.raises(UserError, match="nothing here knows such addresses"):
        download(parse_address("gopher://host/a.pth"))
