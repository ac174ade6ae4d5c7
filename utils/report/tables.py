"""The tables of a report as plain values, which page.html.jinja draws. All scores are in percent."""

from __future__ import annotations

import base64
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np

from utils.paper import SPLITS, STAGES, TABLE_1, TABLE_6, Published, stage_key
from utils.report.breakdown import DRAWS, SCORES, TIE, Comparison, Estimate, Group
from utils.report.runs import SPLIT_ORDER
from utils.results import decode_masks
from utils.scoring import ROW_PROTOCOL
from utils.tables import Cell, signed

Block = Any
"""A Table, or a dict whose `kind` names the macro of page.html.jinja that draws it."""
PROTOCOLS = {
    "official": "256 x 256, J at 0.4, F and S pooled over 4 expressions",
    ROW_PROTOCOL: "native size, J at 0.5, every expression on its own",
}
MINI_TITLE = "Mini world (synthetic clips)"
MINI_NOTE = "Mini world: synthetic clips. These numbers say nothing about Ref-AVS and do not compare with the paper's."
AVSBENCH = {"avsbench_s4": "AVSBench S4", "avsbench_ms3": "AVSBench MS3"}
FOLDED = 8
"""A breakdown of more groups is folded."""
MASK_HEIGHT = 36
"""Pixels of a frame's mask beside a sampled answer."""
_NUMERIC = re.compile(r"(?:[-+±\d.,\[\]→ \u00a0]|to)*")


@dataclass(frozen=True)
class Table:
    """A table in a box that scrolls by itself."""

    label: str
    """Name for screen readers."""
    header: Sequence[Cell]
    rows: Sequence[Sequence[Any]]
    """Cells: text, numbers, or a dict (`_bar`, a link to a row, a sampled answer); a row's first is its heading."""
    marks: Sequence[str] = ()
    """CSS class of each row, where not all are alike."""
    groups: Sequence[tuple[str, int]] = ()
    """(title, columns) of a line above the header."""
    spans: Sequence[int] = ()
    """Rows that the heading of each row covers, 0 where one above covers it; none = each its own."""
    title: str = ""
    note: str = ""
    folded: str = ""
    """What is read where the table is folded; not folded without."""
    kind: str = "table"

    @property
    def wordy(self) -> set[int]:
        """Columns that hold words, which are aligned to the left."""
        return {i for row in self.rows for i, value in enumerate(row) if i and is_wordy(value)}


def is_wordy(value: Any) -> bool:
    """Whether a cell reads as words; numbers, intervals and bars do not."""
    if isinstance(value, Mapping):
        return value["kind"] == "answer"
    return isinstance(value, str) and not _NUMERIC.fullmatch(value)


def mini_banner(stages: Mapping[str, Any]) -> str:
    """A warning where evaluations on synthetic clips are shown, which names them if there are others too."""
    mini = [name for name, stage in stages.items() if stage.get("mini")]
    which = "" if len(mini) == len(stages) else f" Here: {', '.join(mini)}."
    return MINI_NOTE + which if mini else ""


def headline(stages: Mapping[str, Any]) -> dict[str, Any]:
    """The last stage at a glance: `values` and `words` about them; empty without an evaluation of test_s.

    That of the mini world only where none was evaluated on Ref-AVS.
    """
    ordered = {**_select(stages, "refavs", mini=True), **_select(stages, "refavs", mini=False)}
    found = [name for name, stage in ordered.items() if "J" in _scores(stage, "test_s")]
    if not found:
        return {}
    stage = stages[found[-1]]
    seen, unseen, null = (_scores(stage, split) for split in ("test_s", "test_u", "test_n"))
    values = {
        "J&F, seen": seen["J&F"], "J&F, unseen": unseen.get("J&F"), "S, null (lower is better)": null.get("S"),
        "class accuracy": stage.get("class_accuracy"), "faithful reasoning": stage.get("faithful"),
    }  # fmt: skip
    where = "mini world, synthetic; " if stage.get("mini") else ""
    return {
        "words": f"{found[-1]}: {where}protocol official, percent.",
        "values": {name: value for name, value in values.items() if value is not None},
    }


