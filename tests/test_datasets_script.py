"""datasets/download.py against a server that breaks off, forgets, and lies."""

from __future__ import annotations

import hashlib
import importlib.util
import io
import os
import shutil
import sys
import tarfile
import threading
import zipfile
from collections import namedtuple
from dataclasses import replace
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[1] / "datasets" / "download.py"
CONTENT = os.urandom(5_000_000)


def _module():
    spec = importlib.util.spec_from_file_location("detres_download", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


download = _module()


class Server:
    """Serves `files`; `cut` bytes of an answer are sent before the connection breaks (each entry once)."""

    def __init__(self, files: dict[str, bytes]):
        self.files, self.cut, self.ranges, self.knows_ranges = files, [], [], True
        self.http = ThreadingHTTPServer(("127.0.0.1", 0), partial(_Handler, self))
        self.url = f"http://127.0.0.1:{self.http.server_port}"
        threading.Thread(target=self.http.serve_forever, args=(0.01,), daemon=True).start()


class _Handler(BaseHTTPRequestHandler):
    def __init__(self, server: Server, *args):
        self.about = server
        super().__init__(*args)

    def do_GET(self):
        data = self.about.files.get(self.path[1:])
        if data is None:
            self.send_error(404)
            return
        start = int(self.headers["Range"].removeprefix("bytes=").removesuffix("-"))
        self.about.ranges.append(start)
        start = start if self.about.knows_ranges else 0
        self.send_response(206 if self.about.knows_ranges else 200)
        if self.about.knows_ranges:
            self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        self.send_header("Content-Length", str(len(data) - start))
        self.end_headers()
        self.wfile.write(data[start:start + (self.about.cut.pop(0) if self.about.cut else len(data))])

    def log_message(self, *_):
        pass


def _zip(files: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return buffer.getvalue()


def _tar(files: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr(download.time, "sleep", lambda _: None)
    server = Server({"val2017.zip": _zip({"val2017/1.jpg": CONTENT, "val2017/2.jpg": b"two"})})
    yield server
    server.http.shutdown()
    server.http.server_close()


def _archive(server: Server, file: str = "val2017.zip", folder: str = "coco", inner: str = ""):
    data, urls = server.files[file], (f"{server.url}/{file}",)
    return download.Archive(file, urls, hashlib.md5(data).hexdigest(), len(data), len(data), folder, inner)


def test_goes_on_after_broken_connections(server, tmp_path):
    server.cut = [1_500_000, 2_000_000]
    download.get([_archive(server)], tmp_path)
    assert server.ranges == [0, 1_500_000, 3_500_000]
    assert (tmp_path / "coco/val2017/1.jpg").read_bytes() == CONTENT
    assert sorted(p.name for p in (tmp_path / "coco").iterdir()) == [".val2017.zip.unpacked", "val2017"]


def test_goes_on_with_what_an_earlier_run_left(server, tmp_path):
    (tmp_path / "coco").mkdir()
    (tmp_path / "coco/val2017.zip.part").write_bytes(server.files["val2017.zip"][:1234])
    download.get([_archive(server)], tmp_path)
    assert server.ranges == [1234] and (tmp_path / "coco/val2017/1.jpg").read_bytes() == CONTENT


def test_second_run_asks_for_nothing(server, tmp_path):
    download.get([_archive(server)], tmp_path)
    download.get([_archive(server)], tmp_path)
    assert server.ranges == [0]


def test_server_without_ranges_sends_all_again(server, tmp_path):
    server.cut, server.knows_ranges = [1_000_000], False
    download.get([_archive(server)], tmp_path)
    assert len(server.ranges) == 2 and (tmp_path / "coco/val2017/1.jpg").read_bytes() == CONTENT


def test_wrong_checksum_unpacks_nothing(server, tmp_path):
    with pytest.raises(download.DownloadError, match="MD5 of val2017.zip must be 0, got .*Delete it"):
        download.get([replace(_archive(server), md5="0")], tmp_path)
    assert list((tmp_path / "coco").iterdir()) == []


def test_archive_put_there_by_hand_is_checked_and_kept_if_wrong(server, tmp_path):
    (tmp_path / "coco").mkdir()
    own = tmp_path / "coco/val2017.zip"
    own.write_bytes(b"not a zip")
    with pytest.raises(download.DownloadError, match="MD5"):
        download.get([_archive(server)], tmp_path)
    assert own.exists()
    own.write_bytes(server.files["val2017.zip"])
    download.get([_archive(server)], tmp_path, keep=True)
    assert server.ranges == [] and own.exists() and (tmp_path / "coco/val2017/2.jpg").read_bytes() == b"two"


def test_mirror_is_tried_and_a_wrong_page_refused(server, tmp_path, capsys):
    archive = _archive(server)
    server.files["login.html"] = b"<html>pay for the network first</html>"
    urls = (f"{server.url}/missing", f"{server.url}/login.html", *archive.urls)
    download.get([replace(archive, urls=urls)], tmp_path)
    assert (tmp_path / "coco/val2017/1.jpg").read_bytes() == CONTENT
    told = capsys.readouterr().err
    assert "404" in told and f"must have {archive.size} bytes, got 38" in told


def test_gives_up_with_a_clear_message(server, tmp_path):
    archive = replace(_archive(server), urls=(f"{server.url}/missing",))
    with pytest.raises(download.DownloadError, match="404.*goes on from there"):
        download.get([archive], tmp_path)


def test_too_little_space_is_said_before_the_first_byte(server, tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")(0, 0, 9_000_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(download.DownloadError, match=r"free space must be 0\.0 GB.*--out"):
        download.get([_archive(server)], tmp_path)
    assert server.ranges == []
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=11_000_000))
    download.get([_archive(server)], tmp_path)


def test_archives_of_voc_join_and_an_interrupted_unpacking_is_done_again(server, tmp_path):
    server.files = {"train.tar": _tar({"VOCdevkit/VOC2007/JPEGImages/1.jpg": b"1", "VOCdevkit/VOC2007/a.txt": b"a"}),
                    "test.tar": _tar({"VOCdevkit/VOC2007/JPEGImages/2.jpg": b"2"})}
    half_done = tmp_path / "VOCdevkit/.test.tar.unpacking/VOCdevkit/VOC2007/JPEGImages"
    half_done.mkdir(parents=True)
    (half_done / "2.jpg").write_bytes(b"")
    (half_done / "of_an_older_version.jpg").write_bytes(b"old")
    (tmp_path / "VOCdevkit/test.tar").write_bytes(server.files["test.tar"])
    download.get([_archive(server, name, "VOCdevkit", "VOCdevkit") for name in ("train.tar", "test.tar")], tmp_path)
    folder = tmp_path / "VOCdevkit/VOC2007"
    found = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert found == {"JPEGImages/1.jpg": b"1", "JPEGImages/2.jpg": b"2", "a.txt": b"a"}
    assert server.ranges == [0]


def test_command_line(server, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(download.ARCHIVES, "coco", {"val2017": _archive(server)})
    assert download.main(["coco", "val2017", "--out", str(tmp_path)]) == 0
    assert str(tmp_path / "coco") in capsys.readouterr().out
    with pytest.raises(SystemExit, match="2"):
        download.main(["coco", "val2018", "--out", str(tmp_path)])
    assert "PART must be one of val2017, got 'val2018'" in capsys.readouterr().err
    monkeypatch.setitem(download.ARCHIVES, "coco", {"val2017": replace(_archive(server), file="other.zip", md5="0")})
    assert download.main(["coco", "--out", str(tmp_path)]) == 1
    assert "detres: error: MD5 of other.zip" in capsys.readouterr().err


def test_readme_tells_the_same_checksums():
    readme = (SCRIPT.parent / "README.md").read_text()
    for archive in (archive for parts in download.ARCHIVES.values() for archive in parts.values()):
        row = next(line for line in readme.splitlines() if line.startswith(f"| [{archive.file}]"))
        assert f"| {archive.size} | {archive.md5} |" in row and any(f"({url})" in row for url in archive.urls)
