"""How much one process has in hand at once: the lengths that a plan and a benchmark assume."""

from __future__ import annotations

from dataclasses import dataclass

from configs.schema import RunConfig

ANSWER_TOKENS = {"teacher": 12, "sft": 512, "reflective": 1024}
"""Longest answer in tokens. A reasoning has fewer than 2,000 characters (longer ones are dropped, published code
sem_seg_dataset.py:402), about four to the token; a reflective path holds two. GRPO and evaluation: max_new_tokens."""


@dataclass(frozen=True)
class Workload:
    """What one process has in hand at once."""

    clips: int
    group: int = 1
    """Answers per clip that are trained together."""
    frames: int = 10
    frame_size: tuple[int, int] = (720, 1280)
    """Native (height, width) at which the mask losses are computed; the largest that is common in Ref-AVS."""
    audio_seconds: float = 10.0
    """Length of the sound, padding included."""
    prompt_tokens: int = 200
    """Text of the prompt: about 160 with the llama2 system text, plus the reference."""
    answer_tokens: int = 512

    @classmethod
    def of_stage(cls, config: RunConfig, **changes: object) -> Workload:
        """The largest step of a run: micro-batch, group, frames and answers of its configuration."""
        stage = config.stage
        longest = {"grpo": config.grpo.max_new_tokens, "eval": config.eval.max_new_tokens, **ANSWER_TOKENS}[stage]
        if stage in ("sft", "reflective") and config.data.answer != "reasoning":
            longest = ANSWER_TOKENS["teacher"]
        values: dict[str, object] = {
            "clips": config.eval.batch_size if stage == "eval" else config.engine.micro_batch,
            "group": config.grpo.group_size if stage == "grpo" else 1,
            "frames": config.data.num_frames or cls.frames,
            "audio_seconds": config.data.audio_padding_seconds or cls.audio_seconds,
            "answer_tokens": longest,
        }
        return cls(**(values | {name: value for name, value in changes.items() if value is not None}))


def fbank_frames(seconds: float) -> int:
    """Filter-bank frames of a sound at 16 kHz: windows of 25 ms every 10 ms."""
    return 1 + (round(seconds * 16_000) - 400) // 160
