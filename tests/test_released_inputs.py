"""What the released model is fed: ids of a vocabulary of its size, Qwen2's chat template, token counts of a clip."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerBase
from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

from dataset.processor import AuroraProcessor
from dataset.prompt import SYSTEM_PROMPTS, Prompts, load_tokenizer
from model.aurora.build import RELEASED_SEG_ID
from model.backbones.videollama2.config import RELEASED
from utils.types import VIDEO_PLACEHOLDER

WORDS, CONTROL = 151_643, ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
TEMPLATE = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
"""chat_template of Qwen2-7B-Instruct's tokenizer_config.json."""


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> tuple[PreTrainedTokenizerBase, int]:
    """A byte-level tokenizer with as many words as Qwen2's and its three control tokens behind them."""
    folder: Path = tmp_path_factory.mktemp("tokenizer")
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = [*letters, *(f"word{i}" for i in range(WORDS - len(letters)))]
    tokenizer = Tokenizer(models.BPE(vocab={word: i for i, word in enumerate(words)}, merges=[]))
    tokenizer.normalizer = normalizers.NFC()
    split = pre_tokenizers.Split(Regex(PRETOKENIZE_REGEX), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in CONTROL])
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "Qwen2Tokenizer", "chat_template": TEMPLATE}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    return load_tokenizer(folder)


def test_seg_has_the_row_behind_the_control_tokens(loaded: tuple) -> None:
    tokenizer, seg_id = loaded
    assert tokenizer.convert_tokens_to_ids(list(CONTROL)) == [151_643, 151_644, 151_645]
    assert seg_id == RELEASED_SEG_ID == 151_646 and len(tokenizer) == 151_647
    assert RELEASED.language.vocab_size == 152_064  # 417 rows to spare: nothing is resized
    answer = Prompts(tokenizer, seg_id).answer_ids("plain", "dog").tolist()
    assert answer[-3:] == [seg_id, tokenizer.encode(".")[0], 151_645]


@pytest.mark.parametrize("system", ["llama2", "qwen2"])
def test_prompt_is_what_qwen2s_own_template_writes(loaded: tuple, system: str) -> None:
    tokenizer, seg_id = loaded
    reference = "The object that sounds, on the left."
    text = f"<video>\nThe reference is: {reference} Please segment the corresponding object in the images."
    messages = [{"role": "system", "content": SYSTEM_PROMPTS[system]}, {"role": "user", "content": text}]
    expected = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    ids = Prompts(tokenizer, seg_id, system).prompt_ids(reference).tolist()
    at = ids.index(VIDEO_PLACEHOLDER)
    assert tokenizer.decode(ids[:at]) + "<video>" + tokenizer.decode(ids[at + 1 :]) == expected
    assert ids.count(VIDEO_PLACEHOLDER) == 1 and ids.count(151_644) == 3 and ids.count(151_645) == 2


@pytest.mark.parametrize(("padding", "tokens"), [(30.0, 1496), (None, 496)])
def test_tokens_of_a_ten_second_clip(loaded: tuple, padding: float | None, tokens: int) -> None:
    processor = AuroraProcessor(loaded[0], RELEASED.vision.image_size, 224, 128, padding)
    fbank = processor.fbank(np.zeros(160_000, np.float32))
    assert RELEASED.audio_tokens(fbank.shape[0]) == tokens
    frames = np.zeros((10, 72, 128, 3), np.uint8)
    assert processor.vision_pixels(frames).shape == (10, 3, 384, 384)
    assert RELEASED.video_tokens(10) == 845
