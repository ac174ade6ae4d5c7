"""Do these weights fit? Names and shapes first, then every value; nothing is trained or written.

    python scripts/check_weights.py --model weights/VideoLLaMA2.1-7B-AV --sam weights/sam_vit_h_4b8939.pth
    python scripts/check_weights.py --meta                 # the 7B model against the released list, no file needed
    python scripts/check_weights.py --meta --model DIR     # reads the headers of DIR's safetensors, no weight

The model is built on the meta device. Without --meta every tensor is read once, one at a time, and checked for NaN and
infinity, and the tokenizer for Qwen2's control tokens and a row for [SEG]. Exit status 1 on any problem.
"""

from __future__ import annotations

import argparse
import resource
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch  # noqa: E402 - the project's root must be on the path first
from torch import Tensor  # noqa: E402

from dataset.prompt import load_tokenizer  # noqa: E402
from model.backbones.videollama2.config import RELEASED, VideoLlama2Config  # noqa: E402
from model.backbones.videollama2.names import (  # noqa: E402
    COMPONENTS,
    TABLE,
    KeyCheck,
    check_keys,
    from_released,
    moved_component,
    released_keys,
)
from model.backbones.videollama2.shards import Checkpoint  # noqa: E402
from model.backbones.videollama2.weights import expected_keys  # noqa: E402
from model.segmenters.sam import SAM_SIZES, build_segmenter  # noqa: E402
from model.segmenters.sam_weights import (  # noqa: E402
    POSITION_TABLE,
    position_tables,
    read_sam_file,
    recognise,
    sam_problems,
)
from utils.errors import AuroraError  # noqa: E402
from utils.tables import format_table  # noqa: E402

STATUSES = ("loaded", "tolerated", "missing", "unexpected", "shape")
SHOWN = 40
"""Lines of one list that are printed without --all."""


@dataclass
class Findings:
    """What is printed, and what is wrong."""

    problems: list[str] = field(default_factory=list)

    def say(self, text: str) -> None:
        print(text, flush=True)

    def blame(self, text: str) -> None:
        self.problems.append(text)
        print(f"PROBLEM {text}", flush=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="folder with the released names: config.json, weights, tokenizer")
    parser.add_argument("--sam", type=Path, help="SAM weights, .pth or .safetensors")
    parser.add_argument("--sam-type", help="vit_h, vit_l, vit_b or a JSON of sizes (default: as the file)")
    parser.add_argument("--sam-image-size", type=int, default=224, help="pixels (default: %(default)s)")
    parser.add_argument("--seg-token", default="[SEG]", help="default: %(default)s")
    parser.add_argument("--meta", action="store_true", help="names and shapes alone: no weight is read or allocated")
    parser.add_argument("--all", action="store_true", help="print every key, not only those that are not loaded")
    options = parser.parse_args(arguments)
    if not (options.model or options.sam or options.meta):
        parser.error("give --model, --sam or --meta")
    began, found = time.monotonic(), Findings()
    for check in (check_model, check_tokenizer, check_sam):
        try:
            check(options, found)
        except AuroraError as error:
            found.blame(str(error))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024**2
    verdict = f"{len(found.problems)} problem(s)" if found.problems else "everything fits"
    found.say(f"{verdict}; {time.monotonic() - began:.1f} s, {peak:.2f} GiB of memory at most")
    return 1 if found.problems else 0


def check_model(options: argparse.Namespace, found: Findings) -> None:
    """Keys of the multimodal language model, then its values."""
    if options.model is None:
        if options.meta:
            checks = check_keys(released_keys(), expected_keys(RELEASED))
            report_keys("the 7B model as built here against the released list", checks, options.all, found)
        return
    expected = expected_keys(VideoLlama2Config.from_folder(options.model))
    with Checkpoint(options.model) as checkpoint:
        checks = check_keys(checkpoint.shapes, expected)
        report_keys(f"{options.model} ({len(checkpoint.files)} file(s))", checks, options.all, found)
        if not options.meta:
            check_values(checkpoint, found)


