"""Tables of ablations as Markdown, HTML and CSV, and the document of all of them."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Sequence
from html import escape
from importlib.resources import files

from scripts.ablation.results import SCORES, Difference, Line, Mean, Outcome
from scripts.ablation.tables import SPLIT_TITLES

MINI = "Mini world, synthetic data: these numbers show what this code learns there, and say nothing about Ref-AVS."
Cells = list[list[str]]
STYLE = files("utils.report").joinpath("style.css").read_text(encoding="utf-8")
_OPEN = "Open question: "
_WORDS = {True: "yes", False: "no", None: "-"}


def score_cells(found: Outcome) -> Cells:
    """Header and one line per row and split: n, the paper's scores, ours with standard deviation."""
    printed = [f"{s} paper" for s in SCORES] if _in_paper(found) else []
    ours = [f"{s} ours" if printed else s for s in SCORES]
    extras = [name.replace("_", " ") for name in found.table.extras]
    header = ["row", "split", "n", *printed, *ours, *extras, "seeds"]
    return [header, *(_score_line(line, bool(printed)) for line in found.lines)]


def difference_cells(found: Outcome) -> Cells:
    """Header and one line per difference to the row that the others are compared with."""
    base = {-1: "the last row", 0: "the first row"}[found.table.against]
    header = [f"J&F against {base}", "split", "paper", "ours", "95 % over seeds", "95 % over clips",
              "paper's sign", "significant"]  # fmt: skip
    cells = [header, *(_difference_line(d) for d in found.differences)]
    return cells if _in_paper(found) else [[*line[:2], *line[3:6], line[7]] for line in cells]


def caption(found: Outcome) -> list[str]:
    """What is to be known to read the table, line by line."""
    table = found.table
    seeds = ", ".join(map(str, found.seeds))
    lines = [MINI] if found.mini else []
    lines.append(f"Protocol {table.protocol}, percent; ours: mean and standard deviation over seeds {seeds}.")
    lines += [table.remark] if table.remark else []
    lines += [f"Not finished: {'; '.join(found.missing)}."] if found.missing else []
    lines += [f"Not significant, or against the paper's sign: {'; '.join(open_questions(found))}."] * bool(
        open_questions(found)
    )
    commits = ", ".join(found.codes) or "-"
    lines.append(f"Time of all runs behind it: {found.seconds / 60:.0f} minutes. Code: {commits}.")
    return lines


def open_questions(found: Outcome) -> list[str]:
    """Differences that do not repeat the paper's: of the other sign, or not told from chance."""
    named = {False: "not the paper's sign", True: "the paper's sign"}
    return [
        f"{d.row.method} on {SPLIT_TITLES[d.split]} ({named[d.agrees]}, "
        f"{'significant' if d.significant else 'not told from chance'})"
        for d in found.differences
        if d.agrees is not None and not (d.agrees and d.significant)
    ]


def markdown(found: Outcome, level: int = 1) -> str:
    """The table with its caption and differences."""
    parts = [f"{'#' * level} {found.table.heading}", *caption(found)]
    parts.append(_markdown_table(score_cells(found)) if found.lines else "No run has finished.")
    if found.differences:
        parts.append(_markdown_table(difference_cells(found)))
    return "\n\n".join(parts) + "\n"


def html(found: Outcome) -> str:
    """A page of its own, without scripts."""
    title = escape(found.table.heading)
    tables = [score_cells(found), *([difference_cells(found)] if found.differences else [])]
    body = "".join(f"<p>{escape(line)}</p>" for line in caption(found)) + "".join(map(_html_table, tables))
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<style>{STYLE}</style></head><body><main><h1>{title}</h1>{body}</main></body></html>\n"
    )


