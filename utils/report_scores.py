"""The scores of a report's evaluations as HTML tables, beside what the paper reports. All numbers are in percent."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from typing import Any

from utils.paper import SPLITS, STAGES, TABLE_1, TABLE_6, Published, stage_key
from utils.report_tables import note, table
from utils.tables import Cell

PROTOCOLS = {
    "official": "256 x 256, J at 0.4, F and S pooled over 4 expressions",
    "per_expression": "native size, J at 0.5, every expression on its own",
}
METRICS = ("J", "F", "J&F")
MINI_NOTE = "Mini world: synthetic clips. These numbers say nothing about Ref-AVS and do not compare with the paper's."
MINI_TITLE = "Mini world (synthetic clips)"
AVSBENCH = {"avsbench_s4": "AVSBench S4", "avsbench_ms3": "AVSBench MS3"}
REFAVS_SPLITS = ("val", "test_s", "test_u", "test_n")


def headline(stages: Mapping[str, Any]) -> str:
    """The last stage at a glance; empty without a Ref-AVS evaluation of test_s."""
    found = [name for name, stage in _of_benchmark(stages, "refavs").items() if "J" in _open(stage, "test_s")]
    if not found:
        return ""
    stage = stages[found[-1]]
    seen, unseen, null = (_open(stage, split) for split in ("test_s", "test_u", "test_n"))
    values = {
        "J&F, seen": seen["J&F"], "J&F, unseen": unseen.get("J&F"), "S, null (lower is better)": null.get("S"),
        "class accuracy": stage.get("class_accuracy"), "faithful reasoning": stage.get("faithful"),
    }  # fmt: skip
    tiles = "".join(
        f"<div><dt>{escape(name)}</dt><dd>{value:.1f}</dd></div>" for name, value in values.items() if value is not None
    )
    where = "mini world, synthetic; " if stage.get("mini") else ""
    words = f"{found[-1]}: {where}protocol official, percent."
    return f'<dl class="tiles" aria-label="{escape(words)}">{tiles}</dl>{note(words)}'


def stage_tables(stages: Mapping[str, Any]) -> str:
    """Every stage under both protocols, those of the mini world in tables of their own.

    Under the official protocol each stage on Ref-AVS is followed by what the paper reports for it.
    """
    ours = _of_benchmark(stages, "refavs")
    real, mini = _of_data(ours, mini=False), _of_data(ours, mini=True)
    tables = [_stage_table(real, protocol, False) for protocol in PROTOCOLS]
    tables += [f"<h3>{escape(MINI_TITLE)}</h3>"] * bool(mini)
    return "".join([*tables, *(_stage_table(mini, protocol, True) for protocol in PROTOCOLS)])


def _stage_table(stages: Mapping[str, Any], protocol: str, mini: bool) -> str:
    of = {name: {split: _scores(stage, split, protocol) for split in _columns(stages)}
          for name, stage in stages.items()}
    stages = {name: stage for name, stage in stages.items() if any(of[name].values())}
    if not stages:
        return ""
    columns = _columns(stages)
    header = ["stage", *METRICS * (len(columns) - 1), "S", "class accuracy", "faithful", "rows"]
    groups = [("", 1), *((title, len(METRICS)) for title in list(columns.values())[:-1]), ("null", 1), ("", 3)]
    rows: list[list[Cell]] = []
    marks = []
    for name, stage in stages.items():
        cells = [of[name][split].get(m) for split in list(columns)[:-1] for m in METRICS]
        counted = sum(stage[split]["n"] for split in REFAVS_SPLITS if stage.get(split))
        rows.append([name, *cells, of[name]["test_n"].get("S"), stage.get("class_accuracy"), stage.get("faithful"),
                     counted])
        marks.append("")
        published = STAGES.get(stage_key(stage.get("trained", ""), stage.get("answer", "")))
        if published and protocol == "official" and not mini:
            heading, printed = f"paper: {published.method} ({published.group})", _published(published)
            rows.append([heading, *[None] * (len(header) - len(printed) - 5), *printed, *[None] * 4])
            marks.append("paper")
    words = f"Protocol {protocol}: {PROTOCOLS[protocol]}. Percent; S: lower is better; mix: mean of seen and unseen; "
    words += "class accuracy and faithful: of the seen split, of val where that alone was evaluated."
    given = [name for name, stage in stages.items() if stage.get("answers") == "given"]
    if given:
        words += f" {', '.join(given)}: reads the true class instead of answering, as when it teaches."
    if mini:
        words += f" {MINI_NOTE}"
    label = f"Scores of the stages{' on the mini world' if mini else ''}, protocol {protocol}"
    return table(label, header, rows, marks, groups) + note(words)


def _columns(stages: Mapping[str, Any]) -> dict[str, str]:
    """Split -> title, test_n last; val only where it was evaluated."""
    val = {"val": "val"} if any(stage.get("val") for stage in stages.values()) else {}
    return {**val, **SPLITS, "test_n": "null"}


def paper_table(stages: Mapping[str, Any]) -> str:
    """Table 1 of the paper with our stages on Ref-AVS below it; those on synthetic clips have no place there."""
    rows: list[list[Cell]] = [[line.method, line.group, *_published(line)] for line in TABLE_1]
    marks = [""] * len(rows)
    for name, stage in _of_data(_of_benchmark(stages, "refavs"), mini=False).items():
        cells = [_open(stage, split).get(m) for split in SPLITS for m in METRICS]
        if any(cell is not None for cell in cells):
            rows.append([name, "this report", *cells])
            marks.append("ours")
    if "ours" not in marks:
        return ""
    header = ["method", "kind", *METRICS * len(SPLITS)]
    groups = [("", 2), *((title, len(METRICS)) for title in SPLITS.values())]
    words = "Table 1 of the paper as printed (Mix J&F of CRAB and AURORA do not follow from their neighbours there). "
    words += "Our rows: protocol official, evaluated on Ref-AVS."
    return table("Table 1 of the paper and this report", header, rows, marks, groups) + note(words)


def avsbench_tables(stages: Mapping[str, Any]) -> str:
    """AVSBench under its own protocol and per expression; S4 of real clips beside the paper's Table 6."""
    return "".join(
        _avsbench_table(_of_data(stages, mini), benchmark, mini) for benchmark in AVSBENCH for mini in (False, True)
    )


