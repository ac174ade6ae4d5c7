"""The tables of ablations (scripts/ablate.py): means over seeds, differences to one row, and how sure they are.

Two kinds of chance are kept apart. Seeds: each seed's difference to that row of the same seed, with Student's interval
of their mean. Clips: each metadata row's difference of J&F, averaged over the seeds, with the bootstrap's interval over
clips (`utils.report.breakdown`; protocol per_expression, as pooled protocols have no row scores). A difference is
significant where both 95 % intervals leave out 0; with one seed there is no telling.
"""

from __future__ import annotations

import csv
import io
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

from utils.errors import DataError
from utils.files import write_bytes, write_json
from utils.paper import ABLATIONS, SPLITS, TABLE_6
from utils.report.breakdown import LEVEL, SCORES, Estimate, mean_intervals
from utils.report.page import render_template
from utils.report.runs import Evaluation, read_evaluation, shared_rows
from utils.report.tables import Table as PageTable

MINI = "Mini world, synthetic data: these numbers show what this code learns there, and say nothing about Ref-AVS."
INTRODUCTION = """Written by `python scripts/ablate.py --table all --docs docs/ablations_mini.md` from finished runs \
alone. Explanations written between the note marks below a table are kept when it is written again; an open question \
goes once the notes name it as it does ("<row> on <split>").

What the mini world cannot show: its language has some hundred words, its chains follow a grammar, and its base was \
pretrained on the same grammar, so that rows about the worth of language (Tables 2, 4, 8) have less to tell than with \
real references. Its unseen classes were seen in pretraining, never segmented. Test splits hold some hundred rows; \
differences of a point or two are within chance, which the intervals say."""
SPLIT_TITLES = {**SPLITS, "test": "S4 test"}
Bounds = tuple[float, float] | None
Cells = list[list[str]]


@dataclass(frozen=True)
class Table:
    """A table as configs/ablations.yaml declares it."""

    name: str
    """Number in the paper, or the name of a study of ours."""
    title: str
    rows: Mapping[str, str]
    """Row -> run whose checkpoint is evaluated."""
    remark: str = ""
    evaluate: str = "eval"
    splits: Sequence[str] = ("test_s", "test_u")
    protocol: str = "official"
    extras: Sequence[str] = ()
    """Shares in percent beside the scores: keys of metrics.json."""
    against: int = -1
    """Index of the row that the others are compared with."""

    @property
    def is_paper(self) -> bool:
        """Whether the paper has it."""
        return self.name.isdigit()

    def published(self, row: str, split: str) -> tuple[float | None, ...]:
        """J, F and J&F in percent as printed; empty where the paper has no such line."""
        if self.name == "6":
            return (*TABLE_6["AURORA (paper)"], None) if row.startswith("fine-tuned") else ()
        lines = ABLATIONS[int(self.name)] if self.is_paper else ()
        return next((line.scores[split] for line in lines if line.method == row), ())


@dataclass(frozen=True)
class Mean:
    """A mean over seeds."""

    value: float
    deviation: float | None
    """Sample standard deviation; None with one seed."""
    seeds: int

    @property
    def interval(self) -> Bounds:
        """95 % of the mean by Student's t; None with one seed."""
        if self.deviation is None:
            return None
        # stats.t.interval would be NaN where all seeds agree.
        half = float(stats.t.ppf((1 + LEVEL) / 2, self.seeds - 1)) * self.deviation / math.sqrt(self.seeds)
        return self.value - half, self.value + half


@dataclass(frozen=True)
class Line:
    """Our scores of one row on one split, in percent."""

    row: str
    split: str
    paper: tuple[float | None, ...]
    scores: Mapping[str, Mean]
    """J, F, J&F under the table's protocol, then the table's extras."""
    n: int
    """Metadata rows scored."""