def csv_text(found: Outcome) -> str:
    """One line per row, split and score, in full precision."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["table", "row", "split", "score", "paper", "mean", "deviation", "seeds", "n", "protocol", "mini"])
    for line in found.lines:
        paper_scores = dict(zip(SCORES, line.row.paper.get(line.split, ()), strict=False))
        for name, mean in {**line.scores, **line.extras}.items():
            paper = paper_scores.get(name)
            writer.writerow(
                [found.table.number, line.row.method, line.split, name, "" if paper is None else paper, mean.value,
                 "" if mean.deviation is None else mean.deviation, mean.seeds, line.n, found.table.protocol,
                 int(found.mini)]
            )  # fmt: skip
    return out.getvalue()


def document(outcomes: Sequence[Outcome], seconds: float, before: str = "") -> str:
    """All tables in one Markdown file; lines of other hands between a table's note marks in `before` are kept.

    Args:
        outcomes: of the tables.
        seconds: of all finished runs, each counted once.
        before: the file as it is.
    """
    parts = ["# Ablations on the mini world", MINI, INTRODUCTION, f"All finished runs: {seconds / 3600:.1f} hours.\n"]
    for found in outcomes:
        mark = f"notes of table {found.table.number}"
        parts.append(f"{markdown(found, 2)}\n<!-- {mark} -->\n{_notes(found, mark, before)}<!-- end -->\n")
    return "\n\n".join(parts)


def _notes(found: Outcome, mark: str, before: str) -> str:
    """What was written between the marks, and a line for each open question that it does not speak of."""
    old = re.search(rf"<!-- {mark} -->\n(.*?)<!-- end -->", before, re.DOTALL)
    kept = "".join(line for line in (old[1] if old else "").splitlines(True) if not line.startswith(_OPEN))
    named = {question: question.partition(" (")[0] for question in open_questions(found)}
    words = " ".join(kept.split())  # a name may run over the end of a line
    unsaid = [q for q, name in named.items() if not re.search(rf"{re.escape(name)}\b", words)]
    return kept + "".join(f"{_OPEN}{question}.\n" for question in unsaid)


INTRODUCTION = """Written by `python scripts/ablate.py --table all --docs docs/ablations_mini.md` from finished runs \
alone. Explanations written between the note marks below a table are kept when it is written again; an open question \
goes once the notes name it as it does ("<row> on <split>").

What the mini world cannot show: its language has some hundred words, its chains follow a grammar, and its base was \
pretrained on the same grammar, so that rows about the worth of language (Tables 2, 4, 8) have less to tell than with \
real references. Its unseen classes were seen in pretraining, never segmented. Test splits hold some hundred rows; \
differences of a point or two are within chance, which the intervals say."""


def _in_paper(found: Outcome) -> bool:
    return any(row.paper for row in found.table.rows)


def _score_line(line: Line, with_paper: bool) -> list[str]:
    paper = line.row.paper.get(line.split, (None,) * 3)
    printed = ["-" if value is None else f"{value:.1f}" for value in paper] if with_paper else []
    ours = [_mean(mean) for mean in (*(line.scores[name] for name in SCORES), *line.extras.values())]
    return [line.row.method, SPLIT_TITLES[line.split], str(line.n), *printed, *ours, str(line.scores["J"].seeds)]


def _difference_line(d: Difference) -> list[str]:
    seeds = d.over_seeds.interval
    clips = None if d.over_clips.low is None else (d.over_clips.low, d.over_clips.high)
    paper = "-" if d.paper is None else f"{d.paper:+.1f}"
    significant = "one seed" if seeds is None else _WORDS[d.significant]
    return [f"{d.row.method} - {d.against.method}", SPLIT_TITLES[d.split], paper, f"{d.over_seeds.value:+.2f}",
            _interval(seeds), _interval(clips), _WORDS[d.agrees], significant]  # fmt: skip


def _mean(mean: Mean) -> str:
    return f"{mean.value:.1f}" + ("" if mean.deviation is None else f" ± {mean.deviation:.1f}")


def _interval(bounds: tuple[float, float] | None) -> str:
    return "-" if bounds is None else f"{bounds[0]:+.1f} to {bounds[1]:+.1f}"


def _markdown_table(cells: Cells) -> str:
    lines = ["| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in cells]
    return "\n".join([lines[0], "|" + "---|" * len(cells[0]), *lines[1:]])


def _html_table(cells: Cells) -> str:
    head = "".join(f"<th>{escape(cell)}</th>" for cell in cells[0])
    rows = "".join(
        f"<tr><th>{escape(line[0])}</th>{''.join(f'<td>{escape(c)}</td>' for c in line[1:])}</tr>" for line in cells[1:]
    )
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>'
