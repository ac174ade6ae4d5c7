"""A small evaluated world on disk, and what a report shows of it, without any model."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np

from scripts.report import main
from tests.data_builders import write_world
from utils.report.media import gallery_data, gallery_rows
from utils.report.runs import Evaluation, PredictedRow
from utils.results import encode_masks

EVIL = "</script><script>alert('x')</script> & \"quotes\" <img src=x onerror=alert(1)>"
CLIPS = 4
SIZE = (48, 64)
ROWS = tuple(
    (f"clip{i}_0_10000", f"clip{i}_0_10000_{name}_{k}", split, k - 1, f"The {name} number {k}")
    for i in range(CLIPS)
    for split, name in (("test_s", "dog") if i < CLIPS // 2 else ("test_u", "hair-dryer"),)
    for k in (1, 2)
) + (("clip0_0_10000", "null_m-clip0_0_10000_null_1", "test_n", 0, EVIL),)


def make_world(root: Path) -> Path:
    """Four clips of two objects each and a null row, in the official layout."""
    return write_world(root, ROWS, size=SIZE, frames=10, seconds=2.0)


def line(row: int, **changes: Any) -> dict[str, Any]:
    """One line of predictions.jsonl."""
    _, uid, split, _, reference = ROWS[row]
    clip, name, _ = uid.rsplit("_", 2)
    masks = np.zeros((10, *SIZE), bool)
    masks[:, 10:30, row : row + 20] = True
    scores = {"S": 12.5} if name == "null" else {"J": 50.0 + row, "F": 60.0 + row}
    said = f"The images show a {name}. In the audio I hear it. The reference is it. The target is {name}. It is [SEG]."
    return {
        "row": row, "uid": uid, "split": split, "reference": reference, "kind": "" if name == "null" else "visual",
        "class_name": name, "reasoning": said, "answer_class": name, "has_seg": True, "well_formed": True,
        "faithful": row % 2 == 0, **scores, "video": clip, "audio": clip, "masks": encode_masks(masks), **changes,
    }  # fmt: skip


def group(n: int, **scores: float) -> dict[str, Any]:
    inner = {**scores, "n": n}
    return {"n": n, "class_accuracy": 90.0, "format_share": 100.0, "faithful": 50.0, "faithful_n": n,
            "official": inner, "per_expression": inner}


def write_evaluation(
    folder: Path, root: Path, changes: dict[int, dict[str, Any]] | None = None, **facts: Any
) -> Path:
    """metrics.json and predictions.jsonl of all three splits; `changes` replaces fields of single rows."""
    for split in ("test_s", "test_u", "test_n"):
        lines = [line(i, **(changes or {}).get(i, {})) for i, row in enumerate(ROWS) if row[2] == split]
        found = {"S": 12.5} if split == "test_n" else {"J": 55.0, "F": 65.0, "J&F": 60.0}
        scores = group(len(lines), **found)
        kinds = {} if split == "test_n" else {"visual": scores}
        metrics = {
            "split": split, "identity": "abc", "protocols": ["official", "per_expression"], "rows": len(lines),
            "checkpoint_sha256": "c0", "stage": "sft", "answers": "generated", "probe": "none",
            "files": {"metadata.csv": "x"}, "git": "abc",
            "config": {"data": {"root": str(root), "answer": "reasoning", "num_frames": None}},
            "scores": {**scores, "failed": [], "kinds": kinds, "classes": {}}, **facts,
        }  # fmt: skip
        (folder / split).mkdir(parents=True)
        (folder / split / "metrics.json").write_text(json.dumps(metrics), encoding="utf-8")
        text = "".join(json.dumps(record) + "\n" for record in lines)
        (folder / split / "predictions.jsonl").write_text(text, encoding="utf-8")
    return folder


def write_run(folder: Path, root: Path) -> Path:
    """A run with a teacher, an SFT, a probe of it, a curve and a failure taxonomy."""
    write_evaluation(folder / "eval_teacher", root, {0: {"J": 90.0, "F": 98.0}}, stage="teacher", checkpoint_sha256="t")
    hostile = {"reasoning": EVIL, "answer_class": EVIL, "J": 5.0, "F": 9.0}
    write_evaluation(folder / "eval_sft", root, {1: hostile, 2: {"J": 80.0, "F": 88.0}})
    silent = {i: {"J": 1.0, "F": 2.0, "audio": f"{i}#silent"} for i in range(8)}
    write_evaluation(folder / "eval_sft_zero", root, silent, probe="zero_audio")
    (folder / "sft").mkdir()
    (folder / "sft/metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "loss": 1.0}\n')
    (folder / "types.jsonl").write_text(json.dumps({"row": 1, "type": "audio_perception"}) + "\n")
    (folder / "types.jsonl.csv").write_text(
        "type,family,count,percent,paper_count,paper_percent\naudio_perception,Perceptual Failure,1,100.0,251,16.68\n"
    )
    return folder


class Reader(HTMLParser):
    """Collects elements, addresses and text of a page, and checks that elements are closed in order."""

    VOID = {"meta", "img", "line", "polyline", "br", "input", "rect", "path"}

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.addresses: list[str] = []
        self.text: list[str] = []
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None], tuple[str, ...]]] = []
        """(tag, attributes, elements around it)."""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.addresses += [value for name, value in attrs if name in ("src", "href", "srcset", "data") and value]
        self.elements.append((tag, dict(attrs), tuple(self.open)))
        assert not any(name.startswith("on") for name, _ in attrs)
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def read_page(page: str) -> Reader:
    """A page's elements, all of which are closed."""
    reader = Reader()
    reader.feed(page)
    assert reader.open == []
    return reader


def gallery(page: str) -> dict[str, Any]:
    """The data of a page's gallery."""
    return json.loads(re.search(r'<script type="application/json" id="gallery">(.*?)</script>', page, re.S)[1])


def section(page: str, anchor: str) -> str:
    """The words of a section of a page; empty if it has none."""
    found = re.search(rf'<h2 id="{anchor}">.*?</section>', page, re.S)
    return " ".join(read_page(found[0].removesuffix("</section>")).text) if found else ""


def report(*arguments: str | Path, out: Path) -> str:
    """The page that scripts/report.py writes."""
    assert main([*map(str, arguments), "--out", str(out)]) == 0
    return out.read_text(encoding="utf-8")


def many_clips(folder: Path) -> dict[str, Any]:
    """The gallery's data of as many rows as test_s and test_u of Ref-AVS have."""
    rows = [PredictedRow.from_json({**line(i % 8), "row": i}) for i in range(2288)]
    evaluation = Evaluation("sft", folder, {"test_s": {}}, {row.row: row for row in rows})
    return gallery_data([evaluation], gallery_rows([evaluation], list(evaluation.rows)))