@dataclass(frozen=True)
class Difference:
    """J&F of a row minus that of the row it is compared with, on one split."""

    row: str
    against: str
    split: str
    paper: float | None
    over_seeds: Mean
    over_clips: Estimate

    @property
    def clips(self) -> Bounds:
        """95 % over clips; None with one clip."""
        return None if self.over_clips.low is None else (self.over_clips.low, self.over_clips.high)

    @property
    def agrees(self) -> bool | None:
        """Whether ours has the paper's sign (no difference has none); None where the paper has no difference."""
        return None if not self.paper else self.over_seeds.value * self.paper > 0

    @property
    def significant(self) -> bool | None:
        """See the module's text; None with one seed or one clip."""
        both = (self.over_seeds.interval, self.clips)
        return None if None in both else all(low > 0 or high < 0 for low, high in both)


@dataclass(frozen=True)
class Outcome:
    """A table with what has finished of it."""

    table: Table
    lines: Sequence[Line]
    differences: Sequence[Difference]
    missing: Sequence[str]
    """Evaluations that have not finished, as "row, seed"."""
    seeds: Sequence[int]
    """Asked for."""
    codes: Sequence[str]
    """Commits that the evaluations ran at."""
    seconds: float
    """All runs behind the table together, those shared with other tables included."""
    mini: bool

    @property
    def heading(self) -> str:
        """Number and title."""
        return f"Table {self.table.name}: {self.table.title}" if self.table.is_paper else self.table.title


def mean_of(values: Sequence[float]) -> Mean:
    """Mean and sample standard deviation."""
    array = np.asarray(values, np.float64)
    return Mean(float(array.mean()), float(array.std(ddof=1)) if len(array) > 1 else None, len(array))


def outcome(table: Table, finished: Mapping[tuple[str, int], Path], seeds: Sequence[int], seconds: float) -> Outcome:
    """Reads what is there of a table.

    Args:
        table: its rows.
        finished: (row, seed) -> folder of a finished evaluation.
        seeds: that were asked for.
        seconds: of all runs behind the table.

    Raises:
        DataError: an evaluation is damaged, or two were made on different data.
    """
    wanted = [(row, seed) for row in table.rows for seed in seeds]
    found = {key: read_evaluation(finished[key], key[0]) for key in wanted if key in finished}
    base = list(table.rows)[table.against]
    lines, differences = [], []
    for row in table.rows:
        own = {seed: found[row, seed] for seed in seeds if (row, seed) in found}
        both = [(one, found[base, seed]) for seed, one in own.items() if (base, seed) in found]
        lines += [_line(table, row, split, list(own.values())) for split in table.splits if own]
        differences += [_difference(table, row, base, split, both) for split in table.splits if both and row != base]
    missing = [f"{row}, seed {seed}" for row, seed in wanted if (row, seed) not in found]
    codes = sorted({str(evaluation.fact("git", "unknown")) for evaluation in found.values()})
    mini = any(evaluation.is_mini for evaluation in found.values())
    return Outcome(table, lines, differences, missing, list(seeds), codes, seconds, mini)


def _scores(evaluation: Evaluation, split: str, protocol: str) -> Mapping[str, Any]:
    try:
        return evaluation.metrics[split]["scores"][protocol]
    except KeyError as error:
        raise DataError(
            f"{evaluation.folder}: no scores of split {split} under protocol {protocol} ({error}). "
            "Remedy: evaluate again with the shipped configuration."
        ) from error


def _line(table: Table, row: str, split: str, own: Sequence[Evaluation]) -> Line:
    scores = [_scores(evaluation, split, table.protocol) for evaluation in own]
    means = {name: mean_of([s[name] for s in scores]) for name in SCORES}
    means |= {name: mean_of([e.metrics[split]["scores"][name] for e in own]) for name in table.extras}
    return Line(row, split, table.published(row, split), means, scores[0]["n"])


