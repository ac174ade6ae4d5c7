"""A prompt read once for G answers, through the decoder's own forward, against full copies one by one.

Two decoders of transformers: Qwen2 (VideoLLaMA2's) and Qwen3 with experts, whose attention and layers are other code.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor
from transformers import PreTrainedModel, Qwen2Config, Qwen2Model, Qwen3MoeConfig, Qwen3MoeModel

from model.aurora.shared_prompt import ATTENTION, PackedAnswers, PromptCache, score_answers

pytestmark = pytest.mark.smoke

SIZES = {
    "vocab_size": 50, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "attn_implementation": ATTENTION,
}  # fmt: skip
PROMPTS, ANSWERS, GROUP = (7, 4), ((5, 3, 1), (2, 5, 4)), 3
"""Tokens of the B = 2 prompts and of their G = 3 answers."""


@pytest.fixture(params=["qwen2", "qwen3_moe"])
def decoder(request: pytest.FixtureRequest) -> PreTrainedModel:
    torch.manual_seed(0)
    if request.param == "qwen2":
        return Qwen2Model(Qwen2Config(**SIZES)).eval()
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "head_dim": 8}
    return Qwen3MoeModel(Qwen3MoeConfig(**SIZES, **experts)).eval()


def padded(rows: Sequence[Tensor], length: int) -> Tensor:
    """Rows [n,D] to [R,length,D]. Padding holds numbers, so that whoever sees it is found out."""
    return torch.stack([torch.cat([row, torch.full((length - len(row), row.shape[1]), 3.0)]) for row in rows])


class Case:
    """Embeddings of ragged prompts and answers, as leaves that collect gradients."""

    def __init__(self) -> None:
        torch.manual_seed(1)
        self.prompts = [torch.randn(n, 32, requires_grad=True) for n in PROMPTS]
        self.answers = [torch.randn(n, 32, requires_grad=True) for row in ANSWERS for n in row]
        self.known = torch.arange(max(PROMPTS)) < torch.tensor(PROMPTS)[:, None]
        self.weights = [torch.randn(len(answer), 32) for answer in self.answers]

    def shared(self, decoder: PreTrainedModel) -> list[Tensor]:
        """Hidden states [L,D] of each answer, the prompts read once."""
        longest = max(map(len, self.answers))
        prompts, answers = padded(self.prompts, self.known.shape[1]), padded(self.answers, longest)
        hidden = score_answers(decoder, prompts, self.known, answers, GROUP)
        return [row[: len(answer)] for row, answer in zip(hidden, self.answers, strict=True)]

    def copies(self, decoder: PreTrainedModel) -> list[Tensor]:
        """The same from one unpadded pass per answer."""
        found = []
        for number, answer in enumerate(self.answers):
            prompt = self.prompts[number // GROUP]
            row = torch.cat([prompt, answer])[None]
            found.append(decoder(inputs_embeds=row, use_cache=False).last_hidden_state[0, len(prompt) :])
        return found

    def gradients(self, decoder: PreTrainedModel, hidden: list[Tensor]) -> dict[str, Tensor]:
        leaves = {f"prompt {i}": x for i, x in enumerate(self.prompts)}
        leaves |= {f"answer {i}": x for i, x in enumerate(self.answers)}
        leaves |= {name: p for name, p in decoder.named_parameters() if p.requires_grad and "embed" not in name}
        total = sum((w * h).sum() for w, h in zip(self.weights, hidden, strict=True))
        found = torch.autograd.grad(total, list(leaves.values()), allow_unused=True)
        return {name: x for name, x in zip(leaves, found, strict=True) if x is not None}


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("lora", [False, True], ids=["whole", "lora"])
def test_values_and_gradients_are_those_of_full_copies(
    decoder: PreTrainedModel, lora: bool, checkpointing: bool
) -> None:
    """Relative to the largest: values to 1e-6, every gradient (inputs, weights, adapters) to 1e-5."""
    if lora:
        inject_adapter_in_model(LoraConfig(r=2, lora_dropout=0.5, target_modules=["q_proj", "v_proj"]), decoder)
        for name, parameter in decoder.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.2)
        decoder.eval()
    case, calls = Case(), []
    for layer in decoder.layers:
        layer.input_layernorm.register_forward_hook(lambda *_: calls.append(1))
    wanted = case.copies(decoder)
    plain = case.gradients(decoder, wanted)
    calls.clear()
    if checkpointing:  # by either name of the switch: it was renamed in transformers 5.24
        enable = getattr(decoder, "activation_checkpointing_enable", None) or decoder.gradient_checkpointing_enable
        enable({"use_reentrant": False})
        decoder.disable_input_require_grads()
    found = case.shared(decoder)
    ours = case.gradients(decoder, found)
    assert len(calls) == 3 * (2 if checkpointing else 1)  # recomputed in backward or not
    assert not any(module.training for module in decoder.modules())
    scale = max(x.abs().max() for x in wanted)
    for got, want in zip(found, wanted, strict=True):
        assert (got - want).abs().max() < 1e-6 * scale
    assert ours.keys() == plain.keys() and len(plain) > 15
    largest = max(x.norm() for x in plain.values())
    for name, want in plain.items():
        assert (ours[name] - want).norm() < 1e-5 * want.norm() + 1e-7 * largest, name


def test_wrong_positions_and_visible_padding_would_show(decoder: PreTrainedModel, monkeypatch) -> None:  # noqa: ANN001
    """Controls: what the test above compares does depend on both."""
    case = Case()
    with torch.no_grad():
        wanted = torch.cat(case.copies(decoder))
        case.known[1, PROMPTS[1] :] = True  # the second prompt's padding is seen, and counted in the positions
        assert (torch.cat(case.shared(decoder)) - wanted).abs().max() > 1e-2
        case = Case()
        of = PackedAnswers.of
        monkeypatch.setattr(PackedAnswers, "of", lambda known, *rest: of(torch.ones_like(known), *rest))
        assert (torch.cat(case.shared(decoder)) - wanted).abs().max() > 1e-2


def test_train_mode_is_refused(decoder: PreTrainedModel) -> None:
    with pytest.raises(RuntimeError, match="eval mode"):
        Case().shared(decoder.train())


@torch.no_grad()
def test_a_plain_forward_is_ordinary_attention(decoder: PreTrainedModel) -> None:
    """Under the registered name too, a 2-D padding mask hides padding, on either side."""
    ordinary = copy.deepcopy(decoder)
    ordinary.set_attn_implementation("sdpa")
    rows, mask = torch.randn(2, 6, 32), torch.ones(2, 6, dtype=torch.bool)
    mask[0, 4:], mask[1, :3] = False, False
    for known in (mask, torch.ones_like(mask), None):
        ours, wanted = (
            one(inputs_embeds=rows, attention_mask=known, use_cache=False).last_hidden_state
            for one in (decoder, ordinary)
        )
        kept = slice(None) if known is None else known
        torch.testing.assert_close(ours[kept], wanted[kept], rtol=0, atol=0)


@torch.no_grad()
def test_tokens_read_one_by_one_are_those_of_one_pass(decoder: PreTrainedModel) -> None:
    """Behind prompts of unequal length; the prompts' keys are kept once."""
    case, longest = Case(), max(n for row in ANSWERS for n in row)
    answers = padded(case.answers, longest)
    cache = PromptCache(decoder, padded(case.prompts, case.known.shape[1]), case.known, GROUP, longest)
    steps = torch.stack([cache.append(answers[:, t]) for t in range(longest)], dim=1)
    for row, wanted in zip(steps, case.copies(decoder), strict=True):
        torch.testing.assert_close(row[: len(wanted)], wanted, rtol=1e-5, atol=2e-6)
    keys, _ = cache.prompts[0]
    assert keys.shape == (2, 2, max(PROMPTS), 8)
