"""How the next token of an answer is chosen, by transformers' own logits processors.

`generate` of transformers fills what a call leaves open from generation_config.json of the model's folder, and from its
own defaults. So the released rollouts (LISA_grpo.py:430-434: temperature 1, top_p 0.9, no top_k) were drawn from the
most likely `top_k` words that the file names, or from 50 where it names none, and every released answer, greedy ones
included, paid the file's repetition penalty. Here both are fields of the configuration; null means what the file says.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from utils.errors import WeightsError

GENERATION_CONFIG = "generation_config.json"
RELEASED_TOP_K = 50
"""Default of transformers 4.42, the released environment, where neither the call nor the file says anything."""


@dataclass(frozen=True)
class Sampling:
    """The distribution of the next token, and how it is drawn from.

    Raises:
        ValueError: a setting outside its range.
    """

    temperature: float = 0.0  # 0 = the most likely token
    top_p: float = 1.0  # mass of the most likely tokens that is drawn from; 1 = all
    top_k: int = 0  # number of the most likely tokens that is drawn from; 0 = all
    repetition_penalty: float = 1.0
    """Logits of tokens that the answer already holds are divided by it (multiplied, where negative); 1 = none."""
    generator: torch.Generator | None = None  # source of randomness, on any device; None = torch's own

    def __post_init__(self) -> None:
        if self.temperature < 0 or not 0 < self.top_p <= 1:
            raise ValueError(f"temperature {self.temperature} must be >= 0 and top_p {self.top_p} in (0, 1]")
        if self.top_k < 0 or self.repetition_penalty <= 0:
            raise ValueError(f"top_k {self.top_k} must be >= 0 and repetition_penalty {self.repetition_penalty} > 0")

    @property
    def is_plain(self) -> bool:
        """Whether words are drawn from the distribution that scoring sees: softmax(logits / temperature), uncut."""
        return self.temperature > 0 and self.top_p == 1 and self.top_k == 0 and self.repetition_penalty == 1

    def log_probs(self, logits: Tensor, answers: Tensor) -> Tensor:
        """Log-probabilities of the distribution that is drawn from.

        Args:
            logits: [R,V] of any float type.
            answers: int64 [R,t] tokens of the answers so far; the prompt does not count, as in the released code,
                which gives `generate` embeddings.

        Returns:
            float32 [R,V], -inf for words that cannot be drawn. Greedy choice (temperature 0) reports the uncut softmax.
        """
        # The order of transformers' `generate`: the penalty bends logits, temperature scales them, both cuts come last.
        steps = LogitsProcessorList()
        if self.repetition_penalty != 1 and answers.shape[1]:
            steps.append(RepetitionPenaltyLogitsProcessor(self.repetition_penalty))
        if self.temperature not in (0, 1):
            steps.append(TemperatureLogitsWarper(float(self.temperature)))
        if self.temperature and self.top_k:
            steps.append(TopKLogitsWarper(min(self.top_k, logits.shape[-1])))
        if self.temperature and self.top_p < 1:
            steps.append(TopPLogitsWarper(self.top_p))
        return steps(answers, logits.float()).log_softmax(-1)

    def draw(self, log_probs: Tensor) -> Tensor:
        """[R,V] log-probabilities -> [R] token ids."""
        if self.temperature == 0:
            return log_probs.argmax(-1)
        # Drawn where the generator lives: the same seed then gives the same words on every device.
        probabilities = log_probs.exp()
        if self.generator is not None:
            probabilities = probabilities.to(self.generator.device)
        return torch.multinomial(probabilities, 1, generator=self.generator)[:, 0].to(log_probs.device)

    def __str__(self) -> str:
        penalty = f"repetition penalty {self.repetition_penalty:g}"
        if self.temperature == 0:
            return f"greedy, {penalty} (temperature, top_p and top_k do not apply)"
        cut = f"top_k {self.top_k}" if self.top_k else "no top_k"
        return f"temperature {self.temperature:g}, top_p {self.top_p:g}, {cut}, {penalty}"


@dataclass(frozen=True)
class GenerationDefaults:
    """What a base's generation_config.json says where the configuration says null."""

    top_k: int = 0
    repetition_penalty: float = 1.0

    def greedy(self, repetition_penalty: float | None = None) -> Sampling:
        """The most likely tokens, under a penalty; None = the base's."""
        penalty = self.repetition_penalty if repetition_penalty is None else repetition_penalty
        return Sampling(repetition_penalty=penalty)


def read_generation_defaults(folder: str | Path) -> GenerationDefaults:
    """Read generation_config.json of a base; a folder without one has transformers' defaults.

    Raises:
        WeightsError: the file is no such configuration.
    """
    path = Path(folder) / GENERATION_CONFIG
    if not path.is_file():
        return GenerationDefaults(RELEASED_TOP_K)
    try:
        found = GenerationConfig.from_pretrained(str(folder), local_files_only=True)
        top_k = RELEASED_TOP_K if found.top_k is None else int(found.top_k)
        penalty = 1.0 if found.repetition_penalty is None else float(found.repetition_penalty)
        Sampling(top_k=top_k, repetition_penalty=penalty)
    except (OSError, ValueError, TypeError) as error:
        raise WeightsError(f"{path}: not readable as a generation configuration ({error})") from error
    return GenerationDefaults(top_k, penalty)
