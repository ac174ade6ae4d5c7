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
from utils.report_gallery import gallery_data, gallery_rows
from utils.report_media import WIDTH, Drawn, MediaSource, draw_media, draw_sounds, empty_files
from utils.report_runs import Evaluation, find_evaluations, is_mini, pairs
from utils.report_samples import read_groups
from utils.results import write_bytes
from utils.tables import format_table, mix_scores

CURVES = tuple(dict.fromkeys((
    *("loss", "ce_loss", "mask_loss", "mask_bce_loss", "mask_dice_loss", "distill_loss", "lr", "grad_norm"),
    *(name for names in GRPO_FIGURES.values() for name in names),
)))  # fmt: skip
"""Scalars of metrics.jsonl that are drawn, where a run has them."""

_SHARES = ("class_accuracy", "format_share", "faithful")
ROW_PROTOCOL = "per_expression"
"""The protocol under which a single row has scores of its own."""


def stage_summary(folder: Path) -> dict[str, Any]:
    """What one evaluation found, all in percent.

    Args:
        folder: of the evaluation, with <split>/metrics.json.

    Returns:
        Per split J, F, J&F (or S) under `protocol`, n, shares and "per_expression" with the same; `protocol`, official
        or that of AVSBench (the scores are left out where per_expression alone was asked for); `mix`, the mean of
        test_s and test_u; `kinds` and the shares of test_s (else of test, else of val) at the top; `answers`, whether
        they were generated or given; `trained` and `answer`, the stage and the kind of answer; `benchmark`; `mini`,
        whether the data are synthetic.
    """
    summary: dict[str, Any] = {}
    for path in sorted(folder.glob("*/metrics.json")):
        metrics = json.loads(path.read_text(encoding="utf-8"))
        scores, data = metrics["scores"], metrics.get("config", {}).get("data", {})
        protocol = next((name for name in metrics["protocols"] if name != ROW_PROTOCOL), ROW_PROTOCOL)
        summary |= {"benchmark": data.get("benchmark", "refavs"), "protocol": protocol}
        summary["mini"] = is_mini(metrics.get("files", {}))
        summary |= {"answers": metrics.get("answers", "generated"), "trained": metrics.get("stage", "")}
        summary["answer"] = data.get("answer", "")
        kinds = {name: _group(group, protocol) for name, group in scores["kinds"].items()}
        summary[metrics["split"]] = {**_group(scores, protocol), "failed": len(scores["failed"]), "kinds": kinds}
    if "test_s" in summary and "test_u" in summary:
        summary["mix"] = _mix(summary["test_s"], summary["test_u"])
    first = next((split for split in ("test_s", "test", "val") if split in summary), None)
    if first is not None:
        summary["kinds"] = summary[first].pop("kinds")
        summary |= {name: summary[first][name] for name in _SHARES}
    return summary


def _group(scores: Mapping[str, Any], protocol: str) -> dict[str, Any]:
    """The scores of a protocol in the open, those of single rows one level below."""
    open_scores = {} if protocol == ROW_PROTOCOL else scores[protocol]
    shares = {name: scores[name] for name in _SHARES}
    return {"n": scores["n"], **open_scores, **shares, ROW_PROTOCOL: scores.get(ROW_PROTOCOL, {})}


def _mix(seen: Mapping[str, Any], unseen: Mapping[str, Any]) -> dict[str, Any]:
    """The mean of two splits, under each protocol that both were scored with."""
    inner = (seen[ROW_PROTOCOL], unseen[ROW_PROTOCOL])
    mixed: dict[str, Any] = mix_scores(seen, unseen) if "J" in seen and "J" in unseen else {}
    return mixed | {ROW_PROTOCOL: mix_scores(*inner) if all("J" in scores for scores in inner) else {}}


def run_summary(evaluations: Sequence[Evaluation]) -> dict[str, Any]:
    """`stages` and `probes` of a report; see `standing` and `probe_summaries`."""
    own = standing(evaluations)
    base = {e.checkpoint: e.name for e in reversed(evaluations) if e.probe == "none"}
    probes = [(e, base[e.checkpoint]) for e in evaluations if e.probe != "none" and e.checkpoint in base]
    return {
        "stages": {name: stage_summary(e.folder) for name, e in own.items()},
        "probes": probe_summaries([(e.probe, stage, e.name, e.folder) for e, stage in probes]),
    }


def standing(evaluations: Sequence[Evaluation]) -> dict[str, Evaluation]:
    """Name -> evaluation of all but the probes that stand beside an evaluation of the same weights without one.

    A probe without that is shown as a stage would be, under a name that says so.
    """
    plain = {e.checkpoint for e in evaluations if e.probe == "none"}
    found = [e for e in evaluations if e.probe == "none" or e.checkpoint not in plain]
    return {e.name if e.probe == "none" else f"{e.name} ({e.probe})": e for e in found}


