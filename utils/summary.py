"""metrics.json of many evaluations -> one summary, and predictions.jsonl -> the clips of a report."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import soundfile

from utils.curves import charts_of_runs
from utils.report import Clip, render_page
from utils.results import write_bytes
from utils.tables import format_table, mix_scores

CURVES = ("loss", "ce_loss", "mask_loss", "mask_bce_loss", "mask_dice_loss", "distill_loss", "lr", "grad_norm")
"""Scalars of metrics.jsonl that are drawn, where a run has them."""

_SHARES = ("class_accuracy", "format_share", "faithful")


def stage_summary(folder: Path) -> dict[str, Any]:
    """What one evaluation found, all in percent.

    Args:
        folder: of the evaluation, with <split>/metrics.json.

    Returns:
        Per split J, F, J&F (or S) under protocol official, n, shares and "per_expression" with the same; `mix`, the
        mean of test_s and test_u; `kinds` and the shares of test_s at the top; `answers`, whether they were generated
        or given.
    """
    summary: dict[str, Any] = {}
    for path in sorted(folder.glob("*/metrics.json")):
        metrics = json.loads(path.read_text(encoding="utf-8"))
        scores = metrics["scores"]
        summary["answers"] = metrics.get("answers", "generated")
        kinds = {name: _group(group) for name, group in scores["kinds"].items()}
        summary[metrics["split"]] = {**_group(scores), "failed": len(scores["failed"]), "kinds": kinds}
    if "test_s" in summary and "test_u" in summary:
        seen, unseen = summary["test_s"], summary["test_u"]
        inner = mix_scores(seen["per_expression"], unseen["per_expression"])
        summary["mix"] = {**mix_scores(seen, unseen), "per_expression": inner}
    if "test_s" in summary:
        summary["kinds"] = summary["test_s"].pop("kinds")
        summary |= {name: summary["test_s"][name] for name in _SHARES}
    return summary


def _group(scores: Mapping[str, Any]) -> dict[str, Any]:
    official = scores["official"]
    return {**official, **{name: scores[name] for name in _SHARES}, "per_expression": scores["per_expression"]}


def report_clips(folder: Path, media: Path) -> Iterator[Clip]:
    """The pictured rows of an evaluation, split by split in file order.

    Args:
        folder: of the evaluation.
        media: folder `media` of the data, for the sounds.
    """
    order = ("test_s", "test_u", "test_n")
    found = {path.parent.name: path for path in folder.glob("*/predictions.jsonl")}
    for split in sorted(found, key=lambda name: (name not in order, order.index(name) if name in order else 0, name)):
        path = found[split]
        with open(path, encoding="utf-8") as lines:
            for line in lines:
                record = json.loads(line)
                picture = path.parent / "pictures" / f"{record['row']:05d}.jpg"
                if picture.is_file():
                    sound = media / record["audio"] / "audio.wav"
                    yield _clip(record, picture.read_bytes(), mp3(sound) if sound.is_file() else None)


def _clip(record: Mapping[str, Any], picture: bytes, audio: bytes | None) -> Clip:
    return Clip(
        split=record["split"],
        row=record["row"],
        kind=record["kind"],
        reference=record["reference"],
        class_name=record["class_name"],
        answer_class=record["answer_class"],
        text=record["reasoning"],
        faithful=record["faithful"],
        scores={name: record[name] for name in ("J", "F", "S") if name in record},
        picture=picture,
        audio=audio,
    )


def mp3(path: Path) -> bytes:
    """A sound file as small mono MP3."""
    wave, rate = soundfile.read(path, always_2d=True)
    buffer = io.BytesIO()
    soundfile.write(buffer, wave.mean(1), rate, format="MP3", subtype="MPEG_LAYER_III", compression_level=0.9)
    return buffer.getvalue()


def write_page(
    path: Path,
    title: str,
    summary: Mapping[str, Any],
    runs: Sequence[tuple[str, Path]],
    evaluations: Sequence[Path],
    media: Path,
) -> None:
    """Write the report page of a summary.

    Args:
        path: of the page.
        title: its heading.
        summary: see `report.render_page`.
        runs: (name, folder) of the training runs whose curves are drawn.
        evaluations: folders of the evaluations whose pictured rows are shown.
        media: folder `media` of the data, for the sounds.
    """
    clips = [clip for folder in evaluations for clip in report_clips(folder, media)]
    charts = charts_of_runs([(name, folder / "metrics.jsonl") for name, folder in runs], CURVES)
    write_bytes(path, render_page(title, summary, clips, charts).encode())


def summary_table(summary: Mapping[str, Any]) -> str:
    """Every split of every stage, then the probes, as plain text."""
    named = {**summary["stages"], **{f"{p['stage']}, {name}": p for name, p in summary["probes"].items()}}
    rows = [
        [name, split, *[stage[split].get(score) for score in ("J", "F", "J&F", "S", "n")]]
        for name, stage in named.items()
        for split in ("test_s", "test_u", "mix", "test_n")
        if split in stage
    ]
    return format_table(["stage", "split", "J", "F", "J&F", "S", "n"], rows)
