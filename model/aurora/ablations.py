"""Rows of the paper's tables in which something else than a written [SEG] prompts SAM: `model.prompter`.

| `model.prompter` | paper | here |
|---|---|---|
| `seg_token` | 3.1 | `AuroraModel`: the state at the last [SEG] that the answer holds; an answer may have none |
| `learnable_tokens` | 8.1, table 7: "preserves the original vocabulary, appending specialized tokens after the reasoning" | learned embeddings at the positions behind the answer; the mean of their projected states |
| `text_encoder` | 4.3, table 2 w/o MLLM: "an ImageBind text encoder processes simple prompts for SAM" | the reference alone, in a CLIP text tower (as ImageBind's is) or in the base's own language model; no video, no sound, no answer |

All three end in `text_hidden_fcs`, so that SAM's side, losses and evaluation are the same.
"""  # noqa: E501 (a table)

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import CLIPTextModelWithProjection

from model.aurora.features import FeatureCache
from model.aurora.model import AuroraModel
from model.backbones.base import Backbone
from model.segmenters.base import Segmenter
from utils.errors import WeightsError
from utils.types import IGNORE, Batch, Generation, MediaFeatures, PackedInputs


class AskingModel(AuroraModel):
    """A model whose every answer asks for one mask, whatever it says; a subclass adds its parts as `prompter`."""

    prompter: nn.ModuleDict

    @property
    def components(self) -> tuple[str, ...]:
        """As of `AuroraModel`, and the prompter where it has parameters."""
        return (*super().components, "prompter") if len(self.prompter) else super().components

    def drawn_queries(self, answers: Generation | None, batch: Batch, media: MediaFeatures) -> tuple[Tensor, Tensor]:
        """The answers are read again, with what prompts SAM behind them."""
        packed = self.pack(batch, None if answers is None else answers.token_ids)
        return self.seg_features(self.hidden_states(packed, media), packed), packed.answer_of_query


class LearnableQueryAurora(AskingModel):
    """`count` learned embeddings behind every answer; they start at the mean and spread of the word embeddings."""

    def __init__(
        self,
        backbone: Backbone,
        segmenter: Segmenter,
        seg_token_id: int,
        feature_cache: FeatureCache | None = None,
        count: int = 1,
    ) -> None:
        words = backbone.words.weight.detach()
        queries = nn.Embedding(count, words.shape[1], dtype=words.dtype, device=words.device)
        with torch.no_grad():
            # Like words, so that the decoder is not surprised.
            noise = torch.randn(count, words.shape[1]).to(words.device)
            queries.weight.copy_(words.float().mean(0) + noise * words.float().std(0))
        super().__init__(backbone, segmenter, seg_token_id, feature_cache)
        self.prompter = nn.ModuleDict({"queries": queries})

    def pack(
        self, batch: Batch, answers: Sequence[Tensor] | None, prompts: Sequence[Tensor] | None = None
    ) -> PackedInputs:
        """Room for the learned tokens behind each answer: the last is the query, and none is a word to learn."""
        if answers is None:  # prompts alone, to be continued by generation
            return super().pack(batch, None, prompts)
        room = torch.zeros(self.prompter["queries"].num_embeddings, dtype=torch.long)
        packed = _asking_at_the_end(
            super().pack(batch, [torch.cat([answer.cpu(), room]) for answer in answers], prompts)
        )
        return replace(packed, labels=packed.labels.index_put(self._places(packed), packed.labels.new_tensor(IGNORE)))

    def embed(self, packed: PackedInputs, media: MediaFeatures) -> Tensor:
        """With the learned tokens in their places."""
        embedded, queries = super().embed(packed, media), self.prompter["queries"]
        if not len(packed.answer_of_query):
            return embedded
        rows, places = self._places(packed)
        # Looked up instead of read as a weight: ZeRO-3 gathers a parameter when its own module is called.
        tokens = queries(torch.arange(queries.num_embeddings, device=places.device))
        return embedded.index_put((rows, places), tokens.expand(len(rows), -1, -1))

    def seg_features(self, hidden: Tensor, packed: PackedInputs) -> Tensor:
        """[B,S,D] -> [B,C]: the mean of the projected states of the learned tokens."""
        return self.project(hidden[self._places(packed)]).mean(1)

    def _places(self, packed: PackedInputs) -> tuple[Tensor, Tensor]:
        """Rows int64 [B,1] and positions int64 [B,count] of the learned tokens."""
        steps = torch.arange(1 - self.prompter["queries"].num_embeddings, 1, device=packed.position_of_query.device)
        return packed.answer_of_query[:, None], packed.position_of_query[:, None] + steps


class TextEncoderAurora(AskingModel):
    """The reference alone: prompts hold its ids, and the state at the last of them prompts SAM.

    Args:
        encoder: a CLIP text tower; None = the language model of the base reads the reference.
    """

    writes = False

    def __init__(
        self,
        backbone: Backbone,
        segmenter: Segmenter,
        seg_token_id: int,
        feature_cache: FeatureCache | None = None,
        encoder: CLIPTextModelWithProjection | None = None,
    ) -> None:
        width = None if encoder is None else encoder.config.projection_dim
        super().__init__(backbone, segmenter, seg_token_id, feature_cache, width)
        self.prompter = nn.ModuleDict({} if encoder is None else {"encoder": encoder})

    def pack(
        self, batch: Batch, answers: Sequence[Tensor] | None, prompts: Sequence[Tensor] | None = None
    ) -> PackedInputs:
        """The references; answers are not read.

        Raises:
            ValueError: the prompts hold media.
        """
        packed = super().pack(batch, None, prompts)
        if bool((packed.media_index >= 0).any()):
            raise ValueError(
                "model.prompter is text_encoder, but the prompts hold media: they must be the reference alone "
                "(dataset.references.build_prompts makes them)"
            )
        return _asking_at_the_end(packed)

    def hidden_states(self, packed: PackedInputs, media: MediaFeatures) -> Tensor:
        """[B,S,D] states of the references."""
        if not len(self.prompter):
            return super().hidden_states(packed, media)
        encoder = self.prompter["encoder"]
        text = encoder.text_model(input_ids=packed.token_ids, attention_mask=packed.attention_mask.long())
        # CLIP's pooled embedding is the projected state at the end of the text (Radford et al. 2021, section 2.4).
        return encoder.text_projection(text.last_hidden_state)


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


def _asking_at_the_end(packed: PackedInputs) -> PackedInputs:
    """The same rows with one query each, at the last position that is no padding."""
    rows, length = packed.token_ids.shape
    column = torch.arange(length, device=packed.token_ids.device)
    last = torch.where(packed.attention_mask, column, -1).amax(1)
    return replace(packed, answer_of_query=torch.arange(rows, device=last.device), position_of_query=last)
