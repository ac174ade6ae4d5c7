"""One HTML page about a set of evaluations: results beside the paper's, where they come from, and every clip.

The page itself holds style, script, tables, curves and texts; pictures and sounds of the clips lie in a folder beside
it and are loaded when they are looked at. Nothing is asked of any other place, no script but the page's own may run
(its hash is in the policy), and every text that comes from data or from a model is escaped.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from typing import Any

from utils.breakdown import Comparison, Dimension
from utils.curves import Chart, colour_of, svg
from utils.report_gallery import gallery_section
from utils.report_samples import samples_section
from utils.report_scores import MINI_NOTE, avsbench_tables, headline, paper_table, stage_tables
from utils.report_script import SCRIPT
from utils.report_style import CSS
from utils.report_tables import (
    breakdown_tables,
    comparison_block,
    failure_table,
    note,
    probe_tables,
    seconds_table,
)

_HASH = base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()
POLICY = (
    "default-src 'none'; img-src 'self' file: data:; media-src 'self' file: data:; style-src 'unsafe-inline'; "
    f"script-src 'sha256-{_HASH}'; base-uri 'none'; form-action 'none'"
)


@dataclass(frozen=True)
class Report:
    """What a page shows; sections without content are left out."""

    title: str
    summary: Mapping[str, Any]
    """`stages` {name: `summary.stage_summary`}, `probes` of the same form, `seconds` {step: seconds}, `git`, `config`;
    scores in percent, protocol official, others under "per_expression"."""
    breakdowns: Mapping[str, Sequence[Dimension]] = field(default_factory=dict)
    """Evaluation -> its dimensions."""
    comparisons: Sequence[Comparison] = ()
    failures: Sequence[Mapping[str, str]] = ()
    """Lines of the taxonomy's CSV."""
    charts: Sequence[Chart] = ()
    samples: Mapping[str, Sequence[Sequence[Mapping[str, Any]]]] = field(default_factory=dict)
    """Run of stage 3 -> groups of sampled answers, `report_samples.read_groups`."""
    gallery: Mapping[str, Any] = field(default_factory=dict)
    """`report_gallery.gallery_data`."""


def render_page(report: Report) -> str:
    """The whole page as HTML."""
    sections = [(name, title, html) for name, title, html in _sections(report) if html]
    links = "".join(f'<a href="#{name}">{escape(title)}</a>' for name, title, _ in sections)
    body = "".join(
        f'<section aria-labelledby="{name}"><h2 id="{name}">{escape(title)}</h2>{html}</section>\n'
        for name, title, html in sections
    )
    summary = report.summary
    origin = " · ".join(_origin(summary))
    banner = _banner(summary["stages"])
    header = f'<h1>{escape(report.title)}</h1><p class="meta">{escape(origin)}</p>{banner}'
    script = f"<script>{SCRIPT}</script>" if report.gallery.get("rows") else ""
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{escape(report.title)}</title>'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}"><style>{CSS}</style></head><body>\n'
        f"<header>{header}{headline(summary['stages'])}</header>\n"
        f'<nav class="top" aria-label="Sections">{links}</nav>\n<main>{body}</main>\n{script}</body></html>\n'
    )


def _sections(report: Report) -> list[tuple[str, str, str]]:
    """(anchor, title, content) in order; content may be empty."""
    summary = report.summary
    stages, probes = summary["stages"], summary.get("probes", {})
    compared = [comparison_block(c, i == 0) for i, c in enumerate(report.comparisons)]
    paired = "Each row against itself, as both evaluations answered the same question. A row's number opens its clip."
    return [
        ("stages", "Stages", stage_tables(stages)),
        ("paper", "The paper's Table 1", paper_table(stages)),
        ("avsbench", "AVSBench", avsbench_tables(stages)),
        ("breakdown", "Breakdown", breakdown_tables(report.breakdowns) if report.breakdowns else ""),
        ("probes", "Does it listen and look?", probe_tables(stages, probes) if probes and stages else ""),
        ("compare", "Paired comparisons", note(paired) + "".join(compared) if compared else ""),
        ("failures", "Failure taxonomy", failure_table(report.failures) if report.failures else ""),
        ("curves", "Curves", _curves(report.charts)),
        ("samples", "Sampled answers", samples_section(report.samples)),
        ("gallery-title", "Clips", gallery_section(report.gallery) if report.gallery.get("rows") else ""),
        ("time", "Time", seconds_table(summary["seconds"]) if summary.get("seconds") else ""),
    ]


def _origin(summary: Mapping[str, Any]) -> list[str]:
    """Where the numbers come from: commit and configuration."""
    config = summary.get("config") or {}
    values = config.items() if isinstance(config, Mapping) else [("config", config)]
    commit = [f"git {summary['git']}"] if summary.get("git") else []
    return commit + [f"{name} {value if isinstance(value, str) else json.dumps(value)}" for name, value in values]


def _banner(stages: Mapping[str, Any]) -> str:
    """A warning where evaluations on synthetic clips are shown, which names them if there are others too."""
    mini = [name for name, stage in stages.items() if stage.get("mini")]
    if not mini:
        return ""
    which = "" if len(mini) == len(stages) else f" ({', '.join(mini)})"
    return f'<p class="banner">{escape(MINI_NOTE + which)}</p>'


def _curves(charts: Sequence[Chart]) -> str:
    if not charts:
        return ""
    names = list(dict.fromkeys(series.name for chart in charts for series in chart.series))
    drawn = []
    for chart in charts:
        keys = "".join(
            f'<span class="key"><i style="background:{colour_of(s.name, names)}"></i>{escape(s.name)}</span>'
            for s in chart.series
        )
        drawn.append(f"<figure>{svg(chart, names)}<figcaption>{keys}</figcaption></figure>")
    return f'<div class="charts">{"".join(drawn)}</div>'
