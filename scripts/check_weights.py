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
from collections.abc import Sequence
from math import prod
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch  # noqa: E402 - the project's root must be on the path first
from torch import Tensor  # noqa: E402

from configs.schema import ModelConfig  # noqa: E402
from dataset.prompt import load_tokenizer  # noqa: E402
from model.aurora.build import backbone_kind  # noqa: E402
from model.backbones.videollama2.config import RELEASED  # noqa: E402
from model.backbones.videollama2.weights import (  # noqa: E402
    COMPONENTS,
    TABLE,
    Checkpoint,
    KeyCheck,
    check_keys,
    component,
    expected_keys,
    from_released,
    moved_component,
    released_keys,
)
from model.segmenters.sam import (  # noqa: E402
    POSITION_TABLE,
    build_segmenter,
    position_tables,
    read_sam_file,
    recognise,
    sam_problems,
)
from model.segmenters.sam2 import build_sam2  # noqa: E402
from utils.errors import AuroraError  # noqa: E402
from utils.tables import format_table  # noqa: E402
from utils.tensor_files import load_safetensors  # noqa: E402

STATUSES = ("loaded", "tolerated", "missing", "unexpected", "shape")
SHOWN = 40
"""Lines of one list that are printed without --all."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="folder with the released names: config.json, weights, tokenizer")
    parser.add_argument("--sam", type=Path, help="SAM weights, .pth or .safetensors, or the folder of a SAM 2.1")
    parser.add_argument("--sam-type", help="vit_h, vit_l, vit_b or a JSON of sizes (default: as the file)")
    parser.add_argument("--sam-image-size", type=int, default=224, help="pixels (default: %(default)s)")
    parser.add_argument("--seg-token", default="[SEG]", help="default: %(default)s")
    parser.add_argument("--meta", action="store_true", help="names and shapes alone: no weight is read or allocated")
    parser.add_argument("--all", action="store_true", help="print every key, not only those that are not loaded")
    options = parser.parse_args(arguments)
    if not (options.model or options.sam or options.meta):
        parser.error("give --model, --sam or --meta")
    began, problems = time.monotonic(), []
    checks = [check_released] if options.meta and not options.model else []
    checks += [check_model] if options.model else []
    checks += [check_tokenizer] if options.model and not options.meta else []
    checks += [check_sam] if options.sam else []
    for check in checks:
        try:
            found = check(options)
        except AuroraError as error:
            found = [str(error)]
        print("".join(f"PROBLEM {problem}\n" for problem in found), end="", flush=True)
        problems += found
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024**2
    verdict = f"{len(problems)} problem(s)" if problems else "everything fits"
    print(f"{verdict}; {time.monotonic() - began:.1f} s, {peak:.2f} GiB of memory at most")
    return 1 if problems else 0


def check_released(options: argparse.Namespace) -> list[str]:
    """The 7B model against the list of released keys. Like every check, it prints tables and returns the problems."""
    checks = check_keys(released_keys(), expected_keys(RELEASED))
    return key_problems("the 7B model as built here against the released list", checks, options.all)


def check_model(options: argparse.Namespace) -> list[str]:
    """Keys of a folder; then every tensor once: no NaN, no infinity, one position table."""
    checkpoint, kind = Checkpoint(options.model), backbone_kind(str(options.model))
    checks = kind.check(kind.read_sizes(options.model), options.model)
    problems = key_problems(f"{options.model} ({len(checkpoint.files)} file(s))", checks, options.all)
    if options.meta:
        return problems
    types: Counter[str] = Counter()
    table: Tensor | None = None
    for name in checkpoint:
        tensor = checkpoint.get(name)
        types[str(tensor.dtype).removeprefix("torch.")] += tensor.numel()
        problems += value_problems(name, tensor)
        if from_released(name) == TABLE:
            if table is not None and not torch.equal(table, tensor):
                problems.append(f"{name} differs from the copy under another layer; the position table must be shared")
            table = tensor
    print("stored types: " + ", ".join(f"{kind} {count:,} values" for kind, count in types.items()))
    if types["float16"]:
        print("  float16 on disk is fine; run it in bf16, its activations overflow in float16 (docs/weights.md)")
    return problems


def key_problems(title: str, checks: Sequence[KeyCheck], everything: bool) -> list[str]:
    """Print the table by component and the keys that are not simply loaded."""
    rows = []
    for part in [*sorted(set(COMPONENTS.values())), "all"]:
        own = [check for check in checks if part in ("all", component(check.name))]
        counts = Counter(check.status for check in own)
        values = sum(prod(check.expected) for check in own if check.expected is not None)
        rows.append([part, *[counts[status] for status in STATUSES], f"{values:,}"])
    print(f"{title}\n{format_table(['component', *STATUSES, 'values'], rows)}")
    print_list([check for check in checks if everything or check.status != "loaded"], everything)
    faults = sum(check.is_fault for check in checks)
    return moved_component(checks) + [f"{faults} of {len(checks)} keys do not fit"] * (faults > 0)


def value_problems(name: str, tensor: Tensor) -> list[str]:
    """Whether a tensor is finite."""
    return [] if bool(torch.isfinite(tensor).all()) else [f"{name} holds NaN or infinity"]


def print_list(lines: Sequence[object], everything: bool) -> None:
    """One line each, the first SHOWN unless everything is wanted."""
    for line in lines if everything else lines[:SHOWN]:
        print(f"  {line}")
    if len(lines) > SHOWN and not everything:
        print(f"  ... and {len(lines) - SHOWN} more (--all prints them)")


def check_tokenizer(options: argparse.Namespace) -> list[str]:
    """Control tokens, and a row of the matrices for [SEG]."""
    tokenizer, seg_id = load_tokenizer(options.model, options.seg_token)
    rows = backbone_kind(str(options.model)).read_sizes(options.model).language.vocab_size
    print(f"tokenizer: {len(tokenizer)} tokens with {options.seg_token} = {seg_id}; the matrices have {rows} rows")
    crowded = f"no spare row for {options.seg_token}: {rows} rows, {len(tokenizer)} tokens"
    return [crowded] if len(tokenizer) > rows else []


def check_sam(options: argparse.Namespace) -> list[str]:
    """Keys of SAM's three parts, the tables that would be resampled, and its values."""
    if options.sam.is_dir():
        return check_sam2(options)
    state = read_sam_file(options.sam)
    kind = options.sam_type or recognise(state)
    if kind is None:
        return [f"{options.sam}: no released SAM has these sizes; give --sam-type"]
    with torch.device("meta"):
        segmenter = build_segmenter(kind, options.sam_image_size)
    expected = segmenter.sam.state_dict()
    rows = []
    for part in ("image_encoder", "prompt_encoder", "mask_decoder"):
        have, need = ({key for key in keys if key.startswith(part)} for keys in (state, expected))
        values = sum(expected[key].numel() for key in need)
        rows.append([part, len(have & need), len(need - have), len(have - need), f"{values:,}"])
    print(f"{options.sam} as {kind} at {options.sam_image_size} pixels")
    print(format_table(["part", "stored", "missing", "unexpected", "values"], rows))
    tables = position_tables(segmenter.sizes.global_blocks) & state.keys() & expected.keys()
    moved = [name for name in tables if state[name].shape != expected[name].shape]
    if moved:
        grids = [tuple(x[POSITION_TABLE].shape[1:3]) for x in (state, expected) if POSITION_TABLE in x]
        print(f"  {len(moved)} position tables are resampled: grid {' -> '.join(map(str, grids))}, bicubic")
    problems = sam_problems(state, segmenter)
    print_list(problems, options.all)
    guess = recognise(state)
    found = [f"{len(problems)} keys do not fit {kind}" + (f"; the file holds {guess}" if guess else "")]
    values = [] if options.meta else [problem for item in state.items() for problem in value_problems(*item)]
    return found * (len(problems) > 0) + values


