"""Evaluations -> one summary, one table, one page (`utils.report` writes it, `utils.report_media` its pictures)."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

from utils.breakdown import break_down, compare, size_names
from utils.curves import GRPO_FIGURES, charts_of_runs
from utils.report import Report, render_page
from utils.report_gallery import gallery_data
from utils.report_media import WIDTH, Drawn, MediaSource, draw_media, draw_sounds
from utils.report_runs import Evaluation, find_evaluations, pairs
from utils.report_samples import read_groups
from utils.results import write_bytes
from utils.tables import format_table, mix_scores

CURVES = tuple(dict.fromkeys((
    *("loss", "ce_loss", "mask_loss", "mask_bce_loss", "mask_dice_loss", "distill_loss", "lr", "grad_norm"),
    *(name for names in GRPO_FIGURES.values() for name in names),
)))  # fmt: skip
"""Scalars of metrics.jsonl that are drawn, where a run has them."""

_SHARES = ("class_accuracy", "format_share", "faithful")


def stage_summary(folder: Path) -> dict[str, Any]:
    """What one evaluation found, all in percent.

    Args:
        folder: of the evaluation, with <split>/metrics.json.

    Returns:
        Per split J, F, J&F (or S) under protocol official, n, shares and "per_expression" with the same; `mix`, the
        mean of test_s and test_u; `kinds` and the shares of test_s at the top; `answers`, whether they were generated
        or given; `trained` and `answer`, the stage and the kind of answer.
    """
    summary: dict[str, Any] = {}
    for path in sorted(folder.glob("*/metrics.json")):
        metrics = json.loads(path.read_text(encoding="utf-8"))
        scores = metrics["scores"]
        summary["answers"] = metrics.get("answers", "generated")
        summary["trained"] = metrics.get("stage", "")
        summary["answer"] = metrics.get("config", {}).get("data", {}).get("answer", "")
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


def run_summary(evaluations: Sequence[Evaluation]) -> dict[str, Any]:
    """`stages` and `probes` of a report; a probe names the stage that it probes."""
    plain = [e for e in evaluations if e.probe == "none"]
    base = {e.checkpoint: e.name for e in reversed(plain)}
    probes = {e.name: e for e in evaluations if e.probe != "none" and e.checkpoint in base}
    return {
        "stages": {e.name: stage_summary(e.folder) for e in plain},
        "probes": {name: {"stage": base[e.checkpoint], **stage_summary(e.folder)} for name, e in probes.items()},
    }


def write_page(
    path: Path,
    title: str,
    summary: Mapping[str, Any],
    runs: Sequence[tuple[str, Path]],
    evaluations: Sequence[Path],
    media: Path | MediaSource | None,
) -> None:
    """Write the report of a run: all evaluations beside the page, the named ones with their clips.

    Args:
        path: of the page, in the folder of the run.
        title: its heading.
        summary: see `report.Report`.
        runs: (name, folder) of the training runs whose curves are drawn.
        evaluations: folders of the evaluations whose clips are shown.
        media: see `write_report`.
    """
    found = find_evaluations(path.parent)
    shown = [e for e in found if e.folder in evaluations]
    write_report(path, title, summary, found, runs, media, shown)


def write_report(
    path: Path,
    title: str,
    summary: Mapping[str, Any],
    evaluations: Sequence[Evaluation],
    runs: Sequence[tuple[str, Path]],
    media: Path | MediaSource | None,
    shown: Sequence[Evaluation],
    compared: Sequence[tuple[Evaluation, Evaluation]] | None = None,
    limit: int | None = None,
    width: int = WIDTH,
) -> None:
    """Write a page and the files beside it.

    Args:
        path: of the page.
        title: its heading.
        summary: see `report.Report`.
        evaluations: that are broken down.
        runs: (name, folder) of training runs whose curves are drawn and whose failure taxonomy is shown.
        media: draws frames and masks of every row that is shown. A path (folder `media` of the data) gives the sounds
            alone, None not even these; the pictures are then those that the evaluation drew (eval.pictures).
        shown: evaluations whose clips are shown.
        compared: (before, after); None = `report_runs.pairs`.
        limit: at most this many rows are shown, evenly spread over splits and kinds; None = all.
        width: of a frame in pixels.

    Raises:
        DataError: media or results are missing or contradict each other.
    """
    rows = _shown_rows(shown, None if isinstance(media, MediaSource) else path, limit)
    drawn = _draw(path, media, shown, rows, width)
    shares = {n: found.share for n, found in drawn.rows.items() if found.share > 0} if drawn else {}
    sizes = size_names(shares)
    table, failures = read_taxonomy([folder for _, folder in runs] + [path.parent])
    strips = {(e.name, n): address for e in shown for n in rows if (address := _strip(e, n, path)) is not None}
    chosen = pairs(evaluations) if compared is None else compared
    comparisons = [found for before, after in chosen if (found := compare(before, after)) is not None]
    report = Report(
        title=title,
        summary=summary,
        breakdowns={e.name: break_down(list(e.rows.values()), sizes) for e in evaluations if e.probe == "none"},
        comparisons=comparisons,
        failures=table,
        charts=charts_of_runs([(name, folder / "metrics.jsonl") for name, folder in runs], CURVES),
        samples={name: groups for name, folder in runs if (groups := read_groups(folder))},
        gallery=gallery_data(shown, rows, drawn, strips, sizes, failures),
        mini=any(e.is_mini for e in evaluations),
    )
    write_bytes(path, render_page(report).encode())


def read_taxonomy(folders: Iterable[Path]) -> tuple[list[dict[str, str]], dict[int, str]]:
    """What scripts/analyze_failures.py left in one of the folders: lines of its table, and row -> type of failure."""
    for folder in folders:
        for path in sorted([*folder.glob("*.jsonl.csv"), *folder.glob("*/*.jsonl.csv")]):
            with open(path, encoding="utf-8", newline="") as file:
                lines = list(csv.DictReader(file))
            if lines and {"type", "count", "paper_percent"} <= lines[0].keys():
                labelled = path.with_suffix("").read_text(encoding="utf-8").splitlines()
                records = [json.loads(text) for text in labelled if text.strip()]
                return lines, {record["row"]: record["type"].replace("_", " ") for record in records}
    return [], {}


def _shown_rows(shown: Sequence[Evaluation], page: Path | None, limit: int | None) -> list[int]:
    """Rows of the gallery; with a `page`, those alone that have a picture already."""
    rows = {n: row for e in shown for n, row in e.rows.items() if page is None or _strip(e, n, page) is not None}
    numbers = sorted(rows)
    if limit is None:
        return numbers
    from utils.evaluation import spread  # imported late: it needs torch, which a report does not

    return sorted(spread(numbers, [f"{rows[n].split} {rows[n].kind}" for n in numbers], limit))


def _draw(
    page: Path, media: Path | MediaSource | None, shown: Sequence[Evaluation], rows: Sequence[int], width: int
) -> Drawn | None:
    if media is None or not rows:
        return None
    if isinstance(media, MediaSource):
        return draw_media(page, media, shown, rows, width)
    heard = [e.rows[n].audio for e in shown for n in rows if n in e.rows]
    paths = {clip: media / clip / "audio.wav" for clip in heard}
    return draw_sounds(page, lambda clip: paths[clip] if paths[clip].is_file() else None, heard)


def _strip(evaluation: Evaluation, row: int, page: Path) -> str | None:
    """Address of the picture that an evaluation drew of a row."""
    if row not in evaluation.rows:
        return None
    path = evaluation.folder / evaluation.rows[row].split / "pictures" / f"{row:05d}.jpg"
    return quote(os.path.relpath(path, page.parent)) if path.is_file() else None


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
