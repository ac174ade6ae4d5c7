"""VideoLLaMA2.1-AV in one module: towers, projectors, language model, and the embedding of a spliced batch."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from model.backbones.videollama2.audio_tower import AudioTower
from model.backbones.videollama2.config import VideoLlama2Config
from model.backbones.videollama2.connector import STCConnector
from model.backbones.videollama2.language_model import build_language_model
from model.backbones.videollama2.vision_tower import VisionTower
from utils.types import MediaFeatures, PackedInputs


class VideoLlama2(nn.Module):
    """The backbone with random weights; `model.backbones.videollama2.weights.load_backbone` fills it from a checkpoint.

    Whether a part is trained is the caller's affair: nothing here runs under no_grad, and a part whose parameters do
    not require gradients records none.

    Args:
        config: sizes.
        attention: "eager" or "sdpa".
    """

    def __init__(self, config: VideoLlama2Config, attention: str = "sdpa") -> None:
        super().__init__()
        self.config = config
        width = config.language.hidden_size
        self.language_model = build_language_model(config, attention)
        self.vision_tower = VisionTower(config, attention)
        self.mm_projector = STCConnector(config)
        self.audio_tower = AudioTower(config, attention)
        self.mm_projector_a = nn.Sequential(
            nn.Linear(config.beats.encoder_embed_dim, width), nn.GELU(), nn.Linear(width, width)
        )

    @property
    def device(self) -> torch.device:
        return self.language_model.lm_head.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.language_model.lm_head.weight.dtype

    def encode_video(self, pixels: Tensor) -> Tensor:
        """Frames to video tokens.

        Args:
            pixels: [B,T,3,P,P] in [-1, 1], T >= 2 of any number.

        Returns:
            [B,Mv,D], Mv = `config.video_tokens(T)`.

        Raises:
            ValueError: for another frame size or fewer than two frames.
        """
        if pixels.ndim != 5:
            raise ValueError(f"encode_video: pixels of shape {tuple(pixels.shape)}, but [B, T, 3, P, P] is needed")
        patches = self.vision_tower(pixels.flatten(0, 1))
        return self.mm_projector(patches.unflatten(0, pixels.shape[:2]))

    def encode_audio(self, fbank: Tensor) -> Tensor:
        """Raw log-mel energies float32 [B,F,K] to audio tokens [B,Ma,D], Ma = `config.audio_tokens(F)`."""
        return self.mm_projector_a(self.audio_tower(fbank))

    def embed(self, packed: PackedInputs, media: MediaFeatures | None = None) -> Tensor:
        """Put word embeddings and media features where `packed` says.

        Args:
            packed: positions of a whole batch.
            media: features of the same B rows; None for text alone. A row that uses only one kind still has an entry
                in both tensors (its content is not read).

        Returns:
            [B,S,D] embeddings, differentiable through words and media; padding is zero.

        Raises:
            ValueError: if the rows differ in number, or a position asks for a media token that is not there.
        """
        text = self.language_model.get_input_embeddings()(packed.token_ids)
        parts = [] if media is None else [x for x in (media.video, media.audio) if x is not None]
        index = packed.media_index
        if parts:
            tokens = torch.cat(parts, dim=1)
            if tokens.shape[0] != index.shape[0]:
                raise ValueError(f"embed: media of {tokens.shape[0]} rows for {index.shape[0]} packed rows")
            gathered = tokens.gather(1, index.clamp(min=0).unsqueeze(-1).expand(-1, -1, tokens.shape[-1]))
            text = torch.where((index >= 0).unsqueeze(-1), gathered.to(text.dtype), text)
        elif bool((index >= 0).any()):
            raise ValueError("embed: the rows hold media positions but no media features were given")
        return text.masked_fill(~packed.attention_mask.unsqueeze(-1), 0)

    def set_gradient_checkpointing(self, enabled: bool) -> None:
        """Recompute the activations of the language model's and of BEATs' layers in backward (training mode only)."""
        model = self.language_model
        # transformers 5.24 renamed its switch and warns about the old name; the first argument stayed what it was.
        kind = "activation" if hasattr(model, "activation_checkpointing_enable") else "gradient"
        if enabled:
            getattr(model, f"{kind}_checkpointing_enable")({"use_reentrant": False})
            # The switch also hooks the word embeddings so that their output requires gradients, which this form of
            # checkpointing does not need, and which would record a graph where nothing is trained.
            model.disable_input_require_grads()
        else:
            getattr(model, f"{kind}_checkpointing_disable")()
        self.audio_tower.encoder.gradient_checkpointing = enabled

    def reset_buffers(self, device: torch.device | str) -> None:
        """Compute on `device` what no checkpoint stores (the position index of SigLIP)."""
        self.vision_tower.reset_buffers(device)
