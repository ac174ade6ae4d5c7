"""Reads what evaluations and training runs left: metrics.json, predictions.jsonl, samples.jsonl, failure types."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from utils.errors import DataError
from utils.scoring import ROW_PROTOCOL
from utils.tables import format_table, mix_scores

SPLIT_ORDER = ("val", "test_s", "test_u", "test_n")
MINI_FILES = frozenset({"mini_truth.jsonl", "mini_s4.json"})
"""Only synthetic data (the mini world, its S4) have one of these, so an evaluation that names it was made on them."""
SAMPLED_GROUPS = 3
"""Groups of sampled answers shown of the first logged step and of the last."""
_SHARES = ("class_accuracy", "format_share", "faithful")


@dataclass(frozen=True)
class PredictedRow:
    """One line of predictions.jsonl; scores are of this row alone (protocol per_expression), in percent."""

    row: int
    uid: str
    split: str
    reference: str
    kind: str
    class_name: str
    text: str
    answer_class: str | None
    has_seg: bool
    faithful: bool | None
    scores: Mapping[str, float]
    """J and F, or S where nothing answers to the reference."""
    video: str
    """Clip whose frames the language model saw."""
    audio: str
    """Clip whose sound it heard."""
    masks: tuple[dict[str, Any], ...]
    """Predicted COCO RLE per frame."""
    clip: str
    """Folder of the row's own clip."""

    @property
    def is_null(self) -> bool:
        """Whether nothing in the clip answers to the reference."""
        return "S" in self.scores

    @property
    def class_right(self) -> bool | None:
        """Whether the answer names the true class; None where the benchmark names no class (AVSBench MS3)."""
        return self.answer_class == self.class_name if self.class_name else None

    @property
    def jf(self) -> float | None:
        """J&F; None for a null row."""
        return None if "J" not in self.scores else (self.scores["J"] + self.scores["F"]) / 2

    @staticmethod
    def from_json(record: Mapping[str, Any], benchmark: str = "refavs") -> PredictedRow:
        """One line of predictions.jsonl; on Ref-AVS the uid is <clip>_<object>_<number>, on AVSBench the clip."""
        same = ("row", "uid", "split", "reference", "kind", "class_name", "answer_class", "has_seg", "faithful",
                "video", "audio")  # fmt: skip
        return PredictedRow(
            **{name: record[name] for name in same},
            text=record["reasoning"],
            scores={name: record[name] for name in ("J", "F", "S") if name in record},
            masks=tuple(record["masks"]),
            clip=record["uid"].rsplit("_", 2)[0] if benchmark == "refavs" else record["uid"],
        )


@dataclass(frozen=True)
class Evaluation:
    """All splits of one evaluation."""

    name: str
    folder: Path
    metrics: Mapping[str, Mapping[str, Any]]
    """Split -> its metrics.json."""
    rows: Mapping[int, PredictedRow]

    def fact(self, name: str, default: Any = None) -> Any:
        """A field of metrics.json that all splits share."""
        return next(iter(self.metrics.values())).get(name, default)

    def data(self, name: str, default: Any = None) -> Any:
        """A field of the configuration's section `data`."""
        return self.fact("config", {}).get("data", {}).get(name, default)

    @property
    def probe(self) -> str:
        """What was exchanged (eval.probe); "none" for an ordinary evaluation."""
        return self.fact("probe", "none")

    @property
    def checkpoint(self) -> str:
        """Digest of the weights."""
        return self.fact("checkpoint_sha256", "")

    @property
    def benchmark(self) -> str:
        """data.benchmark: rows of two benchmarks have nothing in common, whatever their numbers."""
        return self.data("benchmark", "refavs")

    @property
    def is_mini(self) -> bool:
        """Whether the data are synthetic: the mini world, or S4 made of it."""
        return is_mini(self.fact("files", {}))


def is_mini(files: Iterable[str]) -> bool:
    """Whether data are synthetic, by the names of the files in `data.root`; that folder's name may be anything."""
    return not MINI_FILES.isdisjoint(files)


