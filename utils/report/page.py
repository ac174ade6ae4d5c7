"""Writes the report: one HTML page about a set of evaluations, and the files beside it.

The page itself holds style, script, tables, curves and texts; pictures and sounds of the clips lie in a folder beside
it and are loaded when they are looked at. It asks no other place for anything, only its own script may run (its hash
is in the policy), and page.html.jinja escapes every text that comes from data or from a model.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from utils.files import write_bytes
from utils.report import tables
from utils.report.breakdown import Comparison, Dimension, break_down, compare
from utils.report.curves import CURVES, Series, chart_image, charts_of_runs
from utils.report.media import WIDTH, MediaSource, empty_files, gallery_data, write_clips
from utils.report.runs import Evaluation, pairs, read_groups, read_taxonomy, run_summary, stage_evaluations
from utils.tables import text as cell_text

FOLDER = Path(__file__).parent
STYLE = (FOLDER / "style.css").read_text(encoding="utf-8")
SCRIPT = (FOLDER / "gallery.js").read_text(encoding="utf-8")
_HASH = base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()
POLICY = (
    "default-src 'none'; img-src 'self' file: data:; media-src 'self' file: data:; style-src 'unsafe-inline'; "
    f"script-src 'sha256-{_HASH}'; base-uri 'none'; form-action 'none'"
)
FILTERS = {"split": "split", "kind": "kind", "class": "cls", "mask_size": "size", "failure": "failure"}
"""Drop-down list of the gallery -> field of a clip; gallery.js has the same."""
RESULTS = {
    "right": "class right", "wrong": "class wrong", "unfaithful": "reasoning unfaithful", "high": "J&F 80 or more",
    "low": "J&F below 30", "noseg": "no [SEG]",
}  # fmt: skip
"""Values of the filter `result`; gallery.js knows what they mean."""
ORDERS = {"row": "row", "worst": "worst first", "best": "best first"}
ORDERS_BESIDE = {"gain": "largest gain over beside", "loss": "largest loss to beside"}
KEYS = (
    ("j, k", "next, previous clip"), ("/", "search"), ("m", "masks on or off"), ("p", "play or pause the sound"),
    ("Enter", "enlarge the clip"), ("← →", "frame by frame in the enlarged clip"), ("Esc", "close it"),
)  # fmt: skip


@dataclass(frozen=True)
class Report:
    """What a page shows; sections without content are left out."""

    title: str
    summary: Mapping[str, Any]
    """`stages` {name: `runs.stage_summary`}, `probes` of the same form, `seconds` {step: seconds}, `git`, `config`."""
    breakdowns: Mapping[str, Sequence[Dimension]] = field(default_factory=dict)
    """Evaluation -> its dimensions."""
    comparisons: Sequence[Comparison] = ()
    failures: Sequence[Mapping[str, str]] = ()
    """Lines of the taxonomy's CSV."""
    charts: Mapping[str, Mapping[str, Series]] = field(default_factory=dict)
    """`curves.charts_of_runs`."""
    samples: Mapping[str, Sequence[Sequence[Mapping[str, Any]]]] = field(default_factory=dict)
    """Run of stage 3 -> groups of sampled answers, `runs.read_groups`."""
    gallery: Mapping[str, Any] = field(default_factory=dict)
    """`media.gallery_data`."""


def write_report(
    page: Path,
    title: str,
    evaluations: Sequence[Evaluation],
    *,
    summary: Mapping[str, Any] | None = None,
    runs: Sequence[tuple[str, Path]] = (),
    media: Mapping[str, MediaSource] | None = None,
    shown: Sequence[Evaluation] | None = None,
    compared: Sequence[tuple[Evaluation, Evaluation]] | None = None,
    limit: int | None = None,
    width: int = WIDTH,
    taxonomies: Sequence[Path] = (),
) -> None:
    """Write a page and the files beside it.

    Args:
        page: path of the HTML file.
        title: its heading.
        evaluations: that are broken down.
        summary: see `Report`; None = what `run_summary` finds in the evaluations.
        runs: (name, folder) of training runs whose curves and sampled answers are shown.
        media: benchmark -> where frames, masks and sounds come from; a benchmark without one shows the pictures that
            the evaluation drew (eval.pictures).
        shown: evaluations whose clips are shown; None = all.
        compared: (before, after); None = `runs.pairs`.
        limit: at most this many rows of a benchmark are shown, evenly spread over splits and kinds; None = all.
        width: of a frame in pixels.
        taxonomies: folders where failure types are looked for first, then in those of `runs` and of the page.

    Raises:
        DataError: media or results are missing or contradict each other.
    """
    if summary is None:
        summary = {**run_summary(evaluations), "git": evaluations[0].fact("git", "")}
    shown = evaluations if shown is None else shown
    failures, types = read_taxonomy([*taxonomies, *(folder for _, folder in runs), page.parent])
    empty_files(page)
    clips: list[dict[str, Any]] = []
    sizes: dict[str, dict[int, str]] = {}
    for benchmark in dict.fromkeys(e.benchmark for e in shown):
        alike = [e for e in shown if e.benchmark == benchmark]
        known = types if benchmark == "refavs" else {}
        found, sizes[benchmark] = write_clips(page, (media or {}).get(benchmark), alike, limit, width, known)
        clips += found
    compared = pairs(evaluations) if compared is None else compared
    report = Report(
        title=title,
        summary=summary,
        breakdowns={
            name: break_down(list(e.rows.values()), sizes.get(e.benchmark, {}))
            for name, e in stage_evaluations(evaluations).items()
        },
        comparisons=[found for pair in compared if (found := compare(*pair)) is not None],
        failures=failures,
        charts=charts_of_runs([(name, folder / "metrics.jsonl") for name, folder in runs], CURVES),
        samples={name: groups for name, folder in runs if (groups := read_groups(folder))},
        gallery=gallery_data(shown, clips) if shown else {},
    )
    write_bytes(page, render_page(report).encode())


