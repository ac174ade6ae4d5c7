"""The tables of a report as HTML: results beside the paper's, breakdowns with intervals, probes, paired comparisons.

Every text is escaped here; numbers are in percent.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from utils.bootstrap import DRAWS, Estimate
from utils.breakdown import TIE, Change, Comparison, Dimension
from utils.paper import SPLITS, STAGES, TABLE_1, Published, stage_key
from utils.tables import Cell, text

PROTOCOLS = {
    "official": "256 x 256, J at 0.4, F and S pooled over 4 expressions",
    "per_expression": "native size, J at 0.5, every expression on its own",
}
METRICS = ("J", "F", "J&F")
WORDS = ' class="words"'
_NUMERIC = re.compile(r"[-+\d.,\[\]→ ]*")
MINI_NOTE = "Mini world: synthetic clips. These numbers say nothing about Ref-AVS and do not compare with the paper's."


class Html(str):
    """Markup that is inserted as it is."""


def table(
    label: str,
    header: Sequence[Cell],
    rows: Sequence[Sequence[Cell | Html]],
    marks: Sequence[str] = (),
    groups: Sequence[tuple[str, int]] = (),
) -> str:
    """A table in a box that scrolls by itself.

    Args:
        label: name for screen readers.
        header: column titles.
        rows: cells; the first of each row is its heading.
        marks: class of each row, where not all are alike.
        groups: (title, columns) of a line above the header.
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
        mark = f' class="{escape(marks[i])}"' if marks and marks[i] else ""
        cells = "".join(f"<td{_side(value)}>{_cell(value)}</td>" for value in row[1:])
        lines.append(f'<tr{mark}><th scope="row">{_cell(row[0])}</th>{cells}</tr>')
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{escape(label)}"><table>'
        f"<thead>{above}<tr>{head}</tr></thead><tbody>{''.join(lines)}</tbody></table></div>"
    )


def note(words: str) -> str:
    return f'<p class="note">{escape(words)}</p>'


def stage_tables(stages: Mapping[str, Any], mini: bool) -> str:
    """Every stage under both protocols; under the official one each is followed by what the paper reports for it."""
    return "".join(_stage_table(stages, protocol, mini) for protocol in PROTOCOLS)


def _stage_table(stages: Mapping[str, Any], protocol: str, mini: bool) -> str:
    header = ["stage", *METRICS * len(SPLITS), "S", "class accuracy", "faithful", "rows"]
    groups = [("", 1), *((title, len(METRICS)) for title in SPLITS.values()), ("null", 1), ("", 3)]
    rows: list[list[Cell]] = []
    marks = []
    for name, stage in stages.items():
        cells = [_of(stage.get(split), protocol).get(m) for split in SPLITS for m in METRICS]
        counted = [split["n"] for split in (stage.get(s) for s in ("test_s", "test_u", "test_n")) if split]
        shares = [stage.get("class_accuracy"), stage.get("faithful"), sum(counted)]
        rows.append([name, *cells, _of(stage.get("test_n"), protocol).get("S"), *shares])
        marks.append("")
        published = STAGES.get(stage_key(stage.get("trained", ""), stage.get("answer", "")))
        if published and protocol == "official":
            rows.append([f"paper: {published.method} ({published.group})", *_published(published), *[None] * 4])
            marks.append("paper")
    words = f"Protocol {protocol}: {PROTOCOLS[protocol]}. Percent; S: lower is better; mix: mean of seen and unseen; "
    words += "class accuracy and faithful: of the seen split."
    given = [name for name, stage in stages.items() if stage.get("answers") == "given"]
    if given:
        words += f" {', '.join(given)}: reads the true class instead of answering, as when it teaches."
    if mini and "paper" in marks:
        words += f" {MINI_NOTE}"
    return table(f"Scores of the stages, protocol {protocol}", header, rows, marks, groups) + note(words)


def paper_table(stages: Mapping[str, Any], mini: bool) -> str:
    """Table 1 of the paper with our stages below it."""
    rows: list[list[Cell]] = []
    marks = []
    for line in TABLE_1:
        rows.append([line.method, line.group, *_published(line)])
        marks.append("")
    for name, stage in stages.items():
        cells = [_of(stage.get(split), "official").get(m) for split in SPLITS for m in METRICS]
        if any(cell is not None for cell in cells):
            rows.append([name, "this report" + (", mini world" if mini else ""), *cells])
            marks.append("ours")
    header = ["method", "kind", *METRICS * len(SPLITS)]
    groups = [("", 2), *((title, len(METRICS)) for title in SPLITS.values())]
    words = "Table 1 of the paper as printed (Mix J&F of CRAB and AURORA do not follow from their neighbours there). "
    words += "Our rows: protocol official. " + (MINI_NOTE if mini else "")
    return table("Table 1 of the paper and this report", header, rows, marks, groups) + note(words)


