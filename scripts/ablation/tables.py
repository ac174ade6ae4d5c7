"""The rows of Tables 2 to 8 of the paper and of our study of stage 3, and which evaluation stands for each."""

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
    """One table; every row is compared with one of them: in the paper's tables the last, its own method."""

    number: int | str
    """Of the paper, or the name of a study of ours."""
    title: str
    rows: tuple[Row, ...]
    splits: tuple[str, ...] = ("test_s", "test_u")
    protocol: str = "official"
    remark: str = ""
    """What is to be known to read it."""
    extras: tuple[str, ...] = ()
    """Shares in percent beside the scores: keys of metrics.json."""
    against: int = -1
    """Index of the row that the others are compared with."""

    @property
    def heading(self) -> str:
        """Number and title."""
        return f"Table {self.number}: {self.title}" if isinstance(self.number, int) else self.title


def _rows(number: int, *runs: str) -> tuple[Row, ...]:
    lines: tuple[Published, ...] = ABLATIONS[number]
    return tuple(
        Row(line.method, f"eval_{run}", dict(line.scores)) for line, run in zip(lines, runs, strict=True)
    )  # fmt: skip


READS_CLASS = (
    "w/o CoT, too, is distilled from a teacher that reads the true class, which its student never writes; the study "
    "`teacher` has the one that reads \"It is [SEG].\" alone."
)
_S4 = TABLE_6["AURORA (paper)"]
TABLES: dict[int | str, Table] = {
    2: Table(
        2, "SFT with chain of thought", _rows(2, "wo_mllm", "wo_cot", "cot"),
        remark="w/o MLLM: the reference alone, through a text encoder (a CLIP text tower; on the mini world the mini "
        "base's own language model), prompts SAM; the paper used ImageBind's. "
        + READS_CLASS,
    ),
    3: Table(
        3, "Segmentation feature distillation", _rows(3, "wo_distill", "cot"),
        remark="Only the weight of the loss differs: both start from the teacher and keep its mask decoder, frozen.",
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
        "same two trainings in the other order. The learnable tokens stand behind the reasoning in both. "
        + READS_CLASS,
    ),
    8: Table(8, "Fixed and flexible reasoning paths", _rows(8, "fixed", "cot")),
}  # fmt: skip
STUDIES: dict[int | str, Table] = {
    "reflective": Table(
        "reflective", "What stage 2 changes",
        (Row("stage 1", "eval_cot", {}), Row("stage 2", "eval_crt", {}),
         Row("stage 2, loss on wrong paths too", "eval_crt_all", {}),
         Row("stage 2, corrected paths alone", "eval_ct", {})),
        remark="Ours, mini world alone. Settings of stage 2 were chosen on val.",
        extras=("class_accuracy", "faithful"), against=0,
    ),
    "teacher": Table(
        "teacher", "What the teacher of w/o CoT reads",
        (Row("the true class (as in tables 2 and 7)", "eval_wo_cot", {}),
         Row('"It is [SEG]." alone', "eval_wo_cot_plain", {})),
        remark="Ours, mini world alone.", extras=("class_accuracy",), against=0,
    ),
    "grpo": Table(
        "grpo", "What stage 3 changes, from a stage 1 that was stopped half way",
        tuple(Row(method, f"eval_{run}@eval_seen", {}) for method, run in (
            ("start: stage 1 at step 90", "early"),
            ("more stage 1 for the same time", "early_sft"),
            ("GRPO", "early_grpo"),
            ("GRPO, a tenth of the mask loss", "early_tenth"),
            ("GRPO, format reward alone", "early_format"),
            ("GRPO, temperature 1", "early_t1"),
            ("GRPO, mask loss on all", "early_all"),
            ("GRPO, mask loss on best", "early_best"),
            ("GRPO, no mask loss", "early_none"),
            ("GRPO, reward for reasoning too", "early_reasoning"),
        )),
        remark="Ours, mini world alone. Settings of GRPO were chosen on val.",
        splits=("test_s",), extras=("class_accuracy", "faithful"), against=0,
    ),
}  # fmt: skip
"""Tables that the paper does not have; at mini scale alone."""
SPLIT_TITLES = {**SPLITS, "test": "S4 test"}
