"""FLUX.1 (``FluxPipeline``): FLUX.1-dev and its fine-tunes, FLUX.1-schnell, and tiny-flux. Read black-forest-labs/flux first.

Cut: the image tokens after the last single block, before ``norm_out`` and ``proj_out``.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, ClassVar

import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from cachec.compiler.models.base import Settings
from cachec.compiler.models.lost_text import Reader
from cachec.compiler.models.pipeline_model import PipelineModel
from cachec.runtime.errors import InputError
from cachec.runtime.model_io import ModelIO


class FluxModel(PipelineModel):
    """A FLUX pipeline."""

    DEFAULTS = "flux"
    ARGUMENTS: ClassVar = {"encoder_hidden_states": "prompt_embeds", "pooled_projections": "pooled_prompt_embeds"}

    @property
    def io(self) -> ModelIO:
        guidance = ("guidance",) if self.config.guidance_embeds else ()  # FLUX.1-schnell takes none
        return ModelIO(latents="hidden_states", timestep="timestep", conditions=(*self.ARGUMENTS, *guidance))

    @property
    def block(self) -> str:
        return f"single_transformer_blocks.{len(self.described.single_transformer_blocks) - 1}"  # type: ignore[arg-type]

    @property
    def side(self) -> int:
        side: int = 2 * self.pipeline.vae_scale_factor
        return side

    def embeddings(self, settings: Settings, random: Callable[..., torch.Tensor]) -> dict[str, torch.Tensor]:
        config = self.config
        return {
            "encoder_hidden_states": random(settings.text_tokens, config.joint_attention_dim),
            "pooled_projections": random(config.pooled_projection_dim),
        }

    def thin(self, config: Mapping[str, Any]) -> dict[str, Any]:
        return {"num_layers": 1, "num_single_layers": 1, "num_attention_heads": 2}

    def readers(self, settings: Settings) -> Sequence[Reader]:
        states, limit = Reader("tokenizer_2", settings.text_tokens), self.pipeline.tokenizer_max_length
        return [states, Reader("tokenizer", limit, pooled=True)] if limit < settings.text_tokens else [states]

    def unpacked(self, latents: torch.Tensor, settings: Settings) -> torch.Tensor:
        pipe = self.pipeline
        image: torch.Tensor = pipe._unpack_latents(latents, settings.height, settings.width, pipe.vae_scale_factor)
        return image

    @staticmethod
    def check_scheduler(scheduler: Any) -> None:
        if not isinstance(scheduler, FlowMatchEulerDiscreteScheduler):
            raise InputError(
                f"the model's sampler is {type(scheduler).__name__}; cachec compiles FlowMatchEulerDiscreteScheduler only"
            )
        if scheduler.config.stochastic_sampling:
            raise InputError("the model's sampler adds noise at every step (stochastic_sampling); its runs cannot be forecast")

    @property
    def sizes_of(self) -> Callable[[str, torch.Tensor], dict[str, Any]]:
        return partial(_sizes_of, self.side)


def _sizes_of(side: int, name: str, ids: torch.Tensor) -> dict[str, Any]:
    """Sizes of ids [L, 3]: picture, row, column; a token covers ``side`` pixels each way."""
    if ids.ndim != 2 or 0 in ids.shape or ids.shape[1] != 3:
        return {name: list(ids.shape)}
    if name == "txt_ids":
        return {"max_sequence_length": len(ids)}
    rows, columns = (int(ids[:, axis].max()) + 1 for axis in (1, 2))
    whole = rows * columns == len(ids)
    return {"height": rows * side, "width": columns * side} if whole else {name: f"of {len(ids)} tokens"}
