"""VideoLLaMA2.1-AV in one module: towers, projectors, language model, and the layout of its rows."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from model.backbones.base import Backbone, Tower, switch_checkpointing
from model.backbones.videollama2.audio_tower import AudioTower
from model.backbones.videollama2.config import VideoLlama2Config
from model.backbones.videollama2.connector import STCConnector
from model.backbones.videollama2.language_model import build_language_model
from model.backbones.videollama2.splice import splice
from model.backbones.videollama2.vision_tower import VisionTower
from utils.types import Batch, MediaFormat, PackedInputs


class VideoLlama2(Backbone):
    """The backbone with random weights; `model.backbones.videollama2.weights.load_backbone` fills it from a checkpoint.

    Args:
        config: sizes.
        attention: "eager" or "sdpa".
    """

    def __init__(self, config: VideoLlama2Config, attention: str = "sdpa") -> None:
        super().__init__()
        self.config = config
        self.media_format = MediaFormat(config.vision.image_size, config.beats.mel_bins)
        width = config.language.hidden_size
        self.language_model = build_language_model(config, attention)
        self.vision_tower = VisionTower(config, attention)
        self.mm_projector = STCConnector(config)
        self.audio_tower = AudioTower(config, attention)
        self.mm_projector_a = nn.Sequential(
            nn.Linear(config.beats.encoder_embed_dim, width), nn.GELU(), nn.Linear(width, width)
        )

    def run_tower(self, tower: Tower, inputs: Tensor) -> Tensor:
        """Frames [R,T,3,P,P] in [-1, 1] -> patches [R,T,N,Dv]; raw log-mel energies float32 [R,F,K] -> [R,Ma,Da].

        Raises:
            ValueError: for another frame size, or sound that the tower cannot read.
        """
        if tower.kind == "audio":  # stays float32 until the tower has normalised it
            return self.audio_tower(inputs)
        if inputs.ndim != 5:
            raise ValueError(f"encode_video: pixels of shape {tuple(inputs.shape)}, but [B, T, 3, P, P] is needed")
        return self.vision_tower(inputs.to(self.dtype).flatten(0, 1)).unflatten(0, inputs.shape[:2])

    def encode_video(self, pixels: Tensor) -> Tensor:
        """Frames [B,T,3,P,P], T >= 2, to video tokens [B,Mv,D], Mv = `config.video_tokens(T)`."""
        return self.mm_projector(self.run_tower(self.towers[0], pixels))

    def encode_audio(self, fbank: Tensor) -> Tensor:
        """Raw log-mel energies float32 [B,F,K] to audio tokens [B,Ma,D], Ma = `config.audio_tokens(F)`."""
        return self.mm_projector_a(self.run_tower(self.towers[1], fbank))

    def layout(
        self, batch: Batch, prompts: Sequence[Tensor], answers: Sequence[Tensor] | None, seg_token_id: int
    ) -> PackedInputs:
        """See `Backbone.layout` and `splice`."""
        video = self.config.video_tokens(batch.pixel_values.shape[1])
        audio = self.config.audio_tokens(batch.fbank.shape[1])
        return splice(prompts, answers, video, audio, seg_token_id)

    def set_gradient_checkpointing(self, enabled: bool) -> None:
        """Recompute the activations of the language model's and of BEATs' layers in backward (training mode only)."""
        switch_checkpointing(self.language_model, enabled)
        self.audio_tower.encoder.gradient_checkpointing = enabled

    def reset_buffers(self, device: torch.device | str) -> None:
        """Compute on `device` what no checkpoint stores (the position index of SigLIP)."""
        self.vision_tower.reset_buffers(device)
