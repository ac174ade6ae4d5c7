"""Lay out text and media of a batch as one sequence per row, with labels, mask and the [SEG] position aligned.

The released merge (videollama2_arch.py:388-552) concatenates embeddings, rebuilds labels and masks on the side and
loses all but the last row's [SEG]. Here positions alone are computed, from known token counts; `VideoLlama2.embed`
then gathers. Runs no weights, so it may run under no_grad or in a worker without cutting a gradient.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from model.backbones.base import query_positions
from utils.types import AUDIO_PLACEHOLDER, IGNORE, VIDEO_PLACEHOLDER, PackedInputs


@dataclass(frozen=True)
class _Row:
    token_ids: Tensor
    media_index: Tensor
    labels: Tensor
    queries: Tensor


def splice(
    prompts: Sequence[Tensor],
    answers: Sequence[Tensor] | None,
    video_tokens: int,
    audio_tokens: int,
    seg_token_id: int,
    has_audio: Sequence[bool] | None = None,
    padding_side: Literal["right", "left"] = "right",
) -> PackedInputs:
    """Expand each prompt's placeholder to media positions and append its answer.

    VIDEO_PLACEHOLDER becomes [video tokens, audio tokens] (video alone for a row without sound), AUDIO_PLACEHOLDER the
    audio tokens alone; a prompt without a placeholder is plain text. Media indices count through the row's
    [video, audio] features, so an audio-only row of a batch that has frames starts at `video_tokens`.

    Args:
        prompts: B x int64 [L], at most one placeholder each.
        answers: B x int64 [L] target answers (may be empty), or None for generation.
        video_tokens: Mv of the batch's `MediaFeatures` (0 if it has no video).
        audio_tokens: Ma likewise.
        seg_token_id: id of [SEG].
        has_audio: per row, whether VIDEO_PLACEHOLDER brings sound; None = wherever the batch has sound.
        padding_side: "right" to train and score, "left" for a generation prefill (every row then ends at S-1; rotary
            positions are relative, so the shift changes nothing).

    Returns:
        The packed batch on the prompts' device: labels at answer tokens only, a query at the last [SEG] of each ANSWER
        that has one (a [SEG] in the prompt does not count).

    Raises:
        ValueError: for more than one placeholder, a placeholder whose media the batch lacks, other negative ids,
            placeholders in an answer, an empty row, or counts that differ; names the row.
    """
    if padding_side not in ("right", "left"):
        raise ValueError(f"splice: padding_side = {padding_side!r}; must be 'right' or 'left'")
    if not prompts:
        raise ValueError("splice: the batch has no rows")
    if answers is None:
        answers = [prompt.new_empty(0) for prompt in prompts]
    if has_audio is None:
        has_audio = [True] * len(prompts)
    if not len(prompts) == len(answers) == len(has_audio):
        raise ValueError(
            f"splice: {len(prompts)} prompts, {len(answers)} answers, {len(has_audio)} has_audio flags; must be equal"
        )
    rows = []
    for number, (prompt, answer, sound) in enumerate(zip(prompts, answers, has_audio, strict=True)):
        try:
            rows.append(_splice_row(prompt, answer, video_tokens, audio_tokens if sound else 0, seg_token_id))
        except ValueError as error:
            raise ValueError(f"splice: row {number}: {error}") from error
    return _pad(rows, padding_side)


def _splice_row(prompt: Tensor, answer: Tensor, video_tokens: int, audio_tokens: int, seg_token_id: int) -> _Row:
    if prompt.ndim != 1 or answer.ndim != 1:
        raise ValueError(f"ids must be 1-D, got prompt {tuple(prompt.shape)} and answer {tuple(answer.shape)}")
    if (answer < 0).any():
        raise ValueError(f"the answer holds negative id {int(answer.min())}; placeholders belong in the prompt")
    at, media = _placeholder(prompt, video_tokens, audio_tokens)
    before, after = prompt[:at], prompt[at + 1 :]
    # Id 0 holds the places of the media: `embed` puts their features over whatever word that is.
    token_ids = torch.cat([before, torch.zeros_like(media), after, answer])
    if not len(token_ids):
        raise ValueError("prompt and answer are both empty")
    start = len(token_ids) - len(answer)
    media_index = torch.full_like(token_ids, -1)
    media_index[at : at + len(media)] = media
    # A label stands AT its token; the shift by one happens where logits are read, in every stage alike.
    labels = torch.full_like(token_ids, IGNORE)
    labels[start:] = answer
    # Counted in the spliced row, behind hundreds of media tokens: the released GRPO looks its positions up in the row
    # without media (LISA_grpo.py:252-263), and so trains other tokens.
    return _Row(token_ids, media_index, labels, start + query_positions(answer, seg_token_id))


def _placeholder(prompt: Tensor, video_tokens: int, audio_tokens: int) -> tuple[int, Tensor]:
    """(position of the placeholder, indices of the media tokens it stands for); (L, none) for plain text."""
    negative = (prompt < 0).nonzero().flatten().tolist()
    if not negative:
        return len(prompt), prompt.new_empty(0)
    if len(negative) > 1:
        found = prompt[negative].tolist()
        raise ValueError(f"{len(found)} placeholders {found} in one prompt; at most one is allowed")
    kind = int(prompt[negative[0]])
    if kind not in (VIDEO_PLACEHOLDER, AUDIO_PLACEHOLDER):
        raise ValueError(f"id {kind} is no placeholder; {VIDEO_PLACEHOLDER} is video, {AUDIO_PLACEHOLDER} is audio")
    first = 0 if kind == VIDEO_PLACEHOLDER else video_tokens
    if (video_tokens if kind == VIDEO_PLACEHOLDER else audio_tokens) < 1:
        raise ValueError(f"placeholder {kind} asks for media that the row does not have "
                         f"(video_tokens = {video_tokens}, audio_tokens = {audio_tokens})")  # fmt: skip
    return negative[0], torch.arange(first, video_tokens + audio_tokens, device=prompt.device)


def _pad(rows: list[_Row], side: Literal["right", "left"]) -> PackedInputs:
    # On the right, a causal decoder never lets a valid token see padding; on the left, every row ends together.
    lengths = [len(row.token_ids) for row in rows]
    shifts = [max(lengths) - n if side == "left" else 0 for n in lengths]

    def stack(tensors: list[Tensor], value: int) -> Tensor:
        return pad_sequence(tensors, batch_first=True, padding_value=value, padding_side=side)

    device, counts = rows[0].token_ids.device, [len(row.queries) for row in rows]
    return PackedInputs(
        token_ids=stack([row.token_ids for row in rows], 0),
        media_index=stack([row.media_index for row in rows], -1),
        labels=stack([row.labels for row in rows], IGNORE),
        attention_mask=stack([torch.ones_like(row.token_ids, dtype=torch.bool) for row in rows], 0),
        position_ids=torch.arange(max(lengths), device=device).repeat(len(rows), 1),
        answer_of_query=torch.arange(len(rows), device=device).repeat_interleave(torch.tensor(counts, device=device)),
        position_of_query=torch.cat([row.queries + shift for row, shift in zip(rows, shifts, strict=True)]),
    )
