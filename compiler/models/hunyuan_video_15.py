"""HunyuanVideo-1.5 (``HunyuanVideo15Pipeline``, text to video). Read Tencent-Hunyuan/HunyuanVideo-1.5, arXiv 2511.18870.

Cut: the video tokens after the last block, before ``norm_out`` and ``proj_out``. What is captured is a module of the same
weights (``hunyuan_video_15_equal``): it takes the latents alone, and no picture. The guidance scale is that of the pipeline's
guider. Glyphs that a prompt has in quotes are a text of their own, of fixed length.
"""

import copy
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from diffusers.guiders import ClassifierFreeGuidance
from torch import nn

from cachec.compiler.models.base import Settings
from cachec.compiler.models.hunyuan_video_15_equal import HunyuanVideo15Equal
from cachec.compiler.models.inputs import ragged_mask
from cachec.compiler.models.reading import Seen
from cachec.compiler.models.video_model import VideoModel
from cachec.runtime.errors import InputError
from cachec.runtime.model_io import ModelIO

STATES, MASK = "encoder_hidden_states", "encoder_attention_mask"
GLYPHS, GLYPH_MASK = "encoder_hidden_states_2", "encoder_attention_mask_2"


class HunyuanVideo15Model(VideoModel):
    """A HunyuanVideo-1.5 pipeline."""

    DEFAULTS = "hunyuan-video-1.5"
    ARGUMENTS: ClassVar = {
        STATES: "prompt_embeds",
        MASK: "prompt_embeds_mask",
        GLYPHS: "prompt_embeds_2",
        GLYPH_MASK: "prompt_embeds_mask_2",
    }
    GIVES, APART = ("hidden_states", "encoder_hidden_states"), True
    CLEANING: ClassVar = {"tokenizer": ("space if empty",), "tokenizer_2": ("texts in quotes",)}
    BLANK: ClassVar = ("tokenizer_2",)
    LENGTH = None
    SHOWN = ("vae", "transformer")

    @property
    def io(self) -> ModelIO:
        return ModelIO("hidden_states", "timestep", tuple(self.ARGUMENTS), guidance="plain", text=(STATES, MASK))

    @property
    def side(self) -> int:
        side: int = self.pipeline.vae_scale_factor_spatial * self.config.patch_size
        return side

    def capturable(self, transformer: nn.Module) -> nn.Module:
        return HunyuanVideo15Equal(transformer)

    def embeddings(self, settings: Settings, random: Callable[..., torch.Tensor]) -> dict[str, torch.Tensor]:
        config = self.config
        states = random(settings.text_tokens, config.text_embed_dim)
        glyphs = random(self.pipeline.tokenizer_2_max_length, config.text_embed_2_dim)
        return {STATES: states, MASK: ragged_mask(states), GLYPHS: glyphs, GLYPH_MASK: ragged_mask(glyphs)}

    def taken(self, given: Mapping[str, Any], settings: Settings) -> dict[str, torch.Tensor]:
        """The text encoder sees no token before those behind it: what is cut off its states is cut off the text."""
        cut = {name: given[name][:, : settings.text_tokens] for name in (STATES, MASK)}
        masks = {MASK: cut[MASK].bool(), GLYPH_MASK: given[GLYPH_MASK].bool()}
        return {STATES: cut[STATES], GLYPHS: given[GLYPHS], **masks}

    def read_length(self, tokenizer: str, limit: int, settings: Settings) -> int:
        """States of a longer text are cut off, and none looks at what comes behind it."""
        return limit if tokenizer != self.TOKENIZER else limit - int(self.pipeline.tokenizer_max_length) + settings.text_tokens

    def conditions_of(self, tokens: Mapping[str, torch.Tensor], seen: Seen, settings: Settings) -> dict[str, torch.Tensor]:
        """Where nothing is in quotes, the pipeline has zeros in place of states."""
        found = super().conditions_of(tokens, seen, settings)
        return {**found, GLYPHS: torch.where(found[GLYPH_MASK].any(), found[GLYPHS], 0.0)}

    def state(self, given: Mapping[str, Any]) -> torch.Tensor:
        """The latents, without the first frame and its mask, which are empty."""
        whole: torch.Tensor = given[self.io.latents]
        return whole[:, : self.config.out_channels]

    def says_nothing(self, name: str, value: Any) -> bool:
        """A picture that is zero is none."""
        return name == "image_embeds" and not bool(value.any())

    def constants(self, settings: Settings) -> dict[str, Any]:
        return {}

    def staged(self, call: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
        guider = self.pipeline.guider or ClassifierFreeGuidance()  # of an outlined pipeline
        if type(guider) is not ClassifierFreeGuidance:
            known = ClassifierFreeGuidance.__name__
            raise InputError(f"the pipeline's guider is {type(guider).__name__}; {self.spec.name} is compiled with {known}")
        given, twin = dict(call), copy.copy(self.pipeline)
        scale = given.pop(self.SCALE)
        vars(twin)["guider"] = ClassifierFreeGuidance.from_config(guider.config, guidance_scale=scale)
        return twin, given

    def thin(self, config: Mapping[str, Any]) -> dict[str, Any]:
        return {"num_layers": 1, "num_refiner_layers": 1, "num_attention_heads": 2}

    def pictures(self, latents: torch.Tensor, settings: Settings) -> torch.Tensor:
        """One by one: the autoencoder's own masks have no batch."""
        return torch.cat([super(HunyuanVideo15Model, self).pictures(one, settings) for one in torch.split(latents, 1)])
