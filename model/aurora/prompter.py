"""What prompts SAM: the [SEG] of the answer, learnable tokens behind it, or a text encoder's view of the reference.

| `model.prompter` | paper | here |
|---|---|---|
| `seg_token` | 3.1 | the hidden state at the last [SEG] that the answer holds; an answer may have none |
| `learnable_tokens` | 8.1, table 7: "preserves the original vocabulary, appending specialized tokens after the reasoning" | learned embeddings at the positions behind the answer; the mean of their projected states |
| `text_encoder` | 4.3, table 2 w/o MLLM: "an ImageBind text encoder processes simple prompts for SAM" | the reference alone, in a CLIP text tower (as ImageBind's is) or in the base's own language model; no video, no sound, no answer |

All three end in `text_hidden_fcs`, so that SAM's side, losses and evaluation are the same.
"""  # noqa: E501 (a table)

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import CLIPTextModelWithProjection

from configs.schema import ModelConfig
from model.backbones.videollama2.backbone import VideoLlama2
from utils.errors import WeightsError
from utils.types import IGNORE, MediaFeatures, PackedInputs

QUERIES = "prompter.queries."
"""Name of the learnable tokens among the model's parameters."""
Project = Callable[[Tensor], Tensor]


class Prompter(nn.Module):
    """The [SEG] token: the model asks for a mask by writing it."""

    writes = True
    """Whether an answer is written or read at all; without one, video and sound are not encoded either."""
    always_asks = False
    """Whether every answer asks for a mask."""
    width: int | None = None
    """Of the states that prompt SAM; None = that of the language model."""

    def extend(self, answers: Sequence[Tensor] | None) -> Sequence[Tensor] | None:
        """Answers int64 [L] as they are laid out behind the prompts; None for generation."""
        return answers

    def mark(self, packed: PackedInputs) -> PackedInputs:
        """The laid out batch with the positions that prompt SAM."""
        return packed

    def hidden_states(self, backbone: VideoLlama2, packed: PackedInputs, media: MediaFeatures) -> Tensor:
        """[B,S,D] final states of the spliced rows."""
        return _decoded(backbone, backbone.embed(packed, media), packed)

    def features(self, hidden: Tensor, packed: PackedInputs, project: Project) -> Tensor:
        """[B,S,D] states -> [B,C] prompts for SAM, zero for a row that asks for no mask."""
        rows = torch.arange(len(hidden), device=hidden.device)
        at_seg = hidden[rows, packed.seg_positions.clamp(min=0)]
        return project(at_seg).masked_fill(~packed.has_seg[:, None], 0)


class LearnableTokens(Prompter):
    """Q learned embeddings behind every answer, whatever it says.

    Args:
        count: Q.
        like: [V,D] word embeddings; the tokens start at their mean and spread, so that the decoder is not surprised.
    """

    always_asks = True

    def __init__(self, count: int, like: Tensor) -> None:
        super().__init__()
        self.queries = nn.Embedding(count, like.shape[1], dtype=like.dtype, device=like.device)
        with torch.no_grad():
            words = like.detach().float()
            noise = torch.randn(count, like.shape[1]).to(like.device)
            self.queries.weight.copy_(words.mean(0) + noise * words.std(0))

    def extend(self, answers: Sequence[Tensor] | None) -> Sequence[Tensor] | None:
        if answers is None:
            return None
        return [torch.cat([answer, answer.new_zeros(self.queries.num_embeddings)]) for answer in answers]

    def mark(self, packed: PackedInputs) -> PackedInputs:
        if not bool((packed.labels != IGNORE).any()):  # prompts alone, to be continued by generation
            return packed
        last = _last_positions(packed)
        return replace(packed, labels=packed.labels.masked_fill(self._places(packed, last), IGNORE), seg_positions=last)

    def hidden_states(self, backbone: VideoLlama2, packed: PackedInputs, media: MediaFeatures) -> Tensor:
        places = self._places(packed, packed.seg_positions)
        offsets = torch.arange(packed.token_ids.shape[1], device=places.device) - (packed.seg_positions[:, None] + 1)
        tokens = self.queries(offsets.add(self.queries.num_embeddings).clamp(0, self.queries.num_embeddings - 1))
        embeddings = torch.where(places[..., None], tokens, backbone.embed(packed, media))
        return _decoded(backbone, embeddings, packed)

    def features(self, hidden: Tensor, packed: PackedInputs, project: Project) -> Tensor:
        count = self.queries.num_embeddings
        positions = packed.seg_positions[:, None] + torch.arange(1 - count, 1, device=hidden.device)  # [B,Q]
        rows = torch.arange(len(hidden), device=hidden.device)[:, None]
        return project(hidden[rows, positions]).mean(1)

    def _places(self, packed: PackedInputs, last: Tensor) -> Tensor:
        """bool [B,S]: where the tokens stand."""
        column = torch.arange(packed.token_ids.shape[1], device=last.device)[None]
        return (column <= last[:, None]) & (column > last[:, None] - self.queries.num_embeddings)


