"""Qwen-Image (``QwenImagePipeline``): true guidance, renormalised. Read QwenLM/Qwen-Image, arXiv 2508.02324.

Cut: the image tokens after the last block, before ``norm_out`` and ``proj_out``. The pipeline's texts are as long as the
longest, and its mask is missing where no token is padding; here they always have ``text_tokens`` and a mask. Padding is masked
in the attention, and the positions of images do not depend on it, so that the result is the same.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch.nn.functional import pad

from cachec.compiler.models.base import Settings
from cachec.compiler.models.lost_text import Reader
from cachec.compiler.models.pipeline_model import PipelineModel, ragged_mask
from cachec.runtime.model_io import ModelIO

STATES, MASK = "encoder_hidden_states", "encoder_hidden_states_mask"


class QwenImageModel(PipelineModel):
    """A Qwen-Image pipeline."""

    DEFAULTS = "qwen-image"
    ARGUMENTS: ClassVar = {STATES: "prompt_embeds", MASK: "prompt_embeds_mask"}
    SCALE = "true_cfg_scale"

    @property
    def io(self) -> ModelIO:
        return ModelIO("hidden_states", "timestep", (STATES, MASK), guidance="renormalised")

    @property
    def block(self) -> str:
        return f"transformer_blocks.{self.config.num_layers - 1}"

    @property
    def side(self) -> int:
        side: int = 2 * self.pipeline.vae_scale_factor
        return side

    def embeddings(self, settings: Settings, random: Callable[..., torch.Tensor]) -> dict[str, torch.Tensor]:
        states = random(settings.text_tokens, self.config.joint_attention_dim)
        return {STATES: states, MASK: ragged_mask(states)}

    def taken(self, given: Mapping[str, Any], settings: Settings) -> dict[str, torch.Tensor]:
        states = given[STATES]
        mask = given.get(MASK, torch.ones(states.shape[:2], device=states.device)).bool()
        missing = settings.text_tokens - states.shape[1]
        return {STATES: pad(states, (0, 0, 0, missing)), MASK: pad(mask, (0, missing))}

    def constants(self, settings: Settings) -> dict[str, Any]:
        constants = super().constants(settings)
        return {**constants, "img_shapes": constants["img_shapes"][:1]}  # the same for each sample

    def thin(self, config: Mapping[str, Any]) -> dict[str, Any]:
        return {"num_layers": 1, "num_attention_heads": 2}

    def readers(self, settings: Settings) -> Sequence[Reader]:
        return [Reader("tokenizer", settings.text_tokens)]

    def pictures(self, latents: torch.Tensor, settings: Settings) -> torch.Tensor:
        pipe, vae = self.pipeline, self.pipeline.vae
        unpacked = pipe._unpack_latents(latents, settings.height, settings.width, pipe.vae_scale_factor)
        mean, deviation = (
            torch.tensor(one).view(1, -1, 1, 1, 1).to(unpacked) for one in (vae.config.latents_mean, vae.config.latents_std)
        )
        video: torch.Tensor = vae.decode(unpacked * deviation + mean, return_dict=False)[0]
        return video[:, :, 0]
