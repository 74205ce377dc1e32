"""docs/loading.md: its commands run, and its JSON is read."""

from __future__ import annotations

import io
import re
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image

from detres.config import SourceConfig
from detres.data.dataset import load_dataset

PAGE = (Path(__file__).resolve().parents[1] / "docs/loading.md").read_text(encoding="utf-8")


def test_commands_run(run_guide, tmp_path, monkeypatch):
    monkeypatch.setattr("detres.engine.train.plot_curves", lambda *_, **options: None)
    short = ["train.steps=2", "train.batch_size=2", "train.reference_batch_size=2", "train.eval_every=2",
             "data.workers=1", "model.backbone.width=8", "model.fpn.channels=16", "model.box_head.fc_dim=16",
             "model.mask_head.channels=16", "model.rpn.post_nms_topk_test=5"]
    assert len(run_guide("docs/loading.md", short)) >= 4
    assert (tmp_path / "runs/sharded/results.json").is_file()
    assert len(list((tmp_path / "shards").glob("train-*.tar"))) > 1


def test_json_of_others(tmp_path):
    (text,) = re.findall(r"```json\n(.*?)```", PAGE, re.DOTALL)
    picture = io.BytesIO()
    Image.fromarray(np.zeros((480, 640, 3), np.uint8)).save(picture, "jpeg")
    with tarfile.open(tmp_path / "000000.tar", "w") as tar:
        for name, data in (("9.jpg", picture.getvalue()), ("9.json", text.encode())):
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    dataset = load_dataset(SourceConfig(path=str(tmp_path)), "train")
    (record,) = dataset.records
    assert dataset.classes == ("cat",) and record.id == 9 and record.annotations[0].box == (10.5, 20, 110.5, 70)
