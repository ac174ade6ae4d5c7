"""What a run says while it trains: metrics.jsonl, TensorBoard scalars, a progress bar, warnings of what goes wrong."""

from __future__ import annotations

import json
import logging
import math
import time
from collections import Counter, defaultdict, deque
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from configs.schema import RunConfig, WatchConfig
from utils import distributed
from utils.errors import tell
from utils.files import write_text
from utils.guards import check_norm
from utils.progress import Progress
from utils.types import Batch, Generation

REMEDIES = {
    "repeated": "look at samples.jsonl; raise grpo.temperature or grpo.beta, or lower optim.lr",
    "seg": "lower optim.lr, raise loss.ce or the format reward; start again from the last good checkpoint",
    "reward": "lower optim.lr, set grpo.beta above 0; start again from the best checkpoint (log.keep_best=reward_all)",
    "cut": "set grpo.max_new_tokens to {tokens} (cut answers have no ending and no [SEG])",
    "entropy": "raise grpo.temperature, grpo.clip_eps_high or grpo.beta, or lower optim.lr",
}
LARGEST_CUT = 0.2
"""Share of cut answers in a first step from which the length limit is called too low."""
_log = logging.getLogger("aurora.log")


def setup_logging() -> logging.Logger:
    """Messages of the project on stderr: warnings and worse of every process, the rest of the main one."""
    logger = logging.getLogger("aurora")
    logger.handlers.clear()
    logger.addHandler(_Handler())
    logger.setLevel(logging.INFO if distributed.is_main() else logging.WARNING)
    logger.propagate = False
    return logger


class _Handler(logging.Handler):
    """Each message on a line of its own, also beside a bar; a warning says so, and of several processes whose it is."""

    def emit(self, record: logging.LogRecord) -> None:
        source = f" [process {distributed.rank()}]" if distributed.world_size() > 1 else ""
        level = "" if record.levelno == logging.INFO else f"{record.levelname.lower()}{source}: "
        tell(level + self.format(record))


def due(every: int, before: int, now: int) -> bool:
    """Whether a multiple of `every` (0 = never) lies in (before, now]."""
    return every > 0 and now // every > before // every


class Means:
    """Means of named scalars over micro-batches, steps and processes, each name over those that reported it."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, int] = {}

    def add(self, values: dict[str, Tensor | float]) -> None:
        """Add one micro-batch's scalars; tensors stay where they are until `reduce`."""
        for name, value in values.items():
            number = torch.as_tensor(value, dtype=torch.float64 if not isinstance(value, Tensor) else None)
            number = number.detach().to(torch.float32 if number.device.type == "mps" else torch.float64)
            self._sums[name] = self._sums[name] + number if name in self._sums else number
            self._counts[name] = self._counts.get(name, 0) + 1

    def reduce(self) -> dict[str, float]:
        """The means over all processes, names in order of first mention; empties the sums. All processes call it."""
        mine = {name: (float(total), self._counts[name]) for name, total in self._sums.items()}
        self._sums, self._counts = {}, {}
        everyone = distributed.gather(mine)
        names = list(dict.fromkeys(name for one in everyone for name in one))
        found = {name: [one[name] for one in everyone if name in one] for name in names}
        return {name: sum(s for s, _ in pairs) / sum(n for _, n in pairs) for name, pairs in found.items()}


class Watch:
    """Looks at what a run says and logs, and warns once of each thing until it is over.

    Args:
        config: thresholds.
        max_new_tokens: longest answer that training draws, in tokens.
    """

    def __init__(self, config: WatchConfig, max_new_tokens: int = 0) -> None:
        self.config, self._longest, self._first, self._best = config, max_new_tokens, True, 0.0
        self._last: dict[str, deque[Any]] = defaultdict(lambda: deque(maxlen=config.window))
        """What the judgements rest on: (answer, whether it holds [SEG]), rewards, entropies."""
        self._warned: set[str] = set()

    def answers(self, step: int, texts: Sequence[str], has_seg: Sequence[bool]) -> list[str]:
        """Judge the model's own answers; returns (and logs) new warnings."""
        last, c = self._last["answers"], self.config
        last.extend(zip(texts, has_seg, strict=True))
        if len(last) < c.window:
            return []
        (text, count), size = Counter(text for text, _ in last).most_common(1)[0], len(last)
        with_seg = sum(seg for _, seg in last)
        same = f"step {step}: {count} of the last {size} answers are the same: {text[:80]!r}"
        few = f"step {step}: only {with_seg} of the last {size} answers hold [SEG]"
        repeated, missing = count / size >= c.repeated_share, with_seg / size < c.seg_share
        return [*self._judge("repeated", repeated, same), *self._judge("seg", missing, few)]

    def metrics(self, step: int, values: dict[str, float]) -> list[str]:
        """Judge a row of metrics (truncated_share, reward_all, entropy: stage grpo); as `answers` otherwise."""
        found = []
        if "truncated_share" in values and self._first:
            self._first, share = False, values["truncated_share"]
            text = f"step {step}: {share:.0%} of the answers were cut at grpo.max_new_tokens = {self._longest}"
            found += self._judge("cut", share > LARGEST_CUT, text)
        means = {}
        for name in ("reward_all", "entropy"):
            if name in values:
                self._last[name].append(values[name])
                if len(self._last[name]) == self.config.window:
                    means[name] = fmean(self._last[name])
        if "reward_all" in means:
            mean = means["reward_all"]
            self._best = max(self._best, mean)
            text = f"step {step}: mean reward {mean:.3f}, it was {self._best:.3f}"
            found += self._judge("reward", mean < self.config.reward_drop * self._best, text)
        if "entropy" in means:
            text = f"step {step}: mean entropy of a token {means['entropy']:.4f} nat"
            found += self._judge("entropy", means["entropy"] < self.config.entropy_floor, text)
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