def check_sam2(options: argparse.Namespace) -> list[str]:
    """Keys and shapes of a folder with SAM 2.1, by module, and its values."""
    with torch.device("meta"):
        settings = ModelConfig(segmenter="sam2", sam_checkpoint=str(options.sam), sam_image_size=1024)
        expected = build_sam2(settings, weights=False).sam.state_dict()
    state = load_safetensors(options.sam / "model.safetensors")
    rows = []
    for part in sorted({key.split(".")[0] for key in (*expected, *state)}):
        have, need = ({key for key in keys if key.split(".")[0] == part} for keys in (state, expected))
        values = sum(expected[key].numel() for key in need)
        rows.append([part, len(have & need), len(need - have), len(have - need), f"{values:,}"])
    print(f"{options.sam} as SAM 2.1")
    print(format_table(["part", "stored", "missing", "unexpected", "values"], rows))
    wrong = [f"{key}: missing or unexpected" for key in sorted(state.keys() ^ expected.keys())]
    wrong += [
        f"{key}: {tuple(state[key].shape)}, expected {tuple(expected[key].shape)}"
        for key in sorted(state.keys() & expected.keys()) if state[key].shape != expected[key].shape
    ]  # fmt: skip
    print_list(wrong, options.all)
    values = [] if options.meta else [problem for item in state.items() for problem in value_problems(*item)]
    return [f"{len(wrong)} keys do not fit SAM 2.1"] * (len(wrong) > 0) + values


if __name__ == "__main__":
    sys.exit(main())