def probe_summaries(probes: Iterable[tuple[str, str, str, Path]]) -> dict[str, dict[str, Any]]:
    """`probes` of a report: probe -> its `stage_summary` with `stage` and `probe`.

    The first probe of its kind has its kind's name (shuffle_audio, ...); further ones, of other stages, have their own,
    so that none replaces another.

    Args:
        probes: (probe, stage that it probes, name of the evaluation, its folder).
    """
    named: dict[str, dict[str, Any]] = {}
    for probe, stage, name, folder in probes:
        named[name if probe in named else probe] = {"stage": stage, "probe": probe, **stage_summary(folder)}
    return named


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
    media: Mapping[str, MediaSource] | Path | MediaSource | None,
    shown: Sequence[Evaluation],
    compared: Sequence[tuple[Evaluation, Evaluation]] | None = None,
    limit: int | None = None,
    width: int = WIDTH,
    taxonomies: Sequence[Path] = (),
) -> None:
    """Write a page and the files beside it.

    Args:
        path: of the page.
        title: its heading.
        summary: see `report.Report`.
        evaluations: that are broken down.
        runs: (name, folder) of training runs whose curves are drawn.
        media: benchmark -> draws frames and masks of every row that is shown; one alone is that of Ref-AVS. A path
            (folder `media` of the data) gives the sounds alone, None not even these; the pictures are then those that
            the evaluation drew (eval.pictures).
        shown: evaluations whose clips are shown.
        compared: (before, after); None = `report_runs.pairs`.
        limit: at most this many rows of a benchmark are shown, evenly spread over splits and kinds; None = all.
        width: of a frame in pixels.
        taxonomies: folders where failure types are looked for first, then in those of `runs` and of the page.

    Raises:
        DataError: media or results are missing or contradict each other.
    """
    table, failures = read_taxonomy([*taxonomies, *(folder for _, folder in runs), path.parent])
    empty_files(path)
    clips: list[dict[str, Any]] = []
    sizes: dict[str, dict[int, str]] = {}
    for benchmark in dict.fromkeys(e.benchmark for e in shown):
        alike = [e for e in shown if e.benchmark == benchmark]
        source = media.get(benchmark) if isinstance(media, Mapping) else media
        found, sizes[benchmark] = _clips(path, source, alike, limit, width, failures if benchmark == "refavs" else {})
        clips += found
    chosen = pairs(evaluations) if compared is None else compared
    comparisons = [found for before, after in chosen if (found := compare(before, after)) is not None]
    report = Report(
        title=title,
        summary=summary,
        breakdowns={
            name: break_down(list(e.rows.values()), sizes.get(e.benchmark, {}))
            for name, e in standing(evaluations).items()
        },
        comparisons=comparisons,
        failures=table,
        charts=charts_of_runs([(name, folder / "metrics.jsonl") for name, folder in runs], CURVES),
        samples={name: groups for name, folder in runs if (groups := read_groups(folder))},
        gallery=gallery_data(shown, clips) if shown else {},
    )
    write_bytes(path, render_page(report).encode())


def _clips(
    page: Path,
    media: Path | MediaSource | None,
    shown: Sequence[Evaluation],
    limit: int | None,
    width: int,
    failures: Mapping[int, str],
) -> tuple[list[dict[str, Any]], dict[int, str]]:
    """The clips that evaluations of one benchmark show, and row -> name of its mask size."""
    rows = _shown_rows(shown, None if isinstance(media, MediaSource) else page, limit)
    drawn = _draw(page, media, shown, rows, width)
    sizes = size_names({n: found.share for n, found in drawn.rows.items() if found.share > 0} if drawn else {})
    strips = {(e.name, n): address for e in shown for n in rows if (address := _strip(e, n, page)) is not None}
    return gallery_rows(shown, rows, drawn, strips, sizes, failures), sizes


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
    return draw_sounds(page, lambda clip: path if (path := media / clip / "audio.wav").is_file() else None, shown, rows)


def _strip(evaluation: Evaluation, row: int, page: Path) -> str | None:
    """Address of the picture that an evaluation drew of a row."""
    if row not in evaluation.rows:
        return None
    path = evaluation.folder / evaluation.rows[row].split / "pictures" / f"{row:05d}.jpg"
    return quote(os.path.relpath(path, page.parent)) if path.is_file() else None


def summary_table(summary: Mapping[str, Any]) -> str:
    """Every split of every stage, then the probes, as plain text."""
    named = {**summary["stages"]}
    named |= {f"{p['stage']}, {p.get('probe', name)}": p for name, p in summary["probes"].items()}
    rows = [
        [name, split, *[stage[split].get(score) for score in ("J", "F", "J&F", "S", "n")]]
        for name, stage in named.items()
        for split in ("val", "test_s", "test_u", "mix", "test_n", "test")
        if split in stage
    ]
    return format_table(["stage", "split", "J", "F", "J&F", "S", "n"], rows)
