"""Stable Diffusion 3 and 3.5 (``StableDiffusion3Pipeline``). Read Stability-AI/sd3.5, arXiv 2403.03206.

Cut: the image tokens after the last block, before ``norm_out`` and ``proj_out``. Texts are CLIP's tokens and behind them
``text_tokens`` of T5. Skip-layer guidance is none of what is compiled: it calls the transformer a third time.
"""

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch

from cachec.compiler.models.base import Settings
from cachec.compiler.models.from_pictures import FromPictures
from cachec.runtime.model_io import ModelIO


class StableDiffusion3Model(FromPictures):
    """A Stable Diffusion 3 pipeline."""

    DEFAULTS = "sd3"
    TWIN = "StableDiffusion3Img2ImgPipeline"
    ARGUMENTS: ClassVar = {"encoder_hidden_states": "prompt_embeds", "pooled_projections": "pooled_prompt_embeds"}
    GIVES = (None, "hidden_states")  # the last block gives no text
    TOKENIZER = "tokenizer_3"
    SHOWN = ("vae", "transformer")

    @property
    def io(self) -> ModelIO:
        return ModelIO("hidden_states", "timestep", tuple(self.ARGUMENTS), guidance="plain")

    @property
    def side(self) -> int:
        side: int = self.pipeline.vae_scale_factor * self.config.patch_size
        return side

    def embeddings(self, settings: Settings, random: Callable[..., torch.Tensor]) -> dict[str, torch.Tensor]:
        length = self.pipeline.tokenizer_max_length + settings.text_tokens
        return {
            "encoder_hidden_states": random(length, self.config.joint_attention_dim),
            "pooled_projections": random(self.config.pooled_projection_dim),
        }

    def thin(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """The last block is of another kind than those before."""
        return {
            "num_layers": 2,
            "num_attention_heads": 2,
            "caption_projection_dim": 2 * config["attention_head_dim"],
            "dual_attention_layers": tuple(layer for layer in config["dual_attention_layers"] if layer < 1),
        }
