"""The paper's published results on Ref-AVS (arXiv 2508.02149), as printed: percent, one decimal, protocol of Ref-AVS.

Mix is the unweighted mean of seen and unseen. Two printed values do not follow from their neighbours: Mix J&F of CRAB
(46.2; the mean of its J and F is 51.8) and of AURORA (70.1; 70.55). They are kept as they stand in the paper.
"""

from __future__ import annotations

from dataclasses import dataclass

SPLITS = {"test_s": "seen", "test_u": "unseen", "mix": "mix (S+U)"}
"""Our name of a split -> the paper's."""


@dataclass(frozen=True)
class Published:
    """One line of a table of the paper."""

    method: str
    group: str
    scores: dict[str, tuple[float, float, float]]
    """Split (`test_s`, `test_u`, `mix`) -> (J, F, J&F) in percent; Mix only in Table 1."""


def _line(method: str, group: str, *values: float) -> Published:
    triples = (values[i : i + 3] for i in range(0, len(values), 3))
    return Published(method, group, dict(zip(SPLITS, triples, strict=False)))


_AUDIO, _VISUAL, _ABLATION = "audio-based", "visual-based", "ablation"
TABLE_1 = (
    _line("AVSBench (Zhou et al. 2022)", _AUDIO, 23.2, 51.1, 37.2, 32.4, 54.7, 43.5, 27.8, 52.9, 40.3),
    _line("AVSegFormer (Gao et al. 2024)", _AUDIO, 33.5, 47.0, 40.2, 36.1, 50.1, 43.1, 34.8, 48.6, 41.7),
    _line("GAVS (Wang et al. 2024)", _AUDIO, 28.9, 49.8, 39.4, 29.8, 49.7, 39.8, 29.4, 49.8, 39.6),
    _line("ReferFormer (Wu et al. 2022)", _VISUAL, 31.3, 50.1, 40.7, 30.4, 48.8, 39.6, 30.9, 49.5, 40.2),
    _line("R2VOS (Li et al. 2023)", _VISUAL, 25.0, 41.0, 33.0, 27.9, 49.8, 38.9, 26.5, 45.4, 35.9),
    _line("EEMC (Wang et al. 2024)", "multi-modal", 34.2, 51.3, 42.8, 49.5, 64.8, 57.2, 41.9, 58.1, 50.0),
    _line("SAM-LAVS (Wang et al. 2025)", "multi-modal", 43.5, 51.9, 47.7, 66.5, 72.3, 69.4, 55.0, 62.1, 58.5),
    _line("TSAM (Radman et al. 2025)", "multi-modal", 43.4, 56.8, 50.1, 54.6, 66.4, 60.5, 49.0, 61.6, 55.3),
    _line("CRAB (Du et al. 2025)", "foundation-based", 40.5, 58.0, 49.3, 45.6, 63.0, 54.3, 43.1, 60.5, 46.2),
    _line("AURORA (paper)", "foundation-based", 63.2, 72.8, 68.0, 69.7, 76.4, 73.0, 66.5, 74.6, 70.1),
)
"""Table 1: methods on Ref-AVS."""

TABLE_6 = {"CRAB (Du et al. 2025)": (73.3, 86.8), "AURORA (paper)": (77.3, 86.7)}
"""Table 6: method -> (J, F) in percent on AVSBench S4's test split, protocol of AVSBench."""

STAGES = {
    "plain": _line("SFT without reasoning", "Table 2", 54.1, 64.0, 59.1, 64.2, 71.9, 68.1),
    "sft": _line("SFT with reasoning and distillation", "Tables 2, 3", 61.4, 70.6, 66.0, 67.1, 73.4, 70.3),
    "reflective": _line("reflective training", "Table 5", 61.8, 71.1, 66.5, 67.2, 73.9, 70.6),
    "grpo": _line("reflective training, then GRPO", "Tables 4, 5", 63.2, 72.8, 68.0, 69.7, 76.4, 73.0),
}
"""Our stage (or `plain`: stage sft with data.answer plain) -> what the paper's ablations report after it."""


def _same(method: str, stage: str) -> Published:
    """A line that repeats the scores of a stage."""
    return Published(method, _ABLATION, STAGES[stage].scores)


ABLATIONS: dict[int, tuple[Published, ...]] = {
    2: (
        _line("w/o MLLM", _ABLATION, 39.2, 48.7, 44.0, 34.0, 46.3, 40.2),
        _same("w/o CoT", "plain"),
        _same("CoT", "sft"),
    ),
    3: (_line("w/o distillation", _ABLATION, 60.2, 70.2, 65.2, 65.7, 72.4, 69.1), _same("with distillation", "sft")),
    4: (
        _line("SFT+GRPO", _ABLATION, 62.0, 71.5, 66.8, 69.1, 76.1, 72.6),
        _line("SFT+CT+GRPO", _ABLATION, 62.7, 72.3, 67.5, 67.7, 74.4, 71.1),
        _same("SFT+CRT+GRPO", "grpo"),
    ),
    5: (
        _same("with Reflective", "reflective"),
        _line("format + IoU", _ABLATION, 62.4, 72.2, 67.3, 68.3, 75.4, 71.9),
        _same("format + IoU + class", "grpo"),
    ),
    7: (
        _line("seg+MLLM", _ABLATION, 46.5, 55.9, 51.2, 52.3, 59.4, 55.9),
        _line("MLLM+seg", _ABLATION, 15.0, 19.1, 17.1, 33.9, 41.9, 37.9),
        _same("SFT+w/o CoT", "plain"),
    ),
    8: (_line("Fixed Format", _ABLATION, 61.0, 70.1, 65.6, 66.4, 72.7, 69.6), _same("Flexible Format", "sft")),
}
"""Tables 2-5, 7 and 8: lines in the paper's order; several tables report the same run."""


def stage_key(stage: str, answer: str) -> str:
    """The key of `STAGES` for a checkpoint of `stage` trained on answers of kind `answer`; it may be absent there."""
    return "plain" if stage == "sft" and answer == "plain" else stage
