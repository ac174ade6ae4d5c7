"""Make the mini base from nothing: tokenizer, SigLIP + connector, BEATs, SAM, and a Qwen2 that answers questions.

    python scripts/dev/pretrain_mini_base.py --out DIR --work WORK                 # 108 minutes on 2 cores

The result stands where a user's VideoLLaMA2.1-7B-AV folder and SAM checkpoint stand: the released key names and file
layout, small numbers. It knows all classes of the mini world by sight, sound and word; it has never seen the task's
prompt, its chain of thought, or [SEG]. Steps are cached in --work and loaded from there when --steps leaves them out;
with --resume the named ones train on. docs/mini_results.md says what it reaches, and what the shipped base does.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer

from model.backbones.videollama2.backbone import VideoLlama2
from model.backbones.videollama2.config import VideoLlama2Config
from model.segmenters.sam import SamSegmenter, SamSizes, assemble_sam
from scripts.dev.mini_base import perception, reading
from scripts.dev.mini_base.corpus import pretraining_text
from scripts.dev.mini_base.tokens import TreePacker, train_tokenizer
from utils.tensor_files import save_safetensors

ROWS = 576
"""Rows of the embedding matrices: the tokenizer's, and spare ones for [SEG], as in the released 152064."""
IMAGE_SIDE = 96
SAM_SIZES = SamSizes(
    encoder_width=96, encoder_depth=3, encoder_heads=4, global_blocks=(0, 1, 2), patch_size=8, window_size=12,
    mlp_ratio=3.0, prompt_width=64, decoder_depth=2, decoder_heads=4, decoder_mlp=128, iou_head_depth=2,
    iou_head_width=32, mask_channels=8,
)  # fmt: skip
MODEL = {
    "model_type": "videollama2_qwen2", "architectures": ["Videollama2Qwen2ForCausalLM"], "hidden_size": 128,
    "intermediate_size": 384, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2,
    "vocab_size": ROWS, "rope_theta": 10000.0, "rms_norm_eps": 1e-6, "max_position_embeddings": 2048,
    "tie_word_embeddings": False, "num_frames": 10, "mm_vision_select_layer": -2,
    "mm_vision_tower": "mini-siglip", "mm_hidden_size": 96, "mm_hidden_size_a": 96,
    "vision_config": {"hidden_size": 96, "intermediate_size": 288, "num_hidden_layers": 5, "num_attention_heads": 4,
                      "image_size": IMAGE_SIDE, "patch_size": 12},
    "beats_config": {"input_patch_size": 32, "embed_dim": 96, "encoder_embed_dim": 96, "encoder_ffn_embed_dim": 288,
                     "encoder_layers": 3, "encoder_attention_heads": 4, "conv_pos": 16, "conv_pos_groups": 4,
                     "num_buckets": 32, "max_distance": 64, "predictor_class": 12, "mel_bins": 32},
}  # fmt: skip


