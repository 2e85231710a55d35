"""PixArt-Sigma (``PixArtSigmaPipeline``). Read PixArt-alpha/PixArt-sigma, arXiv 2403.04692.

Cut: the tokens after the last block, before ``proj_out``. The network also gives a variance, which sampling leaves out.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from diffusers.utils import is_bs4_available, is_ftfy_available

from cachec.compiler.models.base import Settings
from cachec.compiler.models.inputs import ragged_mask, without_variance
from cachec.compiler.models.pipeline_model import PipelineModel
from cachec.runtime.model_io import ModelIO

STATES, MASK = "encoder_hidden_states", "encoder_attention_mask"


class PixArtModel(PipelineModel):
    """A PixArt-Sigma pipeline; sizes are taken as they are, not put into bins."""

    DEFAULTS = "pixart"
    GIVES = ("hidden_states",)
    ARGUMENTS: ClassVar = {STATES: "prompt_embeds", MASK: "prompt_attention_mask"}

    @property
    def io(self) -> ModelIO:
        output, conditions = without_variance(self.config), (STATES, MASK)
        return ModelIO("hidden_states", "timestep", conditions, output=output, guidance="plain", text=(STATES, MASK))

    @property
    def side(self) -> int:
        side: int = self.pipeline.vae_scale_factor * self.config.patch_size
        return side

    def embeddings(self, settings: Settings, random: Callable[..., torch.Tensor]) -> dict[str, torch.Tensor]:
        states = random(settings.text_tokens, self.config.caption_channels)
        return {STATES: states, MASK: ragged_mask(states)}

    def taken(self, given: Mapping[str, Any], settings: Settings) -> dict[str, torch.Tensor]:
        return {STATES: given[STATES], MASK: given[MASK].bool()}

    def text(self, prompts: Sequence[str], settings: Settings) -> dict[str, Any]:
        cleans = is_bs4_available() and is_ftfy_available()  # as the pipeline decides by itself, with a warning each time
        return {"prompt": list(prompts), "clean_caption": cleans}

    def sized(self, settings: Settings) -> dict[str, Any]:
        return {**super().sized(settings), "use_resolution_binning": False, "negative_prompt": None}  # embeddings, or nothing

    def thin(self, config: Mapping[str, Any]) -> dict[str, Any]:
        return {"num_layers": 1, "num_attention_heads": 2, "cross_attention_dim": 2 * config["attention_head_dim"]}