def stage_tables(stages: Mapping[str, Any]) -> list[Block]:
    """Every stage under both protocols, those of the mini world in tables of their own.

    Under the official protocol each stage on Ref-AVS is followed by what the paper reports for it.
    """
    blocks: list[Block] = []
    for mini in (False, True):
        found = _select(stages, "refavs", mini)
        blocks += [{"kind": "heading", "text": MINI_TITLE}] if mini and found else []
        blocks += [table for protocol in PROTOCOLS if (table := _stage_table(found, protocol, mini))]
    return blocks


def _stage_table(stages: Mapping[str, Any], protocol: str, mini: bool) -> Table | None:
    # val is a column only where it was evaluated; null references have S alone
    tests = (["val"] if any(stage.get("val") for stage in stages.values()) else []) + list(SPLITS)
    of = {name: {s: _scores(stage, s, protocol) for s in (*tests, "test_n")} for name, stage in stages.items()}
    rows: list[list[Cell]] = []
    marks = []
    given = []
    for name, stage in stages.items():
        if not any(of[name].values()):
            continue
        cells = [of[name][split].get(m) for split in tests for m in SCORES]
        counted = sum(stage[split]["n"] for split in SPLIT_ORDER if stage.get(split))
        shares = [stage.get("class_accuracy"), stage.get("faithful")]
        rows.append([name, *cells, of[name]["test_n"].get("S"), *shares, counted])
        marks.append("")
        given += [name] if stage.get("answers") == "given" else []
        published = STAGES.get(stage_key(stage.get("trained", ""), stage.get("answer", "")))
        if published and protocol == "official" and not mini:
            printed = _published(published, tests)
            rows.append([f"paper: {published.method} ({published.group})", *printed, *[None] * 4])
            marks.append("paper")
    if not rows:
        return None
    words = [f"Protocol {protocol}: {PROTOCOLS[protocol]}. Percent; S: lower is better; mix: mean of seen and unseen; "
             "class accuracy and faithful: of the seen split, of val where that alone was evaluated."]  # fmt: skip
    words += [f"{', '.join(given)}: reads the true class instead of answering, as when it teaches."] if given else []
    words += [MINI_NOTE] if mini else []
    return Table(
        f"Scores of the stages{' on the mini world' if mini else ''}, protocol {protocol}",
        ["stage", *SCORES * len(tests), "S", "class accuracy", "faithful", "rows"],
        rows, marks, [("", 1), *((SPLITS.get(s, s), len(SCORES)) for s in tests), ("null", 1), ("", 3)],
        note=" ".join(words),
    )  # fmt: skip


def paper_table(stages: Mapping[str, Any]) -> list[Block]:
    """Table 1 of the paper with our stages on Ref-AVS below it; those on synthetic clips have no place there."""
    ours = {
        name: [_scores(stage, split).get(m) for split in SPLITS for m in SCORES]
        for name, stage in _select(stages, "refavs", mini=False).items()
    }
    rows = [[name, "this report", *cells] for name, cells in ours.items() if any(c is not None for c in cells)]
    if not rows:
        return []
    words = "Table 1 of the paper as printed (Mix J&F of CRAB and AURORA do not follow from their neighbours there). "
    return [Table(
        "Table 1 of the paper and this report",
        ["method", "kind", *SCORES * len(SPLITS)],
        [*([line.method, line.group, *_published(line)] for line in TABLE_1), *rows],
        [""] * len(TABLE_1) + ["ours"] * len(rows),
        [("", 2), *((title, len(SCORES)) for title in SPLITS.values())],
        note=words + "Our rows: protocol official, evaluated on Ref-AVS.",
    )]  # fmt: skip


def avsbench_tables(stages: Mapping[str, Any]) -> list[Block]:
    """AVSBench under its own protocol and per expression; S4 of real clips beside the paper's Table 6."""
    found = [_avsbench_table(_select(stages, b, mini), b, mini) for b in AVSBENCH for mini in (False, True)]
    return [table for table in found if table]