def find_evaluations(folder: Path, prefix: str = "") -> list[Evaluation]:
    """The evaluations in `folder`: itself, if it holds <split>/metrics.json, else those at most two levels below.

    What scripts/mine_failures.py evaluated, the training split alone, counts only if it is named itself.

    Args:
        folder: of an evaluation, or of a run with its evaluations.
        prefix: put before each name; a folder's name loses a leading "eval_".

    Raises:
        DataError: a file of an evaluation is missing or cannot be read.
    """
    if _splits(folder):
        return [read_evaluation(folder, prefix or folder.resolve().name.removeprefix("eval_"))]
    below = [path for depth in ("*", "*/*") for path in sorted(folder.glob(depth))]
    found = [path for path in below if {file.parent.name for file in _splits(path)} - {"train"}]
    found.sort(key=lambda path: min(file.stat().st_mtime for file in _splits(path)))
    return [read_evaluation(path, prefix + path.name.removeprefix("eval_")) for path in found]


def read_evaluation(folder: Path, name: str) -> Evaluation:
    """One evaluation with all its rows.

    Raises:
        DataError: a file is missing or cannot be read; it is named, with the remedy.
    """
    metrics, rows = {}, {}
    for path in _splits(folder):
        try:
            facts = json.loads(path.read_text(encoding="utf-8"))
            benchmark = facts.get("config", {}).get("data", {}).get("benchmark", "refavs")
            with open(path.parent / "predictions.jsonl", encoding="utf-8") as lines:
                found = [PredictedRow.from_json(json.loads(line), benchmark) for line in lines]
        except (OSError, ValueError, KeyError) as error:
            raise DataError(f"{path.parent}: no complete evaluation ({error!r}). Remedy: evaluate again.") from error
        metrics[facts["split"]] = facts
        rows.update((row.row, row) for row in found)
    return Evaluation(name, folder, metrics, rows)


def shared_rows(before: Evaluation, after: Evaluation) -> list[int]:
    """Rows that both evaluations predicted, in file order.

    Raises:
        DataError: the benchmarks differ, or one number stands for different expressions.
    """
    if before.benchmark != after.benchmark:
        raise DataError(
            f"{before.folder} is of {before.benchmark} and {after.folder} of {after.benchmark}; only evaluations of "
            "one benchmark can be compared. Remedy: name two of one benchmark."
        )
    numbers = sorted(before.rows.keys() & after.rows.keys())
    for number in numbers:
        one, other = before.rows[number], after.rows[number]
        if (one.uid, one.reference) != (other.uid, other.reference):
            raise DataError(
                f"row {number} is {one.uid} in {before.folder} and {other.uid} in {after.folder}; "
                "only evaluations of one metadata.csv can be compared. Remedy: evaluate both on the same data."
            )
    return numbers


def pairs(evaluations: Iterable[Evaluation]) -> list[tuple[Evaluation, Evaluation]]:
    """What is compared by default: each stage with the one before it, each probe with its stage unprobed.

    Both are of one benchmark and of one kind of data: rows of the mini world are never paired with those of Ref-AVS.
    """
    plain: dict[tuple[str, bool], list[Evaluation]] = {}
    probes = []
    for evaluation in evaluations:
        if evaluation.probe == "none":
            plain.setdefault((evaluation.benchmark, evaluation.is_mini), []).append(evaluation)
        else:
            probes.append(evaluation)
    found = [pair for alike in plain.values() for pair in zip(alike, alike[1:], strict=False)]
    for probe in probes:
        alike = plain.get((probe.benchmark, probe.is_mini), [])
        found += [(base, probe) for base in alike if base.checkpoint == probe.checkpoint][:1]
    return found


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
        summary |= {
            "benchmark": data.get("benchmark", "refavs"), "protocol": protocol,
            "mini": is_mini(metrics.get("files", ())), "answers": metrics.get("answers", "generated"),
            "trained": metrics.get("stage", ""), "answer": data.get("answer", ""),
        }  # fmt: skip
        kinds = {name: _group_scores(group, protocol) for name, group in scores["kinds"].items()}
        found = {**_group_scores(scores, protocol), "failed": len(scores["failed"]), "kinds": kinds}
        summary[metrics["split"]] = found
    if "test_s" in summary and "test_u" in summary:
        both = summary["test_s"], summary["test_u"]
        summary["mix"] = {**mix_scores(*both), ROW_PROTOCOL: mix_scores(*(split[ROW_PROTOCOL] for split in both))}
    first = next((summary[split] for split in ("test_s", "test", "val") if split in summary), None)
    if first is not None:
        summary |= {"kinds": first.pop("kinds"), **{name: first[name] for name in _SHARES}}
    return summary


