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
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from utils.files import write_bytes
from utils.report import tables
from utils.report.breakdown import Comparison, Group, break_down, compare
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
        summary: see `render_page`; None = what `run_summary` finds in the evaluations.
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
    text = render_page(
        title,
        summary,
        breakdowns={
            name: break_down(list(e.rows.values()), sizes.get(e.benchmark, {}))
            for name, e in stage_evaluations(evaluations).items()
        },
        comparisons=[found for pair in compared if (found := compare(*pair)) is not None],
        failures=failures,
        charts=charts_of_runs([(name, folder / "metrics.jsonl") for name, folder in runs], CURVES),
        samples={name: groups for name, folder in runs if (groups := read_groups(folder))},
        gallery=gallery_data(shown, clips) if shown else None,
    )
    write_bytes(page, text.encode())


def render_page(
    title: str,
    summary: Mapping[str, Any],
    *,
    breakdowns: Mapping[str, Mapping[str, Mapping[str, Group]]] | None = None,
    comparisons: Sequence[Comparison] = (),
    failures: Sequence[Mapping[str, str]] = (),
    charts: Mapping[str, Mapping[str, Series]] | None = None,
    samples: Mapping[str, Sequence[Sequence[Mapping[str, Any]]]] | None = None,
    gallery: Mapping[str, Any] | None = None,
) -> str:
    """The whole page as HTML; sections without content are left out.

    Args:
        title: its heading.
        summary: `stages` {name: `runs.stage_summary`}; there may be `probes` of the same form, `seconds`
            {step: seconds}, `git` and `config`.
        breakdowns: evaluation -> `breakdown.break_down`.
        comparisons: the first is unfolded.
        failures: lines of the taxonomy's CSV.
        charts: `curves.charts_of_runs`.
        samples: run of stage 3 -> groups of sampled answers, `runs.read_groups`.
        gallery: `media.gallery_data`.
    """
    stages = summary["stages"]
    names = list(dict.fromkeys(run for lines in (charts or {}).values() for run in lines))
    images = [chart_image(name, lines, names) for name, lines in (charts or {}).items()]
    clips = [{"kind": "gallery", **_gallery_controls(gallery)}] if gallery and gallery["rows"] else []
    sections = {
        "stages": ("Stages", tables.stage_tables(stages)),
        "paper": ("The paper's Table 1", tables.paper_table(stages)),
        "avsbench": ("AVSBench", tables.avsbench_tables(stages)),
        "breakdown": ("Breakdown", tables.breakdown_tables(breakdowns or {})),
        "probes": ("Does it listen and look?", tables.probe_tables(stages, summary.get("probes", {}))),
        "compare": ("Paired comparisons", tables.comparison_blocks(comparisons)),
        "failures": ("Failure taxonomy", tables.failure_table(failures)),
        "curves": ("Curves", [{"kind": "charts", "charts": images}] if images else []),
        "samples": ("Sampled answers", tables.sample_tables(samples or {})),
        "gallery-title": ("Clips", clips),
        "time": ("Time", tables.seconds_table(summary.get("seconds", {}))),
    }
    return render_template(
        title,
        sections={anchor: section for anchor, section in sections.items() if section[1]},
        origin=" · ".join(_origin(summary)),
        banner=tables.mini_banner(stages),
        tiles=tables.headline(stages),
        script=Markup(SCRIPT) if clips else "",  # like the style a file of this folder, not data
    )


def render_template(title: str, **parts: Any) -> str:
    """page.html.jinja with a heading and what it draws: `blocks`, or `sections` {anchor: (title, blocks)}."""
    environment = Environment(
        loader=FileSystemLoader(FOLDER), autoescape=True, undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    environment.policies["json.dumps_kwargs"] = {"ensure_ascii": False, "allow_nan": False, "separators": (",", ":")}
    environment.filters["cell_text"] = cell_text
    environment.tests["wordy"] = tables.is_wordy
    nothing = {"sections": {}, "blocks": (), "origin": "", "banner": "", "tiles": {}, "script": ""}
    page = environment.get_template("page.html.jinja").render(
        {**nothing, **parts, "title": title, "policy": POLICY, "style": Markup(STYLE)}
    )
    return page.lstrip() + "\n"


def _origin(summary: Mapping[str, Any]) -> list[str]:
    """Where the numbers come from: commit and configuration."""
    config = summary.get("config") or {}
    values = config.items() if isinstance(config, Mapping) else [("config", config)]
    commit = [f"git {summary['git']}"] if summary.get("git") else []
    return commit + [f"{name} {value if isinstance(value, str) else json.dumps(value)}" for name, value in values]


def _gallery_controls(data: Mapping[str, Any]) -> dict[str, Any]:
    """The gallery's data and its drop-down lists of runs and of rows' values: (name, {value: title}, chosen)."""
    names = {name: name for name in data["runs"]}
    selects = [("run", names, data["run"])]
    selects += [("beside", {"": "nothing", **names}, "")] * (len(names) > 1)
    for name, key in data["fields"].items():
        found = sorted({row[key] for row in data["rows"]} - {""})
        if len(found) > 1 or (name == "failure" and found):
            selects.append((name, {"": "all", **{v: v for v in found}}, ""))
    return {"data": data, "selects": selects}
