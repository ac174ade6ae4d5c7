"""The mini base's tokenizer (byte-level BPE with Qwen2's special tokens) and the packing of branching text."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor

from scripts.dev.mini_base.corpus import SYSTEM, Branch
from utils.types import IGNORE

SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
# The split pattern of Qwen2's tokenizer (tokenizer.json of Qwen2-7B-Instruct).
_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CHAT_TEMPLATE = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}"
    "<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def train_tokenizer(lines: list[str], folder: Path, vocabulary: int = 640) -> None:
    """Write tokenizer.json and tokenizer_config.json in the released layout."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(_SPLIT), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ])  # fmt: skip
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(lines, trainer)
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS))
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "Qwen2Tokenizer", "model_max_length": 2048, "padding_side": "right",
        "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "bos_token": None, "unk_token": None,
        "additional_special_tokens": ["<|im_start|>", "<|im_end|>"], "chat_template": CHAT_TEMPLATE,
    }  # fmt: skip
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")


@dataclass
class PackedTree:
    """Branching texts of a batch in one padded row each.

    `ids` int64 [B,S] (media positions 0), `positions` int64 [B,S], `allowed` bool [B,1,S,S], `labels` int64 [B,S]
    (label of the NEXT token, IGNORE elsewhere), `groups` int64 [B,S] index into `names`, -1 where no label is.
    """

    ids: Tensor
    media: Tensor
    positions: Tensor
    allowed: Tensor
    labels: Tensor
    groups: Tensor
    names: list[str]


class TreePacker:
    """Packs one media prefix and the branches that continue it, each seeing only its own past."""

    def __init__(self, tokenizer: Tokenizer, media_tokens: int) -> None:
        self.tokenizer = tokenizer
        self.media_tokens = media_tokens
        self.names: list[str] = []

    def encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(text).ids

    def __call__(self, trees: list[list[Branch]], with_media: bool = True) -> PackedTree:
        rows = [self._row(tree, with_media) for tree in trees]
        size = max(len(row["ids"]) for row in rows)
        out = {key: torch.full((len(rows), size), fill) for key, fill in
               (("ids", 0), ("positions", 0), ("labels", IGNORE), ("groups", -1))}  # fmt: skip
        media = torch.zeros(len(rows), size, dtype=torch.bool)
        allowed = torch.eye(size, dtype=torch.bool).repeat(len(rows), 1, 1)
        for b, row in enumerate(rows):
            length = len(row["ids"])
            for key, values in out.items():
                values[b, :length] = torch.tensor(row[key])
            media[b, row["media"]] = True
            allowed[b, :length, :length] = torch.from_numpy(row["allowed"])
        return PackedTree(media=media, allowed=allowed[:, None], names=self.names, **out)

    def _row(self, tree: list[Branch], with_media: bool) -> dict:
        head = self.encode(SYSTEM)
        tail = self.encode("\n")
        prefix = [*head, *[0] * self.media_tokens, *tail] if with_media else [*head, *tail]
        ids, positions = list(prefix), list(range(len(prefix)))
        labels, groups = [IGNORE] * len(prefix), [-1] * len(prefix)
        spans = {-1: (np.arange(len(prefix)), len(prefix))}  # branch -> (indices of its whole past, next position)
        text_spans = {}
        seen = [(i, np.arange(i + 1)) for i in range(len(prefix))]
        for index, branch in enumerate(tree):
            past, start = (text_spans if branch.on_text else spans)[branch.parent]
            question, lead = self.encode(branch.question), self.encode(branch.lead)
            answer = self.encode(branch.answer + "<|im_end|>")
            offset = len(ids)
            tokens = [*question, *lead, *answer]
            ids += tokens
            positions += range(start, start + len(tokens))
            labels += [IGNORE] * (len(question) - 1) + lead + answer + [IGNORE]
            groups += [-1] * (len(question) - 1) + [self._group("caption")] * len(lead)
            groups += [self._group(branch.group)] * len(answer) + [-1]
            own = np.arange(offset, offset + len(tokens))
            seen += [(offset + i, np.concatenate([past, own[: i + 1]])) for i in range(len(tokens))]
            text_spans[index] = (np.concatenate([past, own[:-1]]), start + len(tokens) - 1)
            newline = self.encode("\n")
            ids += newline
            positions += [start + len(tokens)]
            labels.append(IGNORE)
            groups.append(-1)
            whole = np.arange(offset, offset + len(tokens) + 1)
            seen.append((offset + len(tokens), np.concatenate([past, whole])))
            spans[index] = (np.concatenate([past, whole]), start + len(tokens) + 1)
        allowed = np.zeros((len(ids), len(ids)), bool)
        for i, past in seen:
            allowed[i, past] = True
        media = np.arange(len(head), len(head) + self.media_tokens) if with_media else np.arange(0)
        return {
            "ids": ids,
            "positions": positions,
            "labels": labels,
            "groups": groups,
            "allowed": allowed,
            "media": media,
        }

    def _group(self, name: str) -> int:
        if name not in self.names:
            self.names.append(name)
        return self.names.index(name)