def main() -> None:
    arguments = parse_arguments()
    torch.manual_seed(arguments.seed)
    torch.set_num_threads(arguments.threads)
    work: Path = arguments.work
    work.mkdir(parents=True, exist_ok=True)
    if not (work / "tokenizer.json").is_file():
        train_tokenizer(pretraining_text(arguments.seed, 1500), work)
    tokenizer = Tokenizer.from_file(str(work / "tokenizer.json"))
    config = VideoLlama2Config.from_dict({**MODEL, "eos_token_id": tokenizer.token_to_id("<|im_end|>"),
                                          "pad_token_id": tokenizer.token_to_id("<|endoftext|>")})  # fmt: skip
    model = VideoLlama2(config)
    segmenter = SamSegmenter(assemble_sam(SAM_SIZES, IMAGE_SIDE), SAM_SIZES)
    torch.nn.init.normal_(segmenter.sam.image_encoder.pos_embed, std=0.02)
    torch.nn.init.normal_(model.language_model.model.embed_tokens.weight, std=0.25)
    train(arguments, model, segmenter, tokenizer)
    if "save" in arguments.steps:
        save(arguments.out, work, model, segmenter)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--out", type=Path, default=Path("assets/mini_base"), help="folder to write (default: %(default)s)"
    )
    parser.add_argument(
        "--work", type=Path, default=Path("runs/mini_base"), help="cache of steps (default: %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="torch threads (default: all cores)")
    parser.add_argument("--scenes", type=int, default=3000, help="scenes rendered in memory (default: %(default)s)")
    parser.add_argument("--steps", nargs="+", choices=[*_OWNED, "save"], default=[*_OWNED, "save"], help="default: all")
    parser.add_argument("--resume", action="store_true", help="train the named steps on from their cached result")
    for name, steps in (("vision", 2500), ("audio", 2000), ("sam", 2500), ("text", 900), ("joint", 1500),
                        ("places", 1500), ("review", 1200)):  # fmt: skip
        parser.add_argument(f"--{name}-steps", type=int, default=steps, help="default: %(default)s")
    return parser.parse_args()


def train(arguments: argparse.Namespace, model: VideoLlama2, segmenter: SamSegmenter, tokenizer: Tokenizer) -> None:
    """Run the steps in order, loading those whose file is in the work folder."""
    bank = None
    frames = 10 * 100 - 2  # 10 s of 10 ms, less the last incomplete windows
    media = model.config.video_tokens(10) + model.config.audio_tokens(frames)
    packer = TreePacker(tokenizer, media)
    parts = {name: segmenter.sam if name == "sam" else model for name in _OWNED}
    for name, part in parts.items():
        path = arguments.work / f"{name}.safetensors"
        if path.is_file() and (arguments.resume or name not in arguments.steps):
            load_part(name, part, path)
        if name not in arguments.steps:
            continue
        if bank is None and name not in ("text", "places"):
            began = time.time()
            bank = perception.make_bank(
                arguments.scenes, arguments.seed, model.config.beats.mel_bins, arguments.threads
            )
            print(f"{arguments.scenes} scenes rendered in {time.time() - began:.0f} s", flush=True)
        began = time.time()
        run_step(name, model, segmenter, packer, bank, getattr(arguments, f"{name}_steps"))
        print(f"{name}: {time.time() - began:.0f} s", flush=True)
        building = path.with_suffix(".part")
        save_safetensors({k: v.contiguous() for k, v in trained_part(name, part).items()}, building)
        building.replace(path)


def run_step(name: str, model: VideoLlama2, segmenter: SamSegmenter, packer: TreePacker, bank: perception.Bank | None,
             steps: int) -> None:  # fmt: skip
    def report(line: str) -> None:
        print(line, flush=True)

    if name == "vision":
        perception.pretrain_vision(model, bank, steps, report)
    elif name == "audio":
        perception.pretrain_audio(model, bank, steps, report)
    elif name == "sam":
        perception.pretrain_sam(segmenter, bank, steps, report)
    elif name == "text":
        reading.pretrain_text(model, packer, steps, report)
    elif name == "places":
        reading.pretrain_places(model, packer, steps, report)
    else:
        reading.pretrain_joint(model, packer, bank, 200, steps, report, look_ups=8 if name == "review" else 0)


_JOINT = ("language_model.", "mm_projector.", "mm_projector_a.")
_OWNED = {
    "vision": ("vision_tower.", "mm_projector."), "audio": ("audio_tower.", "mm_projector_a."), "sam": ("",),
    "text": ("language_model.",), "joint": _JOINT, "places": ("language_model.",), "review": _JOINT,
}  # fmt: skip
"""The steps in order, and the tensors that each trains."""


def trained_part(name: str, part: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {k: v for k, v in part.state_dict().items() if k.startswith(_OWNED[name])}


def load_part(name: str, part: torch.nn.Module, path: Path) -> None:
    state = load_file(path)
    if set(state) != set(trained_part(name, part)):
        raise RuntimeError(f"{path}: made for another model; delete it and run the step again")
    part.load_state_dict(state, strict=False)


def save(out: Path, work: Path, model: VideoLlama2, segmenter: SamSegmenter) -> None:
    """Write the released layout in float16 (half the size; loaded in the precision of the run)."""
    from model.backbones.videollama2.weights import save_backbone

    building = out.with_name(out.name + ".building")
    shutil.rmtree(building, ignore_errors=True)
    building.mkdir(parents=True)
    save_backbone(model.half(), building)
    sam = {k: v.half().contiguous() for k, v in segmenter.sam.state_dict().items()}
    save_safetensors(sam, building / "sam.safetensors")
    SAM_SIZES.to_json(building / "sam.json")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(work / name, building / name)
    shutil.rmtree(out, ignore_errors=True)
    building.rename(out)
    total = sum(p.stat().st_size for p in out.iterdir())
    print(json.dumps({"folder": str(out), "bytes": total}))


if __name__ == "__main__":
    main()
