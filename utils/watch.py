"""Warnings of a run that goes wrong without an error; thresholds are the section `watch` of the configuration."""

from __future__ import annotations

import logging
from collections import Counter, deque
from collections.abc import Sequence

from configs.schema import WatchConfig

REMEDIES = {
    "repeated": "look at samples.jsonl; raise grpo.temperature or grpo.beta, or lower optim.lr",
    "seg": "lower optim.lr, raise loss.ce or the format reward; start again from the last good checkpoint",
    "reward": "lower optim.lr, set grpo.beta above 0; start again from the best checkpoint (log.keep_best=reward_all)",
    "cut": "set grpo.max_new_tokens to {tokens} (cut answers have no ending and no [SEG])",
    "entropy": "raise grpo.temperature, grpo.clip_eps_high or grpo.beta, or lower optim.lr",
}
LARGEST_CUT = 0.2
"""Share of cut answers in a first step from which the length limit is called too low."""
_log = logging.getLogger("aurora.watch")


class Watch:
    """Looks at what a run says and logs, and warns once of each thing until it is over.

    Args:
        config: thresholds.
        max_new_tokens: longest answer that training draws, in tokens.
    """

    def __init__(self, config: WatchConfig, max_new_tokens: int = 0) -> None:
        self.config = config
        self._longest = max_new_tokens
        self._first = True
        self._texts: deque[str] = deque(maxlen=config.window)
        self._has_seg: deque[bool] = deque(maxlen=config.window)
        self._rewards: deque[float] = deque(maxlen=config.window)
        self._entropies: deque[float] = deque(maxlen=config.window)
        self._best = 0.0
        self._warned: set[str] = set()

    def answers(self, step: int, texts: Sequence[str], has_seg: Sequence[bool]) -> list[str]:
        """Judge the model's own answers; returns (and logs) new warnings."""
        self._texts.extend(texts)
        self._has_seg.extend(has_seg)
        if len(self._texts) < self.config.window:
            return []
        (text, count), size = Counter(self._texts).most_common(1)[0], len(self._texts)
        with_seg = sum(self._has_seg)
        return [
            *self._judge(
                "repeated",
                count / size >= self.config.repeated_share,
                f"step {step}: {count} of the last {size} answers are the same: {text[:80]!r}",
            ),
            *self._judge(
                "seg",
                with_seg / size < self.config.seg_share,
                f"step {step}: only {with_seg} of the last {size} answers hold [SEG]",
            ),
        ]

    def metrics(self, step: int, values: dict[str, float]) -> list[str]:
        """Judge a row of metrics (truncated_share, reward_all, entropy: stage grpo); as `answers` otherwise."""
        found = []
        if "truncated_share" in values and self._first:
            self._first, share = False, values["truncated_share"]
            text = f"step {step}: {share:.0%} of the answers were cut at grpo.max_new_tokens = {self._longest}"
            found += self._judge("cut", share > LARGEST_CUT, text)
        if "reward_all" in values:
            self._rewards.append(values["reward_all"])
            mean = sum(self._rewards) / len(self._rewards)
            if len(self._rewards) == self.config.window:
                self._best = max(self._best, mean)
                text = f"step {step}: mean reward {mean:.3f}, it was {self._best:.3f}"
                found += self._judge("reward", mean < self.config.reward_drop * self._best, text)
        if "entropy" in values:
            self._entropies.append(values["entropy"])
            mean = sum(self._entropies) / len(self._entropies)
            text = f"step {step}: mean entropy of a token {mean:.4f} nat"
            full = len(self._entropies) == self.config.window
            found += self._judge("entropy", full and mean < self.config.entropy_floor, text)
        return found

    def _judge(self, name: str, wrong: bool, text: str) -> list[str]:
        if not wrong:
            self._warned.discard(name)
            return []
        if name in self._warned:
            return []
        self._warned.add(name)
        message = f"{text}. Remedy: {REMEDIES[name].format(tokens=2 * self._longest)}."
        _log.warning(message)
        return [message]
