"""From log-mel energies to audio features: normalisation, patches, BEATs (released code BEATs.py:65-180)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from model.backbones.videollama2.beats import BeatsEncoder
from model.backbones.videollama2.config import VideoLlama2Config


class AudioTower(nn.Module):
    """Filter-bank energies to one feature per 16 x 16 patch (at the released size).

    Args:
        config: sizes (`config.beats`).
        attention: see `BeatsEncoder`.
    """

    def __init__(self, config: VideoLlama2Config, attention: str = "sdpa") -> None:
        super().__init__()
        beats = config.beats
        self.patch, self.mel_bins = beats.input_patch_size, beats.mel_bins
        self.mean, self.scale = beats.fbank_mean, 2 * beats.fbank_std
        self.patch_embedding = nn.Conv2d(1, beats.embed_dim, self.patch, stride=self.patch, bias=False)
        self.layer_norm = nn.LayerNorm(beats.embed_dim)
        self.post_extract_proj = nn.Linear(beats.embed_dim, beats.encoder_embed_dim)
        self.encoder = BeatsEncoder(beats, attention)
        # AudioSet head: stored in the release and never run by VideoLLaMA2; held so that names round-trip.
        self.predictor = nn.Linear(beats.encoder_embed_dim, beats.predictor_class)

    def forward(self, fbank: Tensor) -> Tensor:
        """Encode sound.

        Args:
            fbank: float32 [B,F,K] raw log-mel energies; normalised in that precision, then cast to the tower's dtype
                (the released code casts to bf16 first, which costs about .005 after normalisation).

        Returns:
            [B,Ma,Da], Ma = (F // patch) * (K // patch), ordered (time, frequency).

        Raises:
            ValueError: for another number of mel bins, less sound than one patch, or a half-precision fbank.
        """
        if fbank.ndim != 3 or fbank.shape[2] != self.mel_bins or fbank.shape[1] < self.patch:
            raise ValueError(
                f"audio tower: fbank of shape {tuple(fbank.shape)}, but [B, F, {self.mel_bins}] with F >= {self.patch} "
                "is needed; compute it with beats_config.mel_bins bins and at least one patch of frames"
            )
        if fbank.dtype not in (torch.float32, torch.float64):
            raise ValueError(f"audio tower: fbank is {fbank.dtype}; pass the raw energies in float32")
        x = ((fbank - self.mean) / self.scale).to(self.patch_embedding.weight.dtype)
        x = self.patch_embedding(x.unsqueeze(1)).flatten(2).transpose(1, 2)
        return self.encoder(self.post_extract_proj(self.layer_norm(x)))