def _published(line: Published) -> list[Cell]:
    nothing = (None,) * len(METRICS)
    values = [value for split in SPLITS for value in line.scores.get(split, nothing)]
    return [None if value is None else f"{value:.1f}" for value in values]


def breakdown_tables(evaluations: Mapping[str, Sequence[Dimension]]) -> str:
    """One table per dimension, with the evaluations side by side.

    Args:
        evaluations: name -> its dimensions (`breakdown.break_down`).
    """
    titles = dict.fromkeys(d.title for dimensions in evaluations.values() for d in dimensions)
    parts = [
        note(
            f"Protocol per_expression, percent: mean and 95 % interval of {DRAWS} resamples of whole clips, as "
            "expressions about one clip are not independent. Bars: 0 to 100."
        )
    ]
    for title in titles:
        found = {name: d for name, dimensions in evaluations.items() for d in dimensions if d.title == title}
        parts.append(f"<h3>{escape(title)}</h3>{_dimension_table(title, found)}")
    return "".join(parts)


def _dimension_table(title: str, found: Mapping[str, Dimension]) -> str:
    names = dict.fromkeys(group.name for d in found.values() for group in d.groups)
    metrics = dict.fromkeys(m for d in found.values() for group in d.groups for m in group.scores)
    header: list[Cell] = [title.lower()]
    for _ in found:
        header += ["rows", *metrics, "95 % interval", Html("&nbsp;"), "class"]
    groups_above = [("", 1), *((name, len(metrics) + 4) for name in found)]
    rows: list[list[Cell | Html]] = []
    for group_name in names:
        row: list[Cell | Html] = [group_name]
        for dimension in found.values():
            group = next((g for g in dimension.groups if g.name == group_name), None)
            if group is None:
                row += [None] * (len(metrics) + 4)
                continue
            last = group.scores[next(reversed(metrics))]
            means = [f"{group.scores[m].mean:.1f}" for m in metrics]
            row += [last.rows, *means, _interval(last), _bar(last), f"{group.class_accuracy:.1f}"]
        rows.append(row)
    return table(f"Scores by {title.lower()}", header, rows, (), groups_above)


def probe_table(stages: Mapping[str, Any], probes: Mapping[str, Any]) -> str:
    """The same questions with the sound or the frames of another clip, by question kind (protocol official)."""
    base = stages[next(iter(probes.values())).get("stage", next(reversed(stages)))]
    header: list[Cell] = ["kind", "J&F", *[part for name in probes for part in (name, "change")]]
    rows: list[list[Cell]] = []
    for kind, scores in {"all": base.get("test_s"), **base.get("kinds", {})}.items():
        plain = (scores or {}).get("J&F")
        row: list[Cell] = [kind, plain]
        for probe in probes.values():
            probed = (probe.get("test_s") if kind == "all" else probe.get("kinds", {}).get(kind)) or {}
            value = probed.get("J&F")
            row += [value, None if value is None or plain is None else f"{value - plain:+.2f}"]
        rows.append(row)
    words = "The same questions with the sound or the frames of another clip: what falls was used. test_s, official."
    return table("Probes by question kind", header, rows) + note(words)


def comparison_block(comparison: Comparison, opened: bool) -> str:
    """A comparison that unfolds: totals and groups, then the rows that changed most."""
    whole = comparison.groups[0]
    title = f"{comparison.after} against {comparison.before}"
    summary = (
        f"<summary><strong>{escape(title)}</strong>: J&amp;F {_signed(whole.change)}, "
        f'<span class="good">{whole.wins} rows better</span>, <span class="bad">{whole.losses} worse</span>, '
        f"{whole.change.rows - whole.wins - whole.losses} within {TIE:g} point</summary>"
    )
    header = ["rows of", "rows", comparison.before, comparison.after, "change of J&F", "95 % interval"]
    header += ["wins", "losses"]
    rows: list[list[Cell | Html]] = [
        [g.name, g.change.rows, f"{g.before:.1f}", f"{g.after:.1f}", f"{g.change.mean:+.1f}", _interval(g.change, "+"),
         g.wins, g.losses]
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
                     answers, scores, f"{change.points:+.1f}"])
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


def _of(scores: Mapping[str, Any] | None, protocol: str) -> Mapping[str, Any]:
    """The scores of a protocol: official ones stand in the open, the others one level below."""
    scores = scores or {}
    return scores if protocol == "official" else scores.get(protocol, {})


def _interval(estimate: Estimate, sign: str = "") -> str | None:
    if estimate.low is None:
        return None
    return f"[{estimate.low:{sign}.1f}, {estimate.high:{sign}.1f}]"


def _signed(estimate: Estimate) -> str:
    interval = _interval(estimate, "+")
    return f"{estimate.mean:+.1f}" + (f" {interval}" if interval else "")


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
    wordy = isinstance(value, str) and not isinstance(value, Html) and not _NUMERIC.fullmatch(value)
    return WORDS if wordy else ""


def _cell(value: Cell | Html) -> str:
    return value if isinstance(value, Html) else escape(text(value))