def _avsbench_table(stages: Mapping[str, Any], benchmark: str, mini: bool) -> Table | None:
    if not stages:
        return None
    published = TABLE_6 if benchmark == "avsbench_s4" and not mini else {}
    rows: list[list[Cell]] = [
        [name, "paper, Table 6", None, f"{j:.1f}", f"{f:.1f}", *[None] * 6] for name, (j, f) in published.items()
    ]
    for name, stage in stages.items():
        for split in (s for s in ("test", "val", "train") if stage.get(s)):
            own = _scores(stage, split) if "J" in stage[split] else {}
            cells = [scores.get(m) for scores in (own, _scores(stage, split, ROW_PROTOCOL)) for m in SCORES]
            rows.append([name, "this report", split, *cells, stage[split].get("class_accuracy"), stage[split]["n"]])
    protocol = benchmark.removeprefix("avsbench_")
    title = AVSBENCH[benchmark] + (", synthetic clips" if mini else "")
    words = f"{title}, protocol {protocol}: 224 x 224, J at 0.5, F pooled over 4 clips. Percent."
    words += " The paper leaves MS3 out: one [SEG], one object." if protocol == "ms3" else ""
    words += " Synthetic clips: these numbers say nothing about AVSBench." if mini else ""
    return Table(
        f"Scores on {title}",
        ["method", "kind", "split", *SCORES * 2, "class accuracy", "rows"],
        rows, [""] * len(published) + ["ours"] * (len(rows) - len(published)),
        [("", 3), (f"protocol {protocol}", len(SCORES)), (ROW_PROTOCOL, len(SCORES)), ("", 2)],
        title=title, note=words,
    )  # fmt: skip


def breakdown_tables(evaluations: Mapping[str, Mapping[str, Mapping[str, Group]]]) -> list[Block]:
    """One table per dimension; in each group the evaluations follow each other, so that their bars compare.

    Args:
        evaluations: name -> its dimensions (`breakdown.break_down`).
    """
    words = (
        f"Protocol per_expression, percent: mean and 95 % interval of {DRAWS} resamples of whole clips, as expressions "
        "about one clip are not independent. Bar and interval: the last score, 0 to 100. Class: share of the answers "
        "that name the right one."
    )
    titles = dict.fromkeys(title for dimensions in evaluations.values() for title in dimensions)
    found = [
        _dimension_table(title, {name: of[title] for name, of in evaluations.items() if title in of})
        for title in titles
    ]
    return _after_note(words, found)


def _dimension_table(title: str, found: Mapping[str, Mapping[str, Group]]) -> Table:
    names = dict.fromkeys(name for groups in found.values() for name in groups)
    metrics = dict.fromkeys(m for groups in found.values() for group in groups.values() for m in group.scores)
    rows, spans = [], []
    for group_name in names:
        inside = [(name, groups[group_name]) for name, groups in found.items() if group_name in groups]
        spans += [len(inside), *[0] * (len(inside) - 1)]
        for name, group in inside:
            last = group.scores[next(reversed(metrics))]
            means = [_one(group.scores[m].mean) for m in metrics]
            rows.append([group_name, name, last.rows, *means, _interval(last), _bar(last), _one(group.class_accuracy)])
    header = [title.lower(), "evaluation", "rows", *metrics, "95 % interval", "\u00a0", "class"]
    folded = f"{len(names)} groups" if len(names) > FOLDED else ""
    return Table(f"Scores by {title.lower()}", header, rows, spans=spans, title=title, folded=folded)


def probe_tables(stages: Mapping[str, Any], probes: Mapping[str, Any]) -> list[Block]:
    """The same questions with the sound or the frames of another clip, by question kind; a table per probed stage."""
    by_stage: dict[str, dict[str, Any]] = {}
    for name, probe in probes.items():
        found, kind = by_stage.setdefault(probe.get("stage", next(reversed(stages), "")), {}), probe.get("probe", name)
        found[name if kind in found else kind] = probe
    words = "The same questions with the sound or the frames of another clip (zero_audio: with silence): what falls "
    words += "was used. J&F of test_s, protocol official, percent."
    drawn = [_probe_table(n, stages[n], found) for n, found in by_stage.items() if stages.get(n, {}).get("test_s")]
    return [*drawn, {"kind": "note", "text": words}] if drawn else []


