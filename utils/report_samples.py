"""What a run of stage 3 sampled, group by group: rewards, advantages, words and masks, from samples.jsonl."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from utils.errors import DataError
from utils.report_tables import HtmlWords, note, table
from utils.results import decode_masks

GROUPS = 3
"""Groups shown of the first logged step and of the last."""
HEIGHT = 36
"""Of a frame's mask in pixels."""


def read_groups(folder: Path) -> list[list[dict[str, Any]]]:
    """The first groups of the first and of the last step in folder/samples.jsonl; none without sampled answers.

    Raises:
        DataError: a line other than the last is no record.
    """
    path = folder / "samples.jsonl"
    if not path.is_file():
        return []
    lines, records = path.read_text(encoding="utf-8").split("\n"), []
    for number, text in enumerate(lines[:-1], 1):
        try:
            record = json.loads(text)
            step = int(record["step"])
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(f"{path}, line {number}: is no record ({error!r}). Remedy: remove the line") from error
        if "rewards" in record:  # other stages log greedy answers
            records.append((step, record))
    if not records:
        return []
    chosen = []
    for step in sorted({records[0][0], records[-1][0]}):
        groups: list[list[dict[str, Any]]] = []
        for record in (r for s, r in records if s == step):
            if record["sample"] == 0:
                groups.append([])
            groups[-1].append(record)
        chosen += groups[:GROUPS]
    return chosen


def samples_section(runs: Mapping[str, Sequence[Sequence[Mapping[str, Any]]]]) -> str:
    """One folded table per group; empty without any.

    Args:
        runs: name of a run -> its `read_groups`.
    """
    shown = [_group(name, group) for name, groups in runs.items() for group in groups]
    words = (
        "Answers that training drew, with their rewards. Masks: prediction per frame; * marks answers whose masks were "
        "trained."
    )
    return note(words) + "".join(shown) if shown else ""


def _group(run: str, group: Sequence[Mapping[str, Any]]) -> str:
    first = group[0]
    names = list(first["rewards"])
    header = ["answer", *names, "reward", "advantage", "tokens", "says"]
    rows = [
        [
            f"{one['sample'] + 1}{'*' if one['mask_trained'] else ''}",
            *[f"{one['rewards'][name]:.2f}" for name in names],
            f"{one['reward']:.2f}",
            f"{one['advantage']:+.2f}",
            f"{one['tokens']}{' (cut)' if one['truncated'] else ''}",
            HtmlWords(f"{escape(one['answer'])}<br>{_strip(one)}"),
        ]
        for one in group
    ]
    title = f"{run}, step {first['step']}: {first['reference']} ({first['class_name']}, row {first['row']})"
    return f"<details><summary>{escape(title)}</summary>{table(title, header, rows)}</details>"


def _strip(one: Mapping[str, Any]) -> str:
    """The masks of an answer side by side, white on black, inside the page."""
    if not one["masks"]:
        return "no masks"
    masks = decode_masks(one["masks"])
    width = max(1, round(HEIGHT * masks.shape[2] / masks.shape[1]))
    frames = [cv2.resize(m.astype(np.uint8) * 255, (width, HEIGHT), interpolation=cv2.INTER_AREA) for m in masks]
    edged = [cv2.copyMakeBorder(f, 0, 0, 0, 2, cv2.BORDER_CONSTANT, value=128) for f in frames]
    picture = base64.b64encode(cv2.imencode(".png", np.concatenate(edged, axis=1))[1].tobytes()).decode()
    label = escape(f"masks of answer {one['sample'] + 1}, IoU {one['iou']:.2f}")
    return f'<img alt="{label}" src="data:image/png;base64,{picture}">'
