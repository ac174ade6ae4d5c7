"""The tables of a report as HTML: breakdowns with intervals, probes, paired comparisons, failures, times.

Every text is escaped here; numbers are in percent.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from utils.bootstrap import DRAWS, Estimate
from utils.breakdown import TIE, Change, Comparison, Dimension
from utils.tables import Cell, signed, text

WORDS = ' class="words"'
FOLDED = 8
"""A breakdown of more groups is folded."""
_NUMERIC = re.compile(r"[-+\d.,\[\]→ ]*")


class Html(str):
    """Markup that is inserted as it is."""


class HtmlWords(Html):
    """Markup that reads as words."""


def table(
    label: str,
    header: Sequence[Cell],
    rows: Sequence[Sequence[Cell | Html]],
    marks: Sequence[str] = (),
    groups: Sequence[tuple[str, int]] = (),
    spans: Sequence[int] = (),
) -> str:
    """A table in a box that scrolls by itself.

    Args:
        label: name for screen readers.
        header: column titles.
        rows: cells; the first of each row is its heading.
        marks: class of each row, where not all are alike.
        groups: (title, columns) of a line above the header.
        spans: rows that the heading of each row covers, 0 where one above covers it; none = each its own.
    """
    titles = "".join(
        f'<th scope="colgroup" colspan="{span}">{escape(title)}</th>' if title else f'<td colspan="{span}"></td>'
        for title, span in groups
    )
    wordy = {i for row in rows for i, value in enumerate(row) if i and _side(value)}
    head = "".join(
        f'<th scope="col"{WORDS if i in wordy else ""}>{_cell(name)}</th>' for i, name in enumerate(header)
    )
    above = f'<tr class="groups">{titles}</tr>' if groups else ""
    lines = []
    for i, row in enumerate(rows):
        covered = spans[i] if spans else 1
        names = [marks[i] if marks else "", "first" if spans and covered else ""]
        mark = f' class="{escape(" ".join(filter(None, names)))}"' if any(names) else ""
        span = f' rowspan="{covered}"' if covered > 1 else ""
        heading = f'<th scope="{"rowgroup" if span else "row"}"{span}>{_cell(row[0])}</th>' if covered else ""
        cells = "".join(f"<td{_side(value)}>{_cell(value)}</td>" for value in row[1:])
        lines.append(f"<tr{mark}>{heading}{cells}</tr>")
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{escape(label)}"><table>'
        f"<thead>{above}<tr>{head}</tr></thead><tbody>{''.join(lines)}</tbody></table></div>"
    )


def note(words: str) -> str:
    return f'<p class="note">{escape(words)}</p>'


def breakdown_tables(evaluations: Mapping[str, Sequence[Dimension]]) -> str:
    """One table per dimension; the evaluations stand below each other in each group, so that their bars compare.

    Args:
        evaluations: name -> its dimensions (`breakdown.break_down`).
    """
    titles = dict.fromkeys(d.title for dimensions in evaluations.values() for d in dimensions)
    parts = [
        note(
            f"Protocol per_expression, percent: mean and 95 % interval of {DRAWS} resamples of whole clips, as "
            "expressions about one clip are not independent. Bar and interval: the last score, 0 to 100. Class: share "
            "of the answers that name the right one."
        )
    ]
    for title in titles:
        found = {name: d for name, dimensions in evaluations.items() for d in dimensions if d.title == title}
        drawn, groups = _dimension_table(title, found)
        if groups > FOLDED:
            parts.append(f"<details><summary><h3>{escape(title)}</h3> {groups} groups</summary>{drawn}</details>")
        else:
            parts.append(f"<h3>{escape(title)}</h3>{drawn}")
    return "".join(parts)


def _dimension_table(title: str, found: Mapping[str, Dimension]) -> tuple[str, int]:
    """The table, and its number of groups."""
    names = dict.fromkeys(group.name for d in found.values() for group in d.groups)
    metrics = dict.fromkeys(m for d in found.values() for group in d.groups for m in group.scores)
    header: list[Cell] = [title.lower(), "evaluation", "rows", *metrics, "95 % interval", Html("&nbsp;"), "class"]
    rows: list[list[Cell | Html]] = []
    spans = []
    for group_name in names:
        inside = [(name, g) for name, d in found.items() for g in d.groups if g.name == group_name]
        for k, (name, group) in enumerate(inside):
            last = group.scores[next(reversed(metrics))]
            means = [f"{group.scores[m].mean:.1f}" for m in metrics]
            accuracy = None if group.class_accuracy is None else f"{group.class_accuracy:.1f}"
            rows.append([group_name, name, last.rows, *means, _interval(last), _bar(last), accuracy])
            spans.append(0 if k else len(inside))
    return table(f"Scores by {title.lower()}", header, rows, spans=spans), len(names)


def probe_tables(stages: Mapping[str, Any], probes: Mapping[str, Any]) -> str:
    """The same questions with the sound or the frames of another clip, by question kind; a table per probed stage."""
    last = next(reversed(stages))
    by_stage: dict[str, dict[str, Any]] = {}
    for name, probe in probes.items():
        found, kind = by_stage.setdefault(probe.get("stage", last), {}), probe.get("probe", name)
        found[name if kind in found else kind] = probe
    words = "The same questions with the sound or the frames of another clip (zero_audio: with silence): what falls "
    words += "was used. J&F of test_s, protocol official, percent."
    drawn = [_probe_table(n, stages[n], found) for n, found in by_stage.items() if stages.get(n, {}).get("test_s")]
    return "".join(drawn) + note(words) if drawn else ""


def _probe_table(name: str, base: Mapping[str, Any], probes: Mapping[str, Any]) -> str:
    header: list[Cell] = [f"{name}, by kind", "as it is", *[part for probe in probes for part in (probe, "change")]]
    rows: list[list[Cell]] = []
    for kind, scores in {"all": base.get("test_s"), **base.get("kinds", {})}.items():
        plain = (scores or {}).get("J&F")
        row: list[Cell] = [kind, plain]
        for probe in probes.values():
            probed = (probe.get("test_s") if kind == "all" else probe.get("kinds", {}).get(kind)) or {}
            value = probed.get("J&F")
            row += [value, None if value is None or plain is None else signed(value - plain, 2)]
        rows.append(row)
    return table(f"Probes of {name} by question kind", header, rows)


def comparison_block(comparison: Comparison, opened: bool) -> str:
    """A comparison that unfolds: totals and groups, then the rows that changed most."""
    whole = comparison.groups[0]
    title = f"{comparison.after} against {comparison.before}"
    summary = (
        f"<summary><strong>{escape(title)}</strong>: J&amp;F {_change(whole.change)}, "
        f'<span class="good">{whole.wins} rows better</span>, <span class="bad">{whole.losses} worse</span>, '
        f"{whole.change.rows - whole.wins - whole.losses} within {TIE:g} point</summary>"
    )
    header = ["rows of", "rows", comparison.before, comparison.after, "change of J&F", "95 % interval"]
    header += ["wins", "losses"]
    rows: list[list[Cell | Html]] = [
        [g.name, g.change.rows, f"{g.before:.1f}", f"{g.after:.1f}", signed(g.change.mean, 1),
         _interval(g.change, True), g.wins, g.losses]
        for g in comparison.groups
    ]
    words = (
        f"Rows with an object that both predicted, protocol per_expression. The right class is named by "
        f"{comparison.after} alone in {comparison.class_won} rows, by {comparison.before} alone in "
        f"{comparison.class_lost}."
    )
    parts = [summary, table(f"{title}, by group", header, rows), note(words)]
    for name, changes in (("Largest gains", comparison.gains), ("Largest losses", comparison.losses)):
        if changes:
            parts.append(f"<h4>{name}</h4>{_change_table(f'{name}, {title}', comparison, changes)}")
    return f"<details{' open' if opened else ''}>{''.join(parts)}</details>"


def _change_table(label: str, comparison: Comparison, changes: Sequence[Change]) -> str:
    header = ["row", "reference", "kind", "target", "answers", "J&F", "change"]
    rows: list[list[Cell | Html]] = []
    for change in changes:
        before, after = change.before, change.after
        address = f"#row={after.row}"
        data = f'data-run="{escape(comparison.after)}" data-beside="{escape(comparison.before)}"'
        link = Html(f'<a class="show" href="{address}" {data}>{after.row}</a>')
        answers = f"{before.answer_class or 'none'} → {after.answer_class or 'none'}"
        scores = f"{before.jf:.1f} → {after.jf:.1f}"
        rows.append([link, after.reference, after.kind, after.class_name,
                     answers, scores, signed(change.points, 1)])
    return table(label, header, rows)


def failure_table(lines: Sequence[Mapping[str, str]]) -> str:
    """The taxonomy of mined failures beside the paper's Figure 4.

    Args:
        lines: of the CSV that scripts/analyze_failures.py writes.
    """
    total = sum(int(line["count"]) for line in lines)
    header = ["type", "family", "failures", "%", Html("&nbsp;"), "paper", "paper %"]
    rows: list[list[Cell | Html]] = [
        [line["type"].replace("_", " "), line["family"], int(line["count"]), f"{float(line['percent']):.1f}",
         _bar(Estimate(float(line["percent"]), None, None, 0, 0)), int(line["paper_count"]),
         f"{float(line['paper_percent']):.1f}"]
        for line in lines
    ]
    words = f"{total} failures of this run by type; the paper's Figure 4 counts those of Qwen-Omni on Ref-AVS."
    return table("Failures by type", header, rows) + note(words)


def seconds_table(seconds: Mapping[str, float]) -> str:
    return table("Seconds per step", ["step", "seconds"], [[name, float(value)] for name, value in seconds.items()])


def _interval(estimate: Estimate, of_change: bool = False) -> str | None:
    if estimate.low is None:
        return None
    low, high = (signed(v, 1) if of_change else f"{v:.1f}" for v in (estimate.low, estimate.high))
    return f"[{low}, {high}]"


def _change(estimate: Estimate) -> str:
    interval = _interval(estimate, True)
    return signed(estimate.mean, 1) + (f" {interval}" if interval else "")


def _bar(estimate: Estimate) -> Html:
    """Mean as a bar, interval as a line over it; the numbers stand beside it."""
    whisker = ""
    if estimate.low is not None:
        whisker = f'<path class="w" d="M{estimate.low:.1f} 6H{estimate.high:.1f}"/>'
    return Html(
        '<svg class="bar" viewBox="0 0 100 12" preserveAspectRatio="none" aria-hidden="true">'
        f'<rect class="t" width="100" height="12"/><rect class="m" y="3" width="{estimate.mean:.1f}" height="6"/>'
        f"{whisker}</svg>"
    )


def _side(value: Cell | Html) -> str:
    """Words stand to the left, numbers to the right."""
    if isinstance(value, Html):
        return WORDS if isinstance(value, HtmlWords) else ""
    return WORDS if isinstance(value, str) and not _NUMERIC.fullmatch(value) else ""


def _cell(value: Cell | Html) -> str:
    return value if isinstance(value, Html) else escape(text(value))
