"""Download COCO 2017 or PASCAL VOC, check them, and lay them out as the configs expect.

    python datasets/download.py coco              train2017, val2017, annotations: 20.4 GB into datasets/coco
    python datasets/download.py coco val2017 annotations
    python datasets/download.py voc               2007 trainval and test, 2012 trainval: 2.9 GB into datasets/VOCdevkit

Interrupted, it goes on where it was when started again: with the byte it stopped at, or with the archive that was not
unpacked yet. Archives are deleted once they are unpacked, unless --keep is given.
"""

from __future__ import annotations

import argparse
import hashlib
import http.client
import os
import shutil
import sys
import tarfile
import time
import urllib.error
import urllib.request
import zipfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from detres.cli import run_guarded
from detres.progress import track

CHUNK = 1 << 20  # bytes
ATTEMPTS = 8  # in a row without a byte


@dataclass(frozen=True)
class Archive:
    """`md5` and `size` are those published; `unpacked` is a little more than its content takes, in bytes. The files of
    `inner`, a folder in the archive, go to `folder`."""

    file: str
    urls: tuple[str, ...]
    md5: str
    size: int
    unpacked: int
    folder: str
    inner: str = ""


def _coco(name: str, path: str, md5: str, size: int, unpacked: int) -> Archive:
    hosts = "http://images.cocodataset.org", "https://s3.amazonaws.com/images.cocodataset.org"
    return Archive(f"{name}.zip", tuple(f"{host}/{path}/{name}.zip" for host in hosts), md5, size, unpacked, "coco")


def _voc(name: str, year: int, md5: str, size: int) -> Archive:
    hosts = (f"https://thor.robots.ox.ac.uk/pascal/VOC/voc{year}", f"http://host.robots.ox.ac.uk/pascal/VOC/voc{year}",
             "https://data.pjreddie.com/files")
    urls = tuple(f"{host}/{name}.tar" for host in hosts)
    return Archive(f"{name}.tar", urls, md5, size, size, "VOCdevkit", inner="VOCdevkit")


ARCHIVES = {
    "coco": {
        "annotations": _coco("annotations_trainval2017", "annotations", "f4bbac642086de4f52a3fdda2de5fa2c",
                             252_907_541, 900_000_000),
        "val2017": _coco("val2017", "zips", "442b8da7639aecaf257c1dceb8ba8c80", 815_585_330, 850_000_000),
        "train2017": _coco("train2017", "zips", "cced6f7f71b7629ddf16f17bbcfab6b2", 19_336_861_798, 20_000_000_000),
    },
    "voc": {
        "2007_trainval": _voc("VOCtrainval_06-Nov-2007", 2007, "c52e279531787c972589f7e41ab4ae64", 460_032_000),
        "2007_test": _voc("VOCtest_06-Nov-2007", 2007, "b6e924de25625d8de591ea690078ad9f", 451_020_800),
        "2012_trainval": _voc("VOCtrainval_11-May-2012", 2012, "6cd6e144f989b92b3379bac3b3de84fd", 1_999_639_040),
    },
}


class DownloadError(OSError):
    """Says what failed, where, and what to do."""


def get(archives: Iterable[Archive], out: Path, keep: bool = False) -> None:
    """Download, check and unpack what is not there yet.

    Raises DownloadError: too little space, no server that answers, or a file that is not the published one.
    """
    pending = [archive for archive in archives if not _marker(archive, out).exists()]
    _check_space(pending, out, keep)
    for archive in pending:
        path = out / archive.folder / archive.file
        if path.exists():
            check(archive, path)
        else:
            fetch(archive, path)
        unpack(archive, path, out / archive.folder)
        _marker(archive, out).touch()
        if not keep:
            path.unlink()
    print(f"complete: {', '.join(sorted({str(out / archive.folder) for archive in archives}))}")


def _marker(archive: Archive, out: Path) -> Path:
    return out / archive.folder / f".{archive.file}.unpacked"


def _check_space(pending: Sequence[Archive], out: Path, keep: bool) -> None:
    out.mkdir(parents=True, exist_ok=True)
    folders = [out / archive.folder for archive in pending]
    missing = [archive.size - max(_size(folder / archive.file), _size(_part(folder / archive.file)))
               for archive, folder in zip(pending, folders)]
    needed = sum(archive.unpacked for archive in pending) + (sum(missing) if keep else max(missing, default=0))
    free = shutil.disk_usage(out).free
    if needed > free:
        raise DownloadError(f"free space must be {needed / 1e9:.1f} GB, got {free / 1e9:.1f} GB ({out.resolve()}). "
                            "Give another place with --out.")


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _part(path: Path) -> Path:
    return path.with_name(f"{path.name}.part")


# ---- download ------------------------------------------------------------------------------------------------------