def _difference(
    table: Table, row: str, base: str, split: str, both: Sequence[tuple[Evaluation, Evaluation]]
) -> Difference:
    points = [_scores(a, split, table.protocol)["J&F"] - _scores(b, split, table.protocol)["J&F"] for a, b in both]
    changes: dict[int, list[float]] = {}
    clips: dict[int, str] = {}
    for ours, theirs in both:
        for number in shared_rows(ours, theirs):
            one, other = ours.rows[number], theirs.rows[number]
            if one.split == split and one.jf is not None and other.jf is not None:
                changes.setdefault(number, []).append(one.jf - other.jf)
                clips[number] = one.audio
    if not changes:
        raise DataError(
            f"{both[0][0].folder}: no row of split {split} is shared with {both[0][1].folder}. "
            "Remedy: evaluate both on the same data."
        )
    means = np.array([[float(np.mean(values))] for values in changes.values()])
    ours, theirs = (table.published(name, split)[2:] for name in (row, base))
    paper = None if None in (*ours, *theirs) or not (ours and theirs) else round(ours[0] - theirs[0], 1)
    over_clips = mean_intervals(means, list(clips.values()))[0]
    return Difference(row, base, split, paper, mean_of(points), over_clips)


def score_cells(found: Outcome) -> Cells:
    """Header and one line per row and split: n, the paper's scores, ours with standard deviation."""
    paper = found.table.is_paper
    printed = [f"{s} paper" for s in SCORES] if paper else []
    ours = [f"{s} ours" if paper else s for s in SCORES] + [name.replace("_", " ") for name in found.table.extras]
    cells = [["row", "split", "n", *printed, *ours, "seeds"]]
    for line in found.lines:
        values = ["-" if v is None else f"{v:.1f}" for v in line.paper or (None,) * 3] if paper else []
        means = [f"{m.value:.1f}" + ("" if m.deviation is None else f" ± {m.deviation:.1f}")
                 for m in line.scores.values()]  # fmt: skip
        cells.append([line.row, SPLIT_TITLES[line.split], str(line.n), *values, *means, str(line.scores["J"].seeds)])
    return cells


def difference_cells(found: Outcome) -> Cells:
    """Header and one line per difference to the row that the others are compared with."""
    base = {-1: "the last row", 0: "the first row"}[found.table.against]
    cells = [[f"J&F against {base}", "split", "paper", "ours", "95 % over seeds", "95 % over clips", "paper's sign",
              "significant"]]  # fmt: skip
    words = {True: "yes", False: "no", None: "-"}
    for d in found.differences:
        bounds = ["-" if b is None else f"{b[0]:+.1f} to {b[1]:+.1f}" for b in (d.over_seeds.interval, d.clips)]
        significant = "one seed" if d.over_seeds.interval is None else words[d.significant]
        cells.append([f"{d.row} - {d.against}", SPLIT_TITLES[d.split], "-" if d.paper is None else f"{d.paper:+.1f}",
                      f"{d.over_seeds.value:+.2f}", *bounds, words[d.agrees], significant])  # fmt: skip
    return cells if found.table.is_paper else [[*line[:2], *line[3:6], line[7]] for line in cells]


def open_questions(found: Outcome) -> dict[str, str]:
    """Differences that do not repeat the paper's, of the other sign or not told from chance: "row on split" -> how."""
    return {
        f"{d.row} on {SPLIT_TITLES[d.split]}": f"({'' if d.agrees else 'not '}the paper's sign, "
        f"{'significant' if d.significant else 'not told from chance'})"
        for d in found.differences
        if d.agrees is not None and not (d.agrees and d.significant)
    }


def caption(found: Outcome) -> list[str]:
    """What is to be known to read the table, line by line."""
    seeds = ", ".join(map(str, found.seeds))
    unsure = "; ".join(map(" ".join, open_questions(found).items()))
    lines = [
        MINI if found.mini else "",
        f"Protocol {found.table.protocol}, percent; ours: mean and standard deviation over seeds {seeds}.",
        found.table.remark,
        f"Not finished: {'; '.join(found.missing)}." if found.missing else "",
        f"Not significant, or against the paper's sign: {unsure}." if unsure else "",
        f"Time of all runs behind it: {found.seconds / 60:.0f} minutes. Code: {', '.join(found.codes) or '-'}.",
    ]
    return [line for line in lines if line]