class RunLog:
    """Writes the metrics of a run on the main process; other processes hold a silent one.

    Args:
        folder: the run's folder.
        config: the run.
        done: steps done before (a resumed run): later rows of an interrupted attempt are removed.
    """

    def __init__(self, folder: str | Path, config: RunConfig, done: int = 0) -> None:
        self.folder, self.every = Path(folder), config.log.every
        self._means = Means()
        self._rows: list[dict[str, float]] = []
        """Rows of metrics since the checkpoint before."""
        self._watch = Watch(config.watch, config.grpo.max_new_tokens)
        self._samples: list[tuple[str, int]] = []
        self._drawn: list[Generation] = []
        self._draws = False
        """Whether training draws answers, which are then watched as they come."""
        self._active = distributed.is_main()
        self._clock, self._counted = time.perf_counter(), 0
        if not self._active:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        for name in ("metrics.jsonl", "samples.jsonl"):
            _keep_rows(self.folder / name, done)
        self._metrics = (self.folder / "metrics.jsonl").open("a", encoding="utf-8")
        board = str(self.folder / "tensorboard")
        self._board = SummaryWriter(board, purge_step=done + 1) if config.log.tensorboard else None
        self._progress = Progress(self.folder.name, config.optim.steps, "steps", done)

    def add(self, parts: dict[str, Tensor], batch: Batch, answers: Generation | None = None) -> None:
        """Add a micro-batch: its losses to log, its samples for an error's message, answers drawn about it to watch."""
        self._means.add(parts)
        self._samples += [(sample.uid, sample.row) for sample in batch.samples]
        if answers is not None:
            self._drawn.append(answers)

    def step(self, step: int, rate: float, norm: float) -> None:
        """End optimiser step `step` (from 1); every `log.every` steps a row of means is written. All processes call it.

        Raises:
            NonFiniteError: the norm of the gradient is not finite; names the samples.
        """
        check_norm(norm, step, self._samples)
        self._samples = []
        self._counted += 1
        if self._active:
            self._progress.update(1)
        for answers in self._drawn:
            self._watch.answers(step, answers.texts, answers.has_seg.tolist())
        self._draws, self._drawn = self._draws or bool(self._drawn), []
        if step % self.every == 0:
            row = {**self._means.reduce(), "lr": rate, "grad_norm": norm}
            self._rows.append(row)
            self.metrics(step, row)
            self._watch.metrics(step, row)

    def means_since_save(self) -> dict[str, float]:
        """Means of the rows since the last call: the best checkpoint is chosen by one of them."""
        names = dict.fromkeys(name for row in self._rows for name in row)
        means = {name: fmean(row[name] for row in self._rows if name in row) for name in names}
        self._rows = []
        return means

    def metrics(self, step: int, values: dict[str, float]) -> None:
        """Write one row; seconds per step since the row before are added.

        Names with a slash are TensorBoard tags as they are, others get `train/` before them.
        """
        now = time.perf_counter()
        seconds = (now - self._clock) / max(1, self._counted)
        self._clock, self._counted = now, 0
        if not self._active:
            return
        row = {"step": step, **values, "seconds_per_step": round(seconds, 4)}
        _write_row(self._metrics, row)
        self._progress.note = f"loss {values.get('loss', math.nan):.4f}, {seconds:.2f} s/step"
        if self._board is not None:
            for name, value in row.items():
                if name != "step":
                    self._board.add_scalar(name if "/" in name else f"train/{name}", value, step)

    def samples(self, step: int, records: list[dict[str, Any]]) -> None:
        """Append answers of the model to samples.jsonl."""
        if not self._draws:
            self._watch.answers(step, [r["answer"] for r in records], [r["has_seg"] for r in records])
        if self._active and records:
            with (self.folder / "samples.jsonl").open("a", encoding="utf-8") as stream:
                for record in records:
                    _write_row(stream, {"step": step, **record})

    def close(self) -> None:
        """Write out what is buffered and end the writer's thread."""
        if self._active:
            self._progress.close()
            self._metrics.close()
            if self._board is not None:
                self._board.close()


def _write_row(stream: Any, row: dict[str, Any]) -> None:
    stream.write(json.dumps(row, ensure_ascii=False) + "\n")
    stream.flush()


def _keep_rows(path: Path, done: int) -> None:
    """Remove the rows after step `done`, and lines that a kill or a broken disk spoiled."""
    if not path.exists():
        return
    kept = []
    # split at "\n" alone: str.splitlines would also cut at U+2028, which JSON allows inside a string
    for line in path.read_text(encoding="utf-8", errors="replace").split("\n"):
        try:
            if json.loads(line)["step"] <= done:
                kept.append(line + "\n")
        except (ValueError, TypeError, KeyError):
            continue
    write_text(path, "".join(kept))
