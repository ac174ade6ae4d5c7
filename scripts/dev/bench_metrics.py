"""Time J + F + S against the published loop over 255 thresholds, on the same tensors in the same process.

    python scripts/dev/bench_metrics.py [--json FILE] [--threads 1] [--repeats 7] [--loop-repeats 3]

Prints, per frame size, the medians in milliseconds, their ratio, and the largest difference of J, F and S (must be 0).
Exit status 1 if a value differs.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import cv2
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from utils.metrics import Scores, score_batch  # noqa: E402 - the repository root must be on the path first

SIZES = ((720, 1280), (256, 256))
FRAMES = 10


def published_loop(logits: Tensor, masks: Tensor) -> Scores:
    """J, F and S as the published evaluator walks them: 255 comparisons of every frame for F."""
    probabilities, truth = torch.sigmoid(logits), masks.float()
    predicted = (probabilities > 0.4).int()
    inter = (predicted * truth).sum(2).sum(1)
    union = torch.max(predicted, truth).sum(2).sum(1)
    empty = truth.sum(2).sum(1) == 0
    inter[empty] = ((1 - truth) * (1 - predicted)).sum(2).sum(1)[empty]
    union[empty] = truth[0].numel()
    thresholds = torch.linspace(0, 1 - 1e-10, 255)
    total, used = torch.zeros(255), 0
    for probability, mask in zip(probabilities, truth, strict=True):
        if mask.mean() == 0:
            continue
        precision, recall = torch.zeros(255), torch.zeros(255)
        for i in range(255):
            selected = (probability >= thresholds[i]).float()
            hits = (selected * mask).sum()
            precision[i], recall[i] = hits / (selected.sum() + 1e-20), hits / (mask.sum() + 1e-20)
        curve = 1.3 * precision * recall / (0.3 * precision + recall)
        curve[curve != curve] = 0
        total, used = total + curve, used + 1
    area = (torch.sigmoid(logits) > 0.5).int().sum()
    return Scores(
        (torch.sum(inter / (union + 1e-7)) / len(inter)).item(),
        (total / used).max().item() if used else 0.0,
        torch.sqrt(area / logits.numel()).item(),
    )


def make_clip(height: int, width: int) -> tuple[Tensor, Tensor]:
    """Logits float32 [T,H,W] of a soft moving blob with noise, and its bool masks; the last frame has no object."""
    generator = torch.Generator().manual_seed(height)
    y = torch.linspace(-1, 1, height)[None, :, None]
    x = torch.linspace(-1, 1, width)[None, None, :]
    shift = torch.linspace(-0.4, 0.4, FRAMES)[:, None, None]
    distance = torch.sqrt(y**2 + (x - shift) ** 2)
    masks = distance < 0.4
    masks[-1] = False
    return (0.42 - distance) * 12 + torch.randn(FRAMES, height, width, generator=generator), masks


def median_ms(call: Callable[[], object], repeats: int) -> float:
    """Median over `repeats` timed calls after one warm-up call."""
    call()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        times.append(1e3 * (time.perf_counter() - start))
    return statistics.median(times)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--json", type=Path, help="also write the results to this file")
    parser.add_argument("--threads", type=int, default=1, help="threads of torch and OpenCV (default 1)")
    parser.add_argument("--repeats", type=int, default=7, help="timed calls of score_batch (default 7)")
    parser.add_argument("--loop-repeats", type=int, default=3, help="timed calls of the published loop (default 3)")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    cv2.setNumThreads(options.threads)
    results = []
    for height, width in SIZES:
        logits, masks = make_clip(height, width)
        ours, published = score_batch(logits[None], masks[None], "official"), published_loop(logits, masks)
        loop = median_ms(lambda x=logits, m=masks: published_loop(x, m), options.loop_repeats)
        fast = median_ms(lambda x=logits, m=masks: score_batch(x[None], m[None], "official"), options.repeats)
        difference = max(abs(a - b) for a, b in ((ours.j, published.j), (ours.f, published.f), (ours.s, published.s)))
        results.append(
            {"height": height, "width": width, "frames": FRAMES, "threads": options.threads, "loop_ms": loop,
             "score_batch_ms": fast, "ratio": loop / fast, "max_difference": difference}
        )
        print(f"{width}x{height} x {FRAMES} frames: loop {loop:8.1f} ms, score_batch {fast:6.2f} ms, "
              f"ratio {loop / fast:5.1f}, largest difference {difference:g}")
    if options.json:
        options.json.write_text(json.dumps(results, indent=1) + "\n")
    return int(any(r["max_difference"] > 0 for r in results))


if __name__ == "__main__":
    sys.exit(main())