class TextPrompter(Prompter):
    """The reference alone: prompts hold its ids, and the state at the last of them prompts SAM.

    Args:
        encoder: a CLIP text tower; None = the language model of the base reads the reference.
    """

    writes = False
    always_asks = True

    def __init__(self, encoder: CLIPTextModelWithProjection | None = None) -> None:
        super().__init__()
        self.encoder = encoder
        self.width = None if encoder is None else encoder.config.projection_dim

    def extend(self, answers: Sequence[Tensor] | None) -> None:
        return None

    def mark(self, packed: PackedInputs) -> PackedInputs:
        if bool((packed.media_index >= 0).any()):
            raise ValueError(
                "model.prompter is text_encoder, but the prompts hold media: they must be the reference alone "
                "(dataset.prompt.build_prompts makes them)"
            )
        return replace(packed, seg_positions=_last_positions(packed))

    def hidden_states(self, backbone: VideoLlama2, packed: PackedInputs, media: MediaFeatures) -> Tensor:
        if self.encoder is None:
            return _decoded(backbone, backbone.embed(packed), packed)
        text = self.encoder.text_model(input_ids=packed.token_ids, attention_mask=packed.attention_mask.long())
        # CLIP's pooled embedding is the projected state at the end of the text (Radford et al. 2021, section 2.4).
        return self.encoder.text_projection(text.last_hidden_state)


def build_prompter(config: ModelConfig, backbone: VideoLlama2, dtype: torch.dtype) -> Prompter:
    """The prompter that `model.prompter` names.

    Raises:
        WeightsError: `model.text_encoder` is no folder of a CLIP text model.
    """
    if config.prompter == "learnable_tokens":
        return LearnableTokens(config.learnable_tokens, backbone.language_model.get_input_embeddings().weight)
    if config.prompter == "text_encoder":
        return TextPrompter(None if config.text_encoder is None else load_text_encoder(config.text_encoder, dtype))
    return Prompter()


def load_text_encoder(folder: str, dtype: torch.dtype) -> CLIPTextModelWithProjection:
    """CLIP's text tower from a local folder (config.json of a CLIP or of its text model, safetensors).

    Raises:
        WeightsError: unreadable, or tensors are missing.
    """
    if not (Path(folder) / "config.json").is_file():
        raise WeightsError(f"{folder}: no config.json. Remedy: set model.text_encoder to a CLIP folder, or to null.")
    try:
        encoder, report = CLIPTextModelWithProjection.from_pretrained(
            folder, local_files_only=True, dtype=dtype, output_loading_info=True
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise WeightsError(f"{folder}: not readable as a CLIP text model ({error})") from error
    if report["missing_keys"]:
        missing = sorted(report["missing_keys"])
        raise WeightsError(f"{folder}: lacks {missing[:3]} ({len(missing)} tensors). Remedy: restore its weights.")
    return encoder


def _last_positions(packed: PackedInputs) -> Tensor:
    """int64 [B]: the last position of each row that is no padding."""
    column = torch.arange(packed.token_ids.shape[1], device=packed.token_ids.device)
    return torch.where(packed.attention_mask, column, -1).max(dim=1).values


def _decoded(backbone: VideoLlama2, embeddings: Tensor, packed: PackedInputs) -> Tensor:
    decoder = backbone.language_model.model
    return decoder(
        inputs_embeds=embeddings, attention_mask=packed.attention_mask, use_cache=False
    ).last_hidden_state