def _avsbench_table(stages: Mapping[str, Any], benchmark: str, mini: bool) -> str:
    title, ours = AVSBENCH[benchmark] + (", synthetic clips" if mini else ""), _of_benchmark(stages, benchmark)
    if not ours:
        return ""
    rows: list[list[Cell]] = []
    if benchmark == "avsbench_s4" and not mini:
        rows = [[name, "paper, Table 6", None, f"{j:.1f}", f"{f:.1f}", *[None] * 6] for name, (j, f) in TABLE_6.items()]
    marks = [""] * len(rows)
    for name, stage in ours.items():
        for split in (s for s in ("test", "val", "train") if stage.get(s)):
            found = stage[split]
            own, single = found if "J" in found else {}, found.get("per_expression", {})
            scores = [scores.get(m) for scores in (own, single) for m in METRICS]
            rows.append([name, "this report", split, *scores,
                         found.get("class_accuracy"), found["n"]])
            marks.append("ours")
    protocol = benchmark.removeprefix("avsbench_")
    header = ["method", "kind", "split", *METRICS * 2, "class accuracy", "rows"]
    groups = [("", 3), (f"protocol {protocol}", len(METRICS)), ("per_expression", len(METRICS)), ("", 2)]
    words = f"{title}, protocol {protocol}: 224 x 224, J at 0.5, F pooled over 4 clips. Percent."
    words += " The paper leaves MS3 out: one [SEG], one object." if protocol == "ms3" else ""
    words += " Synthetic clips: these numbers say nothing about AVSBench." if mini else ""
    return f"<h3>{title}</h3>" + table(f"Scores on {title}", header, rows, marks, groups) + note(words)


def _published(line: Published) -> list[Cell]:
    nothing = (None,) * len(METRICS)
    values = [value for split in SPLITS for value in line.scores.get(split, nothing)]
    return [None if value is None else f"{value:.1f}" for value in values]


def _of_benchmark(stages: Mapping[str, Any], benchmark: str) -> dict[str, Any]:
    return {name: stage for name, stage in stages.items() if stage.get("benchmark", "refavs") == benchmark}


def _of_data(stages: Mapping[str, Any], mini: bool) -> dict[str, Any]:
    """The stages that were evaluated on synthetic clips, or the others."""
    return {name: stage for name, stage in stages.items() if bool(stage.get("mini")) == mini}


def _open(stage: Mapping[str, Any], split: str) -> Mapping[str, Any]:
    return _scores(stage, split, "official")


def _scores(stage: Mapping[str, Any], split: str, protocol: str) -> Mapping[str, Any]:
    """J, F, J&F or S of a split: official ones stand in the open, the others one level below."""
    found = stage.get(split) or {}
    found = found if protocol == "official" else found.get(protocol, {})
    return {name: found[name] for name in (*METRICS, "S") if name in found}