def _group_scores(scores: Mapping[str, Any], protocol: str) -> dict[str, Any]:
    """The scores of a protocol side by side with the shares, those of single rows one level below."""
    open_scores = {} if protocol == ROW_PROTOCOL else scores[protocol]
    shares = {name: scores[name] for name in _SHARES}
    return {"n": scores["n"], **open_scores, **shares, ROW_PROTOCOL: scores.get(ROW_PROTOCOL, {})}


def stage_evaluations(evaluations: Sequence[Evaluation]) -> dict[str, Evaluation]:
    """Name -> evaluation, without the probes whose weights were evaluated without a probe too.

    A probe whose weights were not is shown as a stage would be, under a name that says so.
    """
    plain = {e.checkpoint for e in evaluations if e.probe == "none"}
    found = [e for e in evaluations if e.probe == "none" or e.checkpoint not in plain]
    return {e.name if e.probe == "none" else f"{e.name} ({e.probe})": e for e in found}


def run_summary(evaluations: Sequence[Evaluation]) -> dict[str, Any]:
    """`stages` and `probes` of a report; see `stage_evaluations` and `probe_summaries`."""
    base = {e.checkpoint: e.name for e in reversed(evaluations) if e.probe == "none"}
    probes = [(e, base[e.checkpoint]) for e in evaluations if e.probe != "none" and e.checkpoint in base]
    return {
        "stages": {name: stage_summary(e.folder) for name, e in stage_evaluations(evaluations).items()},
        "probes": probe_summaries([(e.probe, stage, e.name, e.folder) for e, stage in probes]),
    }


def probe_summaries(probes: Iterable[tuple[str, str, str, Path]]) -> dict[str, dict[str, Any]]:
    """`probes` of a report: probe -> its `stage_summary` with `stage` and `probe`.

    The first probe of its kind has its kind's name (shuffle_audio, ...); further ones, of other stages, have the names
    of their evaluations, so that none replaces another.

    Args:
        probes: (probe, stage that it probes, name of the evaluation, its folder).
    """
    named: dict[str, dict[str, Any]] = {}
    for probe, stage, name, folder in probes:
        named[name if probe in named else probe] = {"stage": stage, "probe": probe, **stage_summary(folder)}
    return named


def summary_table(summary: Mapping[str, Any]) -> str:
    """Every split of every stage, then the probes, as plain text."""
    probes = {f"{p['stage']}, {p.get('probe', name)}": p for name, p in summary["probes"].items()}
    rows = [
        [name, split, *[stage[split].get(score) for score in ("J", "F", "J&F", "S", "n")]]
        for name, stage in {**summary["stages"], **probes}.items()
        for split in ("val", "test_s", "test_u", "mix", "test_n", "test")
        if split in stage
    ]
    return format_table(["stage", "split", "J", "F", "J&F", "S", "n"], rows)


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


def read_log(path: Path) -> list[dict[str, Any]]:
    """The records of a JSONL file that training appends to; a truncated last line is left out.

    Raises:
        DataError: a line other than the last is not a JSON object with a `step`.
    """
    records = []
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n")[:-1], 1):
        try:
            record = json.loads(line)
            float(record["step"])
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(f"{path}:{number}: not a JSON object with a step ({error}). Remedy: remove it.") from error
        records.append(record)
    return records


def read_groups(folder: Path) -> list[list[dict[str, Any]]]:
    """The first groups of the first and of the last step in folder/samples.jsonl; none without sampled answers.

    Raises:
        DataError: see `read_log`.
    """
    path = folder / "samples.jsonl"
    steps: dict[int, list[list[dict[str, Any]]]] = {}
    for record in read_log(path) if path.is_file() else ():
        if "rewards" not in record:  # other stages log greedy answers
            continue
        groups = steps.setdefault(record["step"], [])
        if record["sample"] == 0:
            groups.append([])
        groups[-1].append(record)
    chosen = list(steps)[:1] + list(steps)[1:][-1:]
    return [group for step in chosen for group in steps[step][:SAMPLED_GROUPS]]


def _splits(folder: Path) -> list[Path]:
    """metrics.json of each split whose predictions lie beside it, in the order of the page."""
    found = [path for path in sorted(folder.glob("*/metrics.json")) if (path.parent / "predictions.jsonl").is_file()]
    return sorted(found, key=lambda path: (*SPLIT_ORDER, path.parent.name).index(path.parent.name))
