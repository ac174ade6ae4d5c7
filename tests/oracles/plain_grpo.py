"""Stage 3 without any sharing: what the shared prompt is measured against, in tests and in scripts/dev/bench_grpo.py.

One batch of G full copies: every clip is encoded once per answer, transformers' `generate` prefills the prompt once per
answer, and the answers are scored by the ordinary forward over G copies of prompt and answer. Generous to the plain way
where the released code is not: logits exist at the answers' positions alone, and no clip is encoded again in the loss.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedTokenizerBase

from configs.schema import RunConfig
from model.aurora.generation import STOP_TOKEN
from model.aurora.model import AuroraModel
from model.backbones.videollama2.splice import splice
from model.stages.grpo import GrpoStage, Rollouts
from utils.types import Batch, Generation, GroupInputs, GroupOutput, MediaFeatures, StepLoss


class PlainEngine(nn.Module):
    """An engine that scores G full copies of each prompt with the ordinary forward."""

    def __init__(self, model: AuroraModel, temperature: float) -> None:
        super().__init__()
        self.module, self.temperature = model, temperature
        self.batch: Batch | None = None
        self.answers: Sequence[Tensor] = ()
        """Of the rollouts that are scored; to be set before each call."""

    def forward(self, packed: GroupInputs, media: MediaFeatures, frame_index: Tensor | None) -> GroupOutput:
        """As `AuroraModel.forward`; of `packed`, only the layout of the answers is read."""
        prompts = [p for p in self.batch.prompts for _ in range(packed.group)]
        copies = self.module.pack(self.batch, self.answers, prompts)
        frames = None if frame_index is None else frame_index.repeat_interleave(packed.group, 0)
        output = self.module(copies, media.repeat(packed.group), frames)
        scores = F.log_softmax(output.answer_logits.float() / self.temperature, -1)
        log_probs = scores.gather(-1, output.answer_labels[:, None])[:, 0]
        entropy = -(scores.exp() * scores).sum(-1).detach()
        places = torch.zeros(packed.targets.shape, device=log_probs.device)
        return GroupOutput(
            places.masked_scatter(packed.mask, log_probs),
            places.masked_scatter(packed.mask, entropy),
            output.seg_features,
            output.mask_logits,
        )


class PlainGrpoStage(GrpoStage):
    """The same step, every part of it G times. One process, frozen towers."""

    def __init__(self, config: RunConfig, model: AuroraModel, tokenizer: PreTrainedTokenizerBase | None = None) -> None:
        super().__init__(config, PlainEngine(model, config.grpo.temperature), tokenizer)

    def draw(self, batch: Batch) -> tuple[MediaFeatures, Generation]:
        """Encode each clip G times; answers from `generate(num_return_sequences=G)`."""
        g, model = self.config.grpo, self.model
        copies = model.encode(repeat(batch, g.group_size))
        media = every(copies, g.group_size)
        sizes, frames, sounds = model.backbone.config, batch.pixel_values.shape[1], batch.fbank.shape[1]
        packed = splice(batch.prompts, None, sizes.video_tokens(frames), sizes.audio_tokens(sounds),
                        model.seg_token_id, padding_side="left")  # fmt: skip
        stop = self.tokenizer.convert_tokens_to_ids(STOP_TOKEN)
        drawn = model.backbone.language_model.generate(
            inputs_embeds=model.backbone.embed(packed, media), attention_mask=packed.attention_mask.long(),
            do_sample=True, temperature=g.temperature, top_k=self.sampling.top_k, top_p=g.top_p,
            repetition_penalty=self.sampling.repetition_penalty, max_new_tokens=g.max_new_tokens,
            num_return_sequences=g.group_size, eos_token_id=stop, pad_token_id=0,
        )  # fmt: skip
        ids = [self._cut(row, stop) for row in drawn.cpu()]
        texts = [self.tokenizer.decode([t for t in row.tolist() if t != stop]).strip() for row in ids]
        cut_off = torch.tensor([int(row[-1]) != stop for row in ids], device=model.device)
        # The released code regenerates the sequence for the states at [SEG] (LISA_sft_distill.py:256-282).
        rows = model.pack(batch, ids, [p for p in batch.prompts for _ in range(g.group_size)])
        hidden = model.hidden_states(rows, replace(media, image_embeddings=None).repeat(g.group_size))
        states = hidden[rows.answer_of_query, rows.position_of_query]
        return media, Generation(ids, texts, states, rows.answer_of_query, cut_off)

    def loss(self, prepared: Rollouts) -> StepLoss:
        """As the stage's, through `PlainEngine`."""
        self.engine.batch, self.engine.answers = prepared.batch, prepared.answers.token_ids
        return super().loss(prepared)

    @staticmethod
    def _cut(row: Tensor, stop: int) -> Tensor:
        """Up to the stop token, itself included."""
        ends = (row == stop).nonzero().flatten()
        return row[: int(ends[0]) + 1] if len(ends) else row


def repeat(batch: Batch, group: int) -> Batch:
    """Each clip `group` times in a row."""
    return Batch(
        samples=[s for s in batch.samples for _ in range(group)],
        pixel_values=batch.pixel_values.repeat_interleave(group, 0),
        sam_pixels=batch.sam_pixels.repeat_interleave(group, 0),
        fbank=batch.fbank.repeat_interleave(group, 0),
        masks=[m for m in batch.masks for _ in range(group)],
    )


def every(media: MediaFeatures, group: int) -> MediaFeatures:
    """The first of each `group` rows."""
    images = media.image_embeddings
    return MediaFeatures(media.video[::group], media.audio[::group], None if images is None else images[::group])
