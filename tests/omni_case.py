"""A random Qwen2.5-Omni thinker of a hundred thousand weights, saved as the real classes save it."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    Qwen2_5OmniProcessor,
    Qwen2_5OmniThinkerConfig,
    Qwen2_5OmniThinkerForConditionalGeneration,
    Qwen2Tokenizer,
    Qwen2VLImageProcessor,
    Qwen2VLVideoProcessor,
    WhisperFeatureExtractor,
)

from model.objectives.rewards import Judged
from tests.data_builders import write_tokenizer

TOKENS = ("<|AUDIO|>", "<|audio_bos|>", "<|audio_eos|>", "<|IMAGE|>", "<|VIDEO|>", "<|vision_bos|>", "<|vision_eos|>")
WORDS, MEL_BINS = 608, 16
"""Rows of the matrices (more than the tokenizer has words), and mel bins."""


def write_tiny_omni(folder: Path) -> Path:
    """Model, tokenizer and processor below `folder`."""
    write_tokenizer(folder / "tokenizer", TOKENS)
    tokenizer = Qwen2Tokenizer.from_pretrained(str(folder / "tokenizer"), extra_special_tokens={
        "image_token": "<|IMAGE|>", "audio_token": "<|AUDIO|>", "video_token": "<|VIDEO|>",
        "vision_bos_token": "<|vision_bos|>", "vision_eos_token": "<|vision_eos|>",
        "audio_bos_token": "<|audio_bos|>", "audio_eos_token": "<|audio_eos|>",
    }, pad_token="<|endoftext|>", eos_token="<|im_end|>")  # fmt: skip
    ids = {token: tokenizer.convert_tokens_to_ids(token) for token in TOKENS}
    processor = Qwen2_5OmniProcessor(
        image_processor=Qwen2VLImageProcessor(patch_size=14, min_pixels=28 * 28, max_pixels=56 * 56),
        video_processor=Qwen2VLVideoProcessor(),
        feature_extractor=WhisperFeatureExtractor(feature_size=MEL_BINS, chunk_length=12),
        tokenizer=tokenizer,
    )
    processor.save_pretrained(str(folder))
    config = Qwen2_5OmniThinkerConfig(
        audio_config={"d_model": 16, "encoder_layers": 1, "encoder_attention_heads": 2, "encoder_ffn_dim": 16,
                      "num_mel_bins": MEL_BINS, "output_dim": 32, "max_source_positions": 1500, "n_window": 50},
        vision_config={"depth": 2, "hidden_size": 32, "intermediate_size": 32, "num_heads": 2, "out_hidden_size": 32,
                       "fullatt_block_indexes": [1], "patch_size": 14, "window_size": 56},
        text_config={"vocab_size": WORDS, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2,
                     "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 2048,
                     "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}},
        audio_token_index=ids["<|AUDIO|>"], image_token_index=ids["<|IMAGE|>"], video_token_index=ids["<|VIDEO|>"],
        audio_token_id=ids["<|AUDIO|>"], image_token_id=ids["<|IMAGE|>"], video_token_id=ids["<|VIDEO|>"],
        vision_start_token_id=ids["<|vision_bos|>"], vision_end_token_id=ids["<|vision_eos|>"],
        audio_start_token_id=ids["<|audio_bos|>"], audio_end_token_id=ids["<|audio_eos|>"],
        pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    torch.manual_seed(0)
    model = Qwen2_5OmniThinkerForConditionalGeneration(config)
    for parameter in model.parameters():  # as made, all logits would be nearly equal
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(str(folder))
    # A thinker that was never read from a release is written without the prefix that it has there.
    stored = load_file(folder / "model.safetensors")
    named = {f"thinker.{name.removeprefix('thinker.')}": x for name, x in stored.items()}
    save_file(named, folder / "model.safetensors", {"format": "pt"})
    return folder


def text_reward(answer: Judged) -> float:
    """Tells the answers of a group apart, though random weights write no sense and all to the same length."""
    return sum(map(ord, answer.text)) % 97 / 97
