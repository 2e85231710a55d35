"""FLUX.2 (``Flux2Pipeline``) and FLUX.2 klein (``Flux2KleinPipeline``), text to image. Read black-forest-labs/flux2.

Cut: the image tokens after the last single block, before ``norm_out`` and ``proj_out``. Dev takes its guidance scale as an
input; klein takes none when distilled, and otherwise has true guidance.
"""

import copy
from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any, ClassVar

import torch

from cachec.compiler.models.base import Settings
from cachec.compiler.models.pipeline_model import PipelineModel
from cachec.runtime.model_io import ModelIO

STATES = "encoder_hidden_states"
IDS = ("img_ids", "txt_ids")


class Flux2Model(PipelineModel):
    """A FLUX.2 pipeline."""

    DEFAULTS = "flux2"
    ARGUMENTS: ClassVar = {STATES: "prompt_embeds"}
    BEFORE, BLOCKS = ("transformer_blocks",), "single_transformer_blocks"
    GIVES = ("hidden_states",)

    @property
    def io(self) -> ModelIO:
        guidance = ("guidance",) if self.config.guidance_embeds else ()
        return ModelIO("hidden_states", "timestep", (STATES, *guidance))

    @property
    def side(self) -> int:
        side: int = 2 * self.pipeline.vae_scale_factor
        return side

    def embeddings(self, settings: Settings, random: Callable[..., torch.Tensor]) -> dict[str, torch.Tensor]:
        return {STATES: random(settings.text_tokens, self.config.joint_attention_dim)}

    def constants(self, settings: Settings) -> dict[str, Any]:
        constants = super().constants(settings)
        return {**constants, **{name: constants[name][0] for name in IDS}}  # the same for each sample

    def thin(self, config: Mapping[str, Any]) -> dict[str, Any]:
        return {"num_layers": 1, "num_single_layers": 1, "num_attention_heads": 2}

    def handed(self, noise: torch.Tensor, settings: Settings) -> torch.Tensor:
        """Latents as a picture [B, C, rows, columns] of tokens."""
        grid = (settings.height // self.side, settings.width // self.side)
        return torch.unflatten(noise, 1, grid).permute(0, 3, 1, 2)

    def pictures(self, latents: torch.Tensor, settings: Settings) -> torch.Tensor:
        pipe, vae, grid = self.pipeline, self.pipeline.vae, self.handed(latents, settings)
        mean = vae.bn.running_mean.view(1, -1, 1, 1).to(grid)
        deviation = torch.sqrt(vae.bn.running_var.view(1, -1, 1, 1) + vae.config.batch_norm_eps).to(grid)
        picture: torch.Tensor = vae.decode(pipe._unpatchify_latents(grid * deviation + mean), return_dict=False)[0]
        return picture


class Flux2KleinModel(Flux2Model):
    """A FLUX.2 klein pipeline."""

    DEFAULTS = "flux2-klein"

    @property
    def io(self) -> ModelIO:
        options = getattr(self.pipeline, "config", None)  # what stands around a transformer alone has none
        distilled = getattr(options, "is_distilled", False)
        return ModelIO("hidden_states", "timestep", (STATES,), guidance=None if distilled else "plain")

    def _run(self, call: Mapping[str, Any], noise: torch.Tensor) -> torch.Tensor:
        """The pipeline turns the latents that it ends with into what its autoencoder takes: those of its last step are kept."""
        kept: dict[str, torch.Tensor] = {}
        twin = copy.copy(self.pipeline)
        norm = SimpleNamespace(running_mean=torch.zeros(1), running_var=torch.ones(1))  # of an autoencoder that is not loaded
        vars(twin)["vae"] = SimpleNamespace(bn=norm, config=SimpleNamespace(batch_norm_eps=0.0))

        def keep(_pipe: Any, _step: int, _timestep: Any, given: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
            kept.update(given)
            return {}

        twin(**call, latents=noise, output_type="latent", callback_on_step_end=keep)
        return kept["latents"]