def _probe_table(name: str, base: Mapping[str, Any], probes: Mapping[str, Any]) -> Table:
    rows: list[list[Cell]] = []
    for kind, scores in {"all": base.get("test_s"), **base.get("kinds", {})}.items():
        plain = (scores or {}).get("J&F")
        row: list[Cell] = [kind, plain]
        for probe in probes.values():
            probed = (probe.get("test_s") if kind == "all" else probe.get("kinds", {}).get(kind)) or {}
            value = probed.get("J&F")
            row += [value, None if value is None or plain is None else signed(value - plain, 2)]
        rows.append(row)
    header = [f"{name}, by kind", "as it is", *[part for probe in probes for part in (probe, "change")]]
    return Table(f"Probes of {name} by question kind", header, rows)


def comparison_blocks(comparisons: Sequence[Comparison]) -> list[Block]:
    """Comparisons that unfold, the first unfolded: totals and groups, then the rows that changed most."""
    words = "Each row against itself, as both evaluations answered the same question. A row's number opens its clip."
    found = [_comparison(comparison, i == 0) for i, comparison in enumerate(comparisons)]
    return _after_note(words, found)


def _comparison(c: Comparison, opened: bool) -> Block:
    whole, title = c.groups["all rows"], f"{c.after} against {c.before}"
    groups = [
        [name, g.change.rows, _one(g.before), _one(g.after), signed(g.change.mean, 1), _interval(g.change, True),
         g.wins, g.losses]
        for name, g in c.groups.items()
    ]  # fmt: skip
    header = ["rows of", "rows", c.before, c.after, "change of J&F", "95 % interval", "wins", "losses"]
    words = (
        f"Rows with an object that both predicted, protocol per_expression. The right class is named by {c.after} "
        f"alone in {c.class_won} rows, by {c.before} alone in {c.class_lost}."
    )
    tables = [Table(f"{title}, by group", header, groups, note=words)]
    for name, changes in (("Largest gains", c.gains), ("Largest losses", c.losses)):
        rows = [
            [{"kind": "row", "row": new.row, "run": c.after, "beside": c.before}, new.reference, new.kind,
             new.class_name, f"{old.answer_class or 'none'} → {new.answer_class or 'none'}",
             f"{old.jf:.1f} → {new.jf:.1f}", signed(change.points, 1)]
            for change in changes for old, new in [(change.before, change.after)]
        ]  # fmt: skip
        header = ["row", "reference", "kind", "target", "answers", "J&F", "change"]
        tables += [Table(f"{name}, {title}", header, rows, title=name)] if rows else []
    return {
        "kind": "comparison", "open": opened, "title": title, "tables": tables, "wins": whole.wins, "tie": f"{TIE:g}",
        "losses": whole.losses, "ties": whole.change.rows - whole.wins - whole.losses,
        "change": f"{signed(whole.change.mean, 1)} {_interval(whole.change, True) or ''}".strip(),
    }  # fmt: skip


def failure_table(lines: Sequence[Mapping[str, str]]) -> list[Block]:
    """The taxonomy of mined failures beside the paper's Figure 4.

    Args:
        lines: of the CSV that scripts/analyze_failures.py writes.
    """
    rows = [
        [line["type"].replace("_", " "), line["family"], int(line["count"]), f"{float(line['percent']):.1f}",
         _bar(Estimate(float(line["percent"]), None, None, 0, 0)), int(line["paper_count"]),
         f"{float(line['paper_percent']):.1f}"]
        for line in lines
    ]  # fmt: skip
    total = sum(int(line["count"]) for line in lines)
    words = f"{total} failures of this run by type; the paper's Figure 4 counts those of Qwen-Omni on Ref-AVS."
    header = ["type", "family", "failures", "%", "\u00a0", "paper", "paper %"]
    return [Table("Failures by type", header, rows, note=words)] if rows else []


