"""The rows of Tables 2 to 8 of the paper, and which evaluation of which run stands for each."""

from __future__ import annotations

from dataclasses import dataclass

from utils.paper import ABLATIONS, SPLITS, TABLE_6, Published


@dataclass(frozen=True)
class Row:
    """One line of a table: what the paper printed, and the node whose evaluation is ours."""

    method: str
    evaluation: str
    """Node of `scripts.ablation.graph`."""
    paper: dict[str, tuple[float | None, ...]]
    """Split -> J, F, J&F in percent as printed; empty where the paper has no such line."""


@dataclass(frozen=True)
class Table:
    """One table; every row is compared with the last, the paper's own method."""

    number: int
    title: str
    rows: tuple[Row, ...]
    splits: tuple[str, ...] = ("test_s", "test_u")
    protocol: str = "official"
    remark: str = ""
    """What is to be known to read it."""


def _rows(number: int, *runs: str) -> tuple[Row, ...]:
    lines: tuple[Published, ...] = ABLATIONS[number]
    return tuple(
        Row(line.method, f"eval_{run}", dict(line.scores)) for line, run in zip(lines, runs, strict=True)
    )  # fmt: skip


_S4 = TABLE_6["AURORA (paper)"]
TABLES: dict[int, Table] = {
    2: Table(
        2, "SFT with chain of thought", _rows(2, "wo_mllm", "wo_cot", "cot"),
        remark="w/o MLLM: the reference alone, through a text encoder (a CLIP text tower; on the mini world the mini "
        "base's own language model), prompts SAM; the paper used ImageBind's.",
    ),
    3: Table(
        3, "Segmentation feature distillation", _rows(3, "wo_distill", "cot"),
        remark="Only the weight of the loss differs: both use the teacher's mask decoder, frozen.",
    ),
    4: Table(
        4, "Corrective reflective-style training", _rows(4, "sft_grpo", "ct_grpo", "crt_grpo"),
        remark="CT trains on the corrected path alone, CRT on wrong path, trigger and corrected path.",
    ),
    5: Table(5, "Rewards of GRPO", _rows(5, "crt", "format_iou", "crt_grpo")),
    6: Table(
        6, "Transfer to AVSBench S4",
        (Row("before fine-tuning", "eval_crt_grpo@eval_s4", {}),
         Row("fine-tuned, 3 epochs", "eval_s4@eval_s4", {"test": (*_S4, None)})),
        splits=("test",), protocol="s4",
        remark='Every clip is asked for "The sounding object". The paper compares with CRAB '
        f"(J {TABLE_6['CRAB (Du et al. 2025)'][0]}, F {TABLE_6['CRAB (Du et al. 2025)'][1]}), which is not run here; "
        "the first line is ours.",
    ),
    7: Table(
        7, "Learnable tokens against [SEG]", _rows(7, "seg_mllm", "mllm_seg", "wo_cot"),
        remark="seg+MLLM: training with the mask losses alone, then with the words' cross entropy alone; MLLM+seg: the "
        "same two trainings in the other order. The learnable tokens stand behind the reasoning in both.",
    ),
    8: Table(8, "Fixed and flexible reasoning paths", _rows(8, "fixed", "cot")),
}  # fmt: skip
SPLIT_TITLES = {**SPLITS, "test": "S4 test"}