def markdown(found: Outcome, level: int = 1) -> str:
    """The table with its caption and differences."""
    parts = [f"{'#' * level} {found.heading}", *caption(found)]
    parts += [] if found.lines else ["No run has finished."]
    for cells in _tables(found):
        lines = ["| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in cells]
        parts.append("\n".join([lines[0], "|" + "---|" * len(cells[0]), *lines[1:]]))
    return "\n\n".join(parts) + "\n"


def html(found: Outcome) -> str:
    """A page of its own, without scripts."""
    notes = [{"kind": "note", "text": line} for line in caption(found)]
    named = zip(("scores", "differences"), _tables(found), strict=False)
    grids = [PageTable(f"{found.heading}, {name}", header, lines) for name, (header, *lines) in named]
    return render_template(found.heading, blocks=[*notes, *grids])


def csv_text(found: Outcome) -> str:
    """One line per row, split and score, in full precision."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["table", "row", "split", "score", "paper", "mean", "deviation", "seeds", "n", "protocol", "mini"])
    for line in found.lines:
        paper = dict(zip(SCORES, line.paper, strict=False))
        for name, m in line.scores.items():
            writer.writerow([found.table.name, line.row, line.split, name, paper.get(name), m.value, m.deviation,
                             m.seeds, line.n, found.table.protocol, int(found.mini)])  # fmt: skip
    return out.getvalue()


def to_json(found: Outcome) -> dict[str, Any]:
    """The outcome as plain values, for other programs."""
    name = int(found.table.name) if found.table.is_paper else found.table.name
    return {
        "table": name, "protocol": found.table.protocol, "seeds": found.seeds, "mini": found.mini,
        "missing": found.missing, "git": found.codes, "seconds": round(found.seconds, 1),
        "differences": [
            {"row": d.row, "against": d.against, "split": d.split, "paper": d.paper, "ours": d.over_seeds.value,
             "over_seeds": d.over_seeds.interval, "over_clips": d.clips, "agrees": d.agrees,
             "significant": d.significant}
            for d in found.differences
        ],
    }  # fmt: skip


def write_table(found: Outcome, path: Path) -> str:
    """Writes <path>.md, .html, .csv and .json; returns the Markdown."""
    texts = {".md": markdown(found), ".html": html(found), ".csv": csv_text(found)}
    for suffix, text in texts.items():
        write_bytes(path.with_suffix(suffix), text.encode())
    write_json(path.with_suffix(".json"), to_json(found))
    return texts[".md"]


def document(outcomes: Sequence[Outcome], seconds: float, before: str = "") -> str:
    """All tables in one Markdown file; lines of other hands between a table's note marks in `before` are kept.

    Args:
        outcomes: of the tables.
        seconds: of all finished runs, each counted once.
        before: the file as it is.
    """
    parts = ["# Ablations on the mini world", MINI, INTRODUCTION, f"All finished runs: {seconds / 3600:.1f} hours.\n"]
    for found in outcomes:
        mark = f"notes of table {found.table.name}"
        parts.append(f"{markdown(found, 2)}\n<!-- {mark} -->\n{_notes(found, mark, before)}<!-- end -->\n")
    return "\n\n".join(parts)


def _notes(found: Outcome, mark: str, before: str) -> str:
    """What was written between the marks, and a line for each open question that it does not speak of."""
    old = re.search(rf"<!-- {mark} -->\n(.*?)<!-- end -->", before, re.DOTALL)
    lines = (old[1] if old else "").splitlines(True)
    kept = "".join(line for line in lines if not line.startswith("Open question: "))
    words = " ".join(kept.split())  # a name may run over the end of a line
    unsaid = [(name, how) for name, how in open_questions(found).items()
              if not re.search(rf"{re.escape(name)}\b", words)]  # fmt: skip
    return kept + "".join(f"Open question: {name} {how}.\n" for name, how in unsaid)


def _tables(found: Outcome) -> list[Cells]:
    return [score_cells(found)] * bool(found.lines) + [difference_cells(found)] * bool(found.differences)
