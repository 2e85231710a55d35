"""What pipelines of videos have in common: a number of frames, of which the autoencoder keeps every so many."""

from dataclasses import replace
from typing import Any

import torch

from cachec.compiler.models.base import Settings
from cachec.compiler.models.pipeline_model import PipelineModel
from cachec.runtime.errors import InputError
from cachec.runtime.specs import Array


class VideoModel(PipelineModel):
    """A pipeline of videos: latents [B, C, F, H, W], of ``spacing`` * (F - 1) + 1 frames."""

    @property
    def spacing(self) -> int:
        """Frames from one that is kept to the next."""
        spacing: int = self.pipeline.vae_scale_factor_temporal
        return spacing

    def check_sizes(self, settings: Settings) -> None:
        super().check_sizes(replace(settings, frames=1))
        frames, spacing = settings.frames, self.spacing
        if frames % spacing != 1:
            near = frames // spacing * spacing + 1
            wanted = f"{spacing}k + 1 frames, as {near} or {near + spacing}"
            raise InputError(f"frames is {frames}; {self.spec.name} makes videos of {wanted}")

    def sized(self, settings: Settings) -> dict[str, Any]:
        return {**super().sized(settings), "num_frames": settings.frames}

    def small(self, settings: Settings) -> Settings:
        return replace(super().small(settings), frames=1 + self.spacing)

    def finished(self, made: torch.Tensor) -> Array:
        """Videos [B, F, H, W, 3]."""
        array: Array = self.pipeline.video_processor.postprocess_video(made, output_type="np")
        return array