def sample_tables(runs: Mapping[str, Sequence[Sequence[Mapping[str, Any]]]]) -> list[Block]:
    """One folded table per group of answers that stage 3 sampled.

    Args:
        runs: name of a run -> its `runs.read_groups`.
    """
    words = "Answers that training drew, with their rewards. Masks: prediction per frame; * marks answers whose masks "
    words += "were trained."
    found = [_sample_table(name, group) for name, groups in runs.items() for group in groups]
    return _after_note(words, found)


def _sample_table(run: str, group: Sequence[Mapping[str, Any]]) -> Table:
    first = group[0]
    rows = [
        [
            f"{one['sample'] + 1}{'*' if one['mask_trained'] else ''}",
            *[f"{one['rewards'][name]:.2f}" for name in first["rewards"]],
            f"{one['reward']:.2f}",
            f"{one['advantage']:+.2f}",
            f"{one['tokens']}{' (cut)' if one['truncated'] else ''}",
            {"kind": "answer", "text": one["answer"], "src": _mask_strip(one["masks"]),
             "alt": f"masks of answer {one['sample'] + 1}, IoU {one['iou']:.2f}"},
        ]
        for one in group
    ]  # fmt: skip
    title = f"{run}, step {first['step']}: {first['reference']} ({first['class_name']}, row {first['row']})"
    return Table(title, ["answer", *first["rewards"], "reward", "advantage", "tokens", "text"], rows, folded=title)


def _mask_strip(encoded: Sequence[dict[str, Any]]) -> str:
    """The masks of an answer side by side, white on black, as a data: address; empty without masks."""
    if not encoded:
        return ""
    masks = decode_masks(encoded)
    width = max(1, round(MASK_HEIGHT * masks.shape[2] / masks.shape[1]))
    frames = [cv2.resize(m.astype(np.uint8) * 255, (width, MASK_HEIGHT), interpolation=cv2.INTER_AREA) for m in masks]
    edged = [np.pad(frame, ((0, 0), (0, 2)), constant_values=128) for frame in frames]
    picture = cv2.imencode(".png", np.hstack(edged))[1].tobytes()
    return f"data:image/png;base64,{base64.b64encode(picture).decode()}"


def seconds_table(seconds: Mapping[str, float]) -> list[Block]:
    """Time of each step."""
    rows = [[name, float(value)] for name, value in seconds.items()]
    return [Table("Seconds per step", ["step", "seconds"], rows)] if rows else []


def _after_note(words: str, blocks: list[Block]) -> list[Block]:
    return [{"kind": "note", "text": words}, *blocks] if blocks else []


def _interval(estimate: Estimate, of_change: bool = False) -> str | None:
    if estimate.low is None:
        return None
    low, high = (signed(v, 1) if of_change else f"{v:.1f}" for v in (estimate.low, estimate.high))
    return f"[{low}, {high}]"


def _bar(estimate: Estimate) -> dict[str, Any]:
    """Mean as a bar, interval as a line over it, in percent of the cell; other cells hold the numbers."""
    low, high = (None if v is None else round(v, 1) for v in (estimate.low, estimate.high))
    return {"kind": "bar", "mean": round(estimate.mean, 1), "low": low, "high": high}


def _one(value: float | None) -> str | None:
    return None if value is None else f"{value:.1f}"


def _published(line: Published, splits: Sequence[str] = tuple(SPLITS)) -> list[Cell]:
    return [_one(value) for split in splits for value in line.scores.get(split, (None,) * len(SCORES))]


def _select(stages: Mapping[str, Any], benchmark: str, mini: bool) -> dict[str, Any]:
    """The stages that were evaluated on a benchmark, or on synthetic clips in its layout."""
    wanted = (benchmark, mini)
    return {n: s for n, s in stages.items() if (s.get("benchmark", "refavs"), bool(s.get("mini"))) == wanted}


def _scores(stage: Mapping[str, Any], split: str, protocol: str = "official") -> Mapping[str, Any]:
    """J, F, J&F or S of a split: official ones (AVSBench: its own) lie beside n, the others one level below."""
    found = stage.get(split) or {}
    found = found if protocol == "official" else found.get(protocol, {})
    return {name: found[name] for name in (*SCORES, "S") if name in found}
