"""Wan 2.1 (``WanPipeline``, text to video). Read Wan-Video/Wan2.1, arXiv 2503.20314.

Cut: the video tokens after the last block, before the final norm and projection. Texts have no mask: padding is attended to.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import torch

from cachec.compiler.models.base import Settings
from cachec.compiler.models.lost_text import Reader
from cachec.compiler.models.video_model import VideoModel
from cachec.runtime.model_io import ModelIO

STATES = "encoder_hidden_states"


class WanModel(VideoModel):
    """A Wan pipeline."""

    DEFAULTS = "wan"
    ARGUMENTS: ClassVar = {STATES: "prompt_embeds"}

    @property
    def io(self) -> ModelIO:
        return ModelIO("hidden_states", "timestep", (STATES,), guidance="plain")

    @property
    def block(self) -> str:
        return f"blocks.{self.config.num_layers - 1}"

    @property
    def side(self) -> int:
        side: int = self.pipeline.vae_scale_factor_spatial * self.config.patch_size[1]
        return side

    def embeddings(self, settings: Settings, random: Callable[..., torch.Tensor]) -> dict[str, torch.Tensor]:
        return {STATES: random(settings.text_tokens, self.config.text_dim)}

    def thin(self, config: Mapping[str, Any]) -> dict[str, Any]:
        return {"num_layers": 1, "num_attention_heads": 2}

    def readers(self, settings: Settings) -> Sequence[Reader]:
        return [Reader("tokenizer", settings.text_tokens)]

    def pictures(self, latents: torch.Tensor, settings: Settings) -> torch.Tensor:
        vae = self.pipeline.vae
        mean, deviation = (
            torch.tensor(one).view(1, -1, 1, 1, 1).to(latents) for one in (vae.config.latents_mean, vae.config.latents_std)
        )
        video: torch.Tensor = vae.decode(latents * deviation + mean, return_dict=False)[0]
        return video
