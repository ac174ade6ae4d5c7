"""The door for multimodal language models: what one must offer to reason about a clip. A new backbone is one subclass.

Model, stages, generation, LoRA and checkpoints use nothing else of a backbone. It is chosen by the `model_type` in the
config.json of `model.base` (`model.aurora.build.BACKBONES`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from utils.types import Batch, MediaFeatures, MediaFormat, PackedInputs


@dataclass(frozen=True)
class Tower:
    """The way of one kind of media to the language model: a tower, then a projector, two modules of the backbone."""

    kind: Literal["video", "audio"]  # field of `MediaFeatures`
    tower: str
    projector: str
    inputs: str  # field of `Batch` that the tower reads
    key: str  # property of `Sample` that names these inputs: features of frozen towers are kept by it


class Backbone(nn.Module, ABC):
    """Towers, projectors and a causal language model of transformers.

    A subclass makes the modules that `components` names (an identity where a tower projects by itself): light
    checkpoints and the patterns of `trainable` know the weights by these names. Whether a part is trained is the
    caller's affair: nothing here runs under no_grad.
    """

    components = ("vision_tower", "mm_projector", "audio_tower", "mm_projector_a", "language_model")
    towers = (
        Tower("video", "vision_tower", "mm_projector", "pixel_values", "video_key"),
        Tower("audio", "audio_tower", "mm_projector_a", "fbank", "audio_key"),
    )
    language_model: PreTrainedModel
    media_format: MediaFormat
    """How frames and sound are prepared."""

    @property
    def decoder(self) -> PreTrainedModel:
        """Embeddings in, final-norm hidden states out; its `layers` are what gradient checkpointing recomputes."""
        return self.language_model.model

    @property
    def lm_head(self) -> nn.Linear:
        return self.language_model.lm_head

    @property
    def words(self) -> nn.Embedding:
        """Token ids in, embeddings out."""
        return self.language_model.get_input_embeddings()

    @property
    def device(self) -> torch.device:
        return self.lm_head.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.lm_head.weight.dtype

    @abstractmethod
    def run_tower(self, tower: Tower, inputs: Tensor) -> Tensor:
        """`inputs` of R clips on the backbone's device, as the batch holds them -> what the projector reads, [R,...].

        The projector then gives [R,M,D] tokens.
        """

    @abstractmethod
    def layout(
        self, batch: Batch, prompts: Sequence[Tensor], answers: Sequence[Tensor] | None, seg_token_id: int
    ) -> PackedInputs:
        """Lay out prompts, media positions and answers as one row each; runs no weight, so it cuts no gradient.

        Args:
            batch: gives the token counts of video and sound.
            prompts: int64 [L] each, with a placeholder where the media go.
            answers: int64 [L] each, one per prompt; None = prompts alone.
            seg_token_id: id of [SEG]; `query_positions` says which of them ask for a mask.
        """

    @abstractmethod
    def set_gradient_checkpointing(self, enabled: bool) -> None:
        """Recompute activations in backward (train mode only)."""

    @abstractmethod
    def reset_buffers(self, device: torch.device | str) -> None:
        """Compute on `device` what no checkpoint stores, after a construction on the meta device."""

    def embed(self, packed: PackedInputs, media: MediaFeatures | None = None) -> Tensor:
        """Put word embeddings and media features where `packed` says.

        Args:
            packed: positions of a whole batch.
            media: features of the same B rows; None for text alone. A row that uses only one kind still has an entry
                in both tensors (its content is not read).

        Returns:
            [B,S,D] embeddings, differentiable through words and media; padding is zero.

        Raises:
            ValueError: the rows differ in number, or a position asks for a media token that is not there.
        """
        text = self.words(packed.token_ids)
        parts = [] if media is None else [x for x in (media.video, media.audio) if x is not None]
        index = packed.media_index
        if parts:
            tokens = torch.cat(parts, dim=1)
            if tokens.shape[0] != index.shape[0]:
                raise ValueError(f"embed: media of {tokens.shape[0]} rows for {index.shape[0]} packed rows")
            # One gather for all rows: a concatenation per row would depend on lengths that differ between ranks.
            gathered = tokens.gather(1, index.clamp(min=0).unsqueeze(-1).expand(-1, -1, tokens.shape[-1]))
            text = torch.where((index >= 0).unsqueeze(-1), gathered.to(text.dtype), text)
        elif bool((index >= 0).any()):
            raise ValueError("embed: the rows hold media positions but no media features were given")
        return text.masked_fill(~packed.attention_mask.unsqueeze(-1), 0)


def switch_checkpointing(model: PreTrainedModel, enabled: bool) -> None:
    """Recompute the activations of a model's layers in backward (train mode only), or stop doing so."""
    # transformers 5.24 renamed its switch and warns about the old name; the first argument stayed what it was.
    kind = "activation" if hasattr(model, "activation_checkpointing_enable") else "gradient"
    if not enabled:
        getattr(model, f"{kind}_checkpointing_disable")()
        return
    getattr(model, f"{kind}_checkpointing_enable")({"use_reentrant": False})
    # The switch also hooks the word embeddings so that their output requires gradients, which this form of
    # checkpointing does not need, and which would record a graph where nothing is trained.
    model.disable_input_require_grads()


def query_positions(answer: Tensor, seg_token_id: int) -> Tensor:
    """int64 [n]: where an answer [L] asks for a mask. The last [SEG] counts: a clip has one object, and a reflective
    answer corrects what it said before."""
    return (answer == seg_token_id).nonzero().flatten()[-1:]