def report_keys(title: str, checks: list[KeyCheck], everything: bool, found: Findings) -> None:
    """The table by component, then the keys that are not simply loaded."""
    rows = []
    for part in sorted(COMPONENTS.values()):
        own = [check for check in checks if check.component == part]
        counts = Counter(check.status for check in own)
        values = sum(prod(check.expected) for check in own if check.expected is not None)
        rows.append([part, *[counts[status] for status in STATUSES], f"{values:,}"])
    totals = Counter(check.status for check in checks)
    values = sum(prod(check.expected) for check in checks if check.expected is not None)
    rows.append(["all", *[totals[status] for status in STATUSES], f"{values:,}"])
    found.say(f"{title}\n{format_table(['component', *STATUSES, 'values'], rows)}")
    for hint in moved_component(checks):
        found.blame(hint)
    listed = [check for check in checks if everything or check.status != "loaded"]
    for check in listed if everything else listed[:SHOWN]:
        found.say(f"  {check}")
    if len(listed) > SHOWN and not everything:
        found.say(f"  ... and {len(listed) - SHOWN} more (--all prints them)")
    faults = sum(check.is_fault for check in checks)
    if faults:
        found.blame(f"{faults} of {len(checks)} keys do not fit")


def check_values(checkpoint: Checkpoint, found: Findings) -> None:
    """Read each tensor once: no NaN, no infinity, one position table."""
    types: Counter[str] = Counter()
    table: Tensor | None = None
    for name in checkpoint:
        tensor = checkpoint.get(name)
        types[str(tensor.dtype).removeprefix("torch.")] += tensor.numel()
        if not bool(torch.isfinite(tensor).all()):
            found.blame(f"{name} holds NaN or infinity")
        if from_released(name) == TABLE:
            if table is not None and not torch.equal(table, tensor):
                found.blame(f"{name} differs from the copy under another layer; the position table must be shared")
            table = tensor
    found.say("stored types: " + ", ".join(f"{kind} {count:,} values" for kind, count in types.items()))
    if types["float16"]:
        found.say("  float16 on disk is fine; run it in bf16, its activations overflow in float16 (docs/weights.md)")


def check_tokenizer(options: argparse.Namespace, found: Findings) -> None:
    """Control tokens, and a row of the matrices for [SEG]."""
    if options.model is None or options.meta:
        return
    tokenizer, seg_id = load_tokenizer(options.model, options.seg_token)
    rows = VideoLlama2Config.from_folder(options.model).language.vocab_size
    found.say(f"tokenizer: {len(tokenizer)} tokens with {options.seg_token} = {seg_id}; the matrices have {rows} rows")
    if len(tokenizer) > rows:
        found.blame(f"no spare row for {options.seg_token}: {rows} rows, {len(tokenizer)} tokens")


def check_sam(options: argparse.Namespace, found: Findings) -> None:
    """Keys of SAM, the tables that would be resampled, and its values."""
    if options.sam is None:
        return
    state = read_sam_file(options.sam)
    kind = options.sam_type or recognise(state, SAM_SIZES)
    if kind is None:
        found.blame(f"{options.sam}: no released SAM has these sizes; give --sam-type")
        return
    with torch.device("meta"):
        segmenter = build_segmenter(kind, options.sam_image_size)
    expected = segmenter.sam.state_dict()
    problems = sam_problems(state, expected, segmenter.sizes)
    report_sam(f"{options.sam} as {kind} at {options.sam_image_size} pixels", state, expected, segmenter.sizes, found)
    for problem in problems if options.all else problems[:SHOWN]:
        found.say(f"  {problem}")
    if problems:
        guess = recognise(state, SAM_SIZES)
        found.blame(f"{len(problems)} keys do not fit {kind}" + (f"; the file holds {guess}" if guess else ""))
    if not options.meta:
        for name, tensor in state.items():
            if not bool(torch.isfinite(tensor).all()):
                found.blame(f"{name} holds NaN or infinity")


def report_sam(
    title: str, state: Mapping[str, Tensor], expected: Mapping[str, Tensor], sizes: object, found: Findings
) -> None:
    """The table of SAM's three parts and the resampled tables."""
    rows = []
    for part in ("image_encoder", "prompt_encoder", "mask_decoder"):
        names = {key for key in (*state, *expected) if key.startswith(part)}
        both = sum(key in state and key in expected for key in names)
        values = sum(expected[key].numel() for key in names if key in expected)
        lacking, extra = (sum(key not in side for key in names) for side in (state, expected))
        rows.append([part, both, lacking, extra, f"{values:,}"])
    found.say(f"{title}\n{format_table(['part', 'stored', 'missing', 'unexpected', 'values'], rows)}")
    tables = position_tables(sizes.global_blocks)
    moved = sorted(k for k in tables if k in state and k in expected and state[k].shape != expected[k].shape)
    if moved:
        before, after = state.get(POSITION_TABLE), expected[POSITION_TABLE]
        grids = "" if before is None else f": grid {tuple(before.shape[1:3])} -> {tuple(after.shape[1:3])}, bicubic"
        found.say(f"  {len(moved)} position tables are resampled{grids}")


if __name__ == "__main__":
    sys.exit(main())
