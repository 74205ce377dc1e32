"""How fast a large COCO file is there for training, the first time and the next, and what a worker process keeps of it.

    python benchmarks/start.py instances_train2017.json --images train2017 --repeat 1

`--repeat N` takes images and annotations of the file N times over, with new ids, to have the size of train2017 from a
part of it. Each start is a process of its own with an empty cache folder before the first; time is without imports.
Then the processes of a loader are played: one that is forked and looks at all records in random order, once an epoch;
of its memory, what it does not share with the others (Private_Dirty of /proc/self/smaps_rollup), for records as they
are and for a tuple of objects.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from detres.config import DataConfig, InputConfig, SourceConfig
from detres.data.dataset import load_dataset
from detres.data.loader import build_loader


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("file", type=Path)
    parser.add_argument("--images", required=True)
    parser.add_argument("--repeat", type=int, default=1)
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        return start(args)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / args.file.name
        repeat(args.file, file, args.repeat)
        os.environ["DETRES_CACHE"] = f"{folder}/cache"
        print(f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}; "
              f"{file.stat().st_size / 1e6:.0f} MB\n")
        print("| start | seconds to the data set | to the loader | peak GiB |\n|---|---|---|---|")
        time.sleep(3)  # a file just written is not kept
        for name in ("first", "second", "third"):
            row = subprocess.run([sys.executable, __file__, str(file), "--images", args.images, "--one"], text=True,
                                 stdout=subprocess.PIPE, check=True).stdout
            print(f"| {name} | {row.strip()} |")
        memory(file, args.images)


def repeat(source: Path, target: Path, times: int) -> None:
    content = json.loads(source.read_text())
    images, annotations = content["images"], content["annotations"]
    most, more = (max(entry["id"] for entry in entries) + 1 for entries in (images, annotations))
    content["images"] = [{**entry, "id": entry["id"] + most * i} for i in range(times) for entry in images]
    content["annotations"] = [{**entry, "id": entry["id"] + more * i, "image_id": entry["image_id"] + most * i}
                              for i in range(times) for entry in annotations]
    target.write_text(json.dumps(content))


def load(file: Path, images: str):
    return load_dataset(SourceConfig(path=str(file), images=images), "train")


def start(args: argparse.Namespace) -> None:
    begin = time.perf_counter()
    dataset = load(args.file, args.images)
    read = time.perf_counter()
    build_loader(dataset, InputConfig(), DataConfig(skip_empty=True), batch_size=16, training=True, with_masks=True)
    peak = kilobytes("/proc/self/status", "VmHWM") / 2**20
    print(f"{read - begin:.2f} | {time.perf_counter() - begin:.2f} | {peak:.2f}")


def memory(file: Path, images: str) -> None:
    records = load(file, images).records
    begin = time.perf_counter()
    for _ in records:
        pass
    each = (time.perf_counter() - begin) / len(records)
    objects = tuple(records)
    print(f"\n{len(records)} images, {len(records.annotations)} annotations; {each * 1e6:.0f} us to make a record\n")
    print("| MB of its own after epoch | 1 | 2 | 3 |\n|---|---|---|---|")
    for name, kind in (("records", records), ("a tuple", objects)):
        print(f"| {name} | " + " | ".join(f"{byte / 1e6:.0f}" for byte in private_growth(kind)) + " |")


def private() -> int:
    return kilobytes("/proc/self/smaps_rollup", "Private_Dirty") * 1024


def kilobytes(file: str, name: str) -> int:
    return next(int(line.split()[1]) for line in Path(file).read_text().splitlines() if line.startswith(name))


def private_growth(records) -> list[int]:
    read, write = os.pipe()
    if (child := os.fork()) == 0:
        before, told = private(), []
        for epoch in range(3):
            for number in np.random.default_rng(epoch).permutation(len(records)).tolist():
                sum(item.label for item in records[number].annotations)
            told.append(private() - before)
        os.write(write, json.dumps(told).encode())
        os._exit(0)
    os.close(write)
    os.waitpid(child, 0)
    with os.fdopen(read) as pipe:
        return json.loads(pipe.read())


if __name__ == "__main__":
    main()