def render_page(report: Report) -> str:
    """The whole page as HTML."""
    environment = Environment(
        loader=FileSystemLoader(FOLDER), autoescape=True, undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    environment.policies["json.dumps_kwargs"] = {"ensure_ascii": False, "allow_nan": False, "separators": (",", ":")}
    environment.filters["cell_text"] = cell_text
    environment.tests["wordy"] = tables.is_wordy
    sections = [section for section in _sections(report) if section["blocks"]]
    page = environment.get_template("page.html.jinja").render(
        title=report.title,
        origin=" · ".join(_origin(report.summary)),
        banner=tables.mini_banner(report.summary["stages"]),
        tiles=tables.headline(report.summary["stages"]),
        sections=sections,
        policy=POLICY,
        style=Markup(STYLE),  # files of this folder, not data
        script=Markup(SCRIPT) if report.gallery.get("rows") else "",
    )
    return page.lstrip() + "\n"


def _sections(report: Report) -> list[dict[str, Any]]:
    """Anchor, title and blocks in order; blocks may be empty."""
    stages, summary = report.summary["stages"], report.summary
    names = list(dict.fromkeys(run for lines in report.charts.values() for run in lines))
    images = [chart_image(title, lines, names) for title, lines in report.charts.items()]
    gallery = [{"kind": "gallery", **_gallery_controls(report.gallery)}] if report.gallery.get("rows") else []
    listed = (
        ("stages", "Stages", tables.stage_tables(stages)),
        ("paper", "The paper's Table 1", tables.paper_table(stages)),
        ("avsbench", "AVSBench", tables.avsbench_tables(stages)),
        ("breakdown", "Breakdown", tables.breakdown_tables(report.breakdowns)),
        ("probes", "Does it listen and look?", tables.probe_tables(stages, summary.get("probes", {}))),
        ("compare", "Paired comparisons", tables.comparison_blocks(report.comparisons)),
        ("failures", "Failure taxonomy", tables.failure_table(report.failures)),
        ("curves", "Curves", [{"kind": "charts", "charts": images}] if images else []),
        ("samples", "Sampled answers", tables.sample_tables(report.samples)),
        ("gallery-title", "Clips", gallery),
        ("time", "Time", tables.seconds_table(summary.get("seconds", {}))),
    )
    return [{"anchor": anchor, "title": title, "blocks": blocks} for anchor, title, blocks in listed]


def _origin(summary: Mapping[str, Any]) -> list[str]:
    """Where the numbers come from: commit and configuration."""
    config = summary.get("config") or {}
    values = config.items() if isinstance(config, Mapping) else [("config", config)]
    commit = [f"git {summary['git']}"] if summary.get("git") else []
    return commit + [f"{name} {value if isinstance(value, str) else json.dumps(value)}" for name, value in values]


def _gallery_controls(data: Mapping[str, Any]) -> dict[str, Any]:
    """The gallery's data and its drop-down lists: (name, label, {value: title}, value chosen at first)."""
    rows, others = data["rows"], len(data["runs"]) > 1
    names = {name: name for name in data["runs"]}
    selects = [("run", "run", names, data["run"])]
    selects += [("beside", "beside", {"": "nothing", **names}, "")] * others
    for name, key in FILTERS.items():
        found = sorted({row[key] for row in rows} - {""})
        if len(found) > 1 or (name == "failure" and found):
            selects.append((name, name.replace("_", " "), {"": "all", **{v: v for v in found}}, ""))
    selects.append(("result", "result", {"": "all", **RESULTS}, ""))
    selects.append(("order", "order", ORDERS | (ORDERS_BESIDE if others else {}), "row"))
    return {"data": data, "selects": selects, "keys": KEYS}
