"""HunyuanVideo (``HunyuanVideoPipeline``): the guidance scale is an input. Read Tencent/HunyuanVideo, arXiv 2412.03603.

Cut: the video tokens after the last single block, before ``norm_out`` and ``proj_out``. The pipeline can guide once more,
with a negative prompt: ``--true-cfg-scale``.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import torch

from cachec.compiler.models.base import Settings
from cachec.compiler.models.inputs import ragged_mask
from cachec.compiler.models.lost_text import Reader
from cachec.compiler.models.video_model import VideoModel
from cachec.runtime.model_io import ModelIO

STATES, MASK, POOLED = "encoder_hidden_states", "encoder_attention_mask", "pooled_projections"


class HunyuanVideoModel(VideoModel):
    """A HunyuanVideo pipeline."""

    DEFAULTS = "hunyuan-video"
    ARGUMENTS: ClassVar = {STATES: "prompt_embeds", MASK: "prompt_attention_mask", POOLED: "pooled_prompt_embeds"}
    BEFORE, BLOCKS = ("transformer_blocks",), "single_transformer_blocks"
    GIVES = ("hidden_states", "encoder_hidden_states")
    SCALE, EMBEDDED = "true_cfg_scale", "guidance_scale"

    @property
    def io(self) -> ModelIO:
        conditions = (STATES, MASK, POOLED, "guidance")
        return ModelIO("hidden_states", "timestep", conditions, guidance="plain", text=(STATES, MASK))

    @property
    def side(self) -> int:
        side: int = self.pipeline.vae_scale_factor_spatial * self.config.patch_size
        return side

    def embeddings(self, settings: Settings, random: Callable[..., torch.Tensor]) -> dict[str, torch.Tensor]:
        config = self.config
        states = random(settings.text_tokens, config.text_embed_dim)
        return {STATES: states, MASK: ragged_mask(states), POOLED: random(config.pooled_projection_dim)}

    def taken(self, given: Mapping[str, Any], settings: Settings) -> dict[str, torch.Tensor]:
        return {**super().taken(given, settings), MASK: given[MASK].bool()}

    def thin(self, config: Mapping[str, Any]) -> dict[str, Any]:
        return {"num_layers": 1, "num_single_layers": 1, "num_refiner_layers": 1, "num_attention_heads": 2}

    def readers(self, settings: Settings) -> Sequence[Reader]:
        states, pooled = self.pipeline.tokenizer, self.pipeline.tokenizer_2
        limit = 0 if states is None or pooled is None else pooled.model_max_length
        longer = limit < settings.text_tokens
        return [Reader("tokenizer", settings.text_tokens), *([Reader("tokenizer_2", limit, pooled=True)] if longer else [])]
