"""AuraFlow (``AuraFlowPipeline``). Read fal/AuraFlow-v0.3.

Cut: the tokens of text and image after the last single block, before ``norm_out`` and ``proj_out``. The pipeline zeroes what is
made of padding and hands its transformer no mask: padding is attended to.
"""

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch

from cachec.compiler.models.base import ModelSpec, Settings
from cachec.compiler.models.pipeline_model import PipelineModel
from cachec.runtime.model_io import ModelIO

STATES = "encoder_hidden_states"


class AuraFlowModel(PipelineModel):
    """An AuraFlow pipeline."""

    ARGUMENTS: ClassVar = {STATES: "prompt_embeds"}
    BEFORE, BLOCKS, GIVES = ("joint_transformer_blocks",), "single_transformer_blocks", ("hidden_states",)

    @classmethod
    def make_spec(cls, name: str, source: str) -> ModelSpec:
        return ModelSpec(name, source, height=1024, width=1024, text_tokens=256, guidance=3.5, steps=50)

    @property
    def io(self) -> ModelIO:
        return ModelIO("hidden_states", "timestep", (STATES,), guidance="plain")

    @property
    def side(self) -> int:
        side: int = self.pipeline.vae_scale_factor * self.config.patch_size
        return side

    def embeddings(self, settings: Settings, random: Callable[..., torch.Tensor]) -> dict[str, torch.Tensor]:
        return {STATES: random(settings.text_tokens, self.config.joint_attention_dim)}

    def arguments(self, conditions: Mapping[str, torch.Tensor], settings: Settings) -> dict[str, Any]:
        """Embeddings come with masks, which the pipeline asks for and does not look at."""
        mask = torch.ones(conditions[STATES].shape[:2])
        return {"prompt_embeds": conditions[STATES], "prompt_attention_mask": mask, "negative_prompt_attention_mask": mask}

    def thin(self, config: Mapping[str, Any]) -> dict[str, Any]:
        width = 2 * config["attention_head_dim"]
        return {"num_mmdit_layers": 1, "num_single_dit_layers": 1, "num_attention_heads": 2, "caption_projection_dim": width}