def fetch(archive: Archive, path: Path) -> None:
    """Download to `path`, which appears only when it is whole and its checksum right."""
    part = _part(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    failures = 0
    while _size(part) < archive.size:
        url = archive.urls[failures % len(archive.urls)]
        before = _size(part)
        problem = _continue(url, part, archive)
        failures = 0 if _size(part) > before else failures + 1
        if failures == ATTEMPTS:
            raise DownloadError(f"download must go on, got {problem} ({url}, after {_size(part)} bytes). Try again "
                                f"later: it goes on from there. Or put {archive.file} into {path.parent} yourself.")
        if problem and failures:
            print(f"{url}: {problem}; trying again", file=sys.stderr)
            time.sleep(min(2 ** (failures - 1), 30))
    try:
        check(archive, part)
    except DownloadError:
        part.unlink()
        raise
    os.replace(part, path)


def check(archive: Archive, path: Path) -> None:
    """Raises DownloadError if the file is not the published one."""
    found = _md5(path)
    if found != archive.md5:
        raise DownloadError(f"MD5 of {archive.file} must be {archive.md5}, got {found} ({path}). Delete it if it is "
                            "still there and start again, perhaps over another network.")


def _continue(url: str, part: Path, archive: Archive) -> str:
    """Append to `part` from where it ends; returns what went wrong, or nothing."""
    start = _size(part)
    request = urllib.request.Request(url, headers={"Range": f"bytes={start}-", "User-Agent": "detres"})
    try:
        with urllib.request.urlopen(request, timeout=30) as answer:
            partial = answer.status == 206
            whole = answer.headers.get("Content-Range" if partial else "Content-Length", "none").rpartition("/")[2]
            if whole != str(archive.size):
                return f"the server's file must have {archive.size} bytes, got {whole}"
            start = start if partial else 0  # not partial: the server sends all of it again
            with part.open("ab" if start else "wb") as file:
                chunks = track(iter(lambda: answer.read(CHUNK), b""), -(-(archive.size - start) // CHUNK),
                               archive.file, lambda _: 1, "MiB")
                for chunk in chunks:
                    file.write(chunk)
    except (OSError, http.client.HTTPException) as error:
        return str(error) or type(error).__name__
    return "" if _size(part) >= archive.size else "the connection ended early"


def _md5(path: Path) -> str:
    digest = hashlib.md5(usedforsecurity=False)
    with path.open("rb") as file:
        for chunk in track(iter(lambda: file.read(CHUNK), b""), -(-_size(path) // CHUNK), f"check {path.name}",
                           lambda _: 1, "MiB"):
            digest.update(chunk)
    return digest.hexdigest()


# ---- unpack --------------------------------------------------------------------------------------------------------


def unpack(archive: Archive, path: Path, folder: Path) -> None:
    """Unpack beside `folder`, then move the files into it, so that none is there in part."""
    temporary = folder / f".{archive.file}.unpacking"
    shutil.rmtree(temporary, ignore_errors=True)
    for _ in track(_extracted(path, temporary), _members(path), f"unpack {path.name}", lambda _: 1, "files"):
        pass
    for entry in sorted((temporary / archive.inner).iterdir()):
        _move(entry, folder / entry.name)
    shutil.rmtree(temporary)


def _members(path: Path) -> int:
    with _opened(path) as archive:
        return len(archive.infolist() if isinstance(archive, zipfile.ZipFile) else archive.getmembers())


def _extracted(path: Path, folder: Path) -> Iterator[None]:
    with _opened(path) as archive:
        if isinstance(archive, zipfile.ZipFile):
            for member in archive.infolist():
                yield archive.extract(member, folder)
        else:
            archive.extraction_filter = getattr(tarfile, "data_filter", None)  # Python < 3.10.12 has none
            for member in archive:
                yield archive.extract(member, folder)


def _opened(path: Path) -> zipfile.ZipFile | tarfile.TarFile:
    return zipfile.ZipFile(path) if path.suffix == ".zip" else tarfile.open(path)


def _move(source: Path, target: Path) -> None:
    """Into what is there: two archives of VOC share their folders."""
    if source.is_dir() and target.is_dir():
        for entry in source.iterdir():
            _move(entry, target / entry.name)
    else:
        os.replace(source, target)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset", choices=ARCHIVES)
    known = "; ".join(f"{name}: {', '.join(parts)}" for name, parts in ARCHIVES.items())
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"{known} (default: all)")
    parser.add_argument("--out", type=Path, default=Path(__file__).resolve().parent, metavar="DIR",
                        help="(default: the folder of this script)")
    parser.add_argument("--keep", action="store_true", help="keep the archives")
    args = parser.parse_args(argv)
    archives = ARCHIVES[args.dataset]
    for part in args.parts:
        if part not in archives:
            parser.error(f"PART must be one of {', '.join(archives)}, got '{part}'")
    return run_guarded(lambda: get([archives[part] for part in args.parts or archives], args.out, args.keep))


if __name__ == "__main__":
    sys.exit(main())
