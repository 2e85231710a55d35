"""FLUX.1: dev and its fine-tunes, schnell, tiny-flux (``FluxPipeline``), Kontext (``FluxKontextPipeline``).

Read black-forest-labs/flux, and arXiv 2506.15742 for Kontext. Cut: the image tokens after the last single block, before
``norm_out`` and ``proj_out``. Kontext's picture is more tokens behind those of the latents.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, ClassVar

import torch

from cachec.compiler.models.base import Settings
from cachec.compiler.models.from_pictures import FromPictures
from cachec.compiler.models.lost_text import Reader
from cachec.compiler.models.pictured_prompts import on_pictures_of, read_pictured
from cachec.compiler.models.pipeline_model import PipelineModel
from cachec.runtime.model_io import ModelIO

REFERENCE = "reference"  # Kontext's picture, as tokens


class _Flux(PipelineModel):
    """What all of FLUX.1 has."""

    ARGUMENTS: ClassVar = {"encoder_hidden_states": "prompt_embeds", "pooled_projections": "pooled_prompt_embeds"}
    BEFORE, BLOCKS = ("transformer_blocks",), "single_transformer_blocks"
    GIVES = ("encoder_hidden_states", "hidden_states")
    SCALE, EMBEDDED = "true_cfg_scale", "guidance_scale"

    @property
    def io(self) -> ModelIO:
        guidance = ("guidance",) if self.config.guidance_embeds else ()  # FLUX.1-schnell takes none
        return ModelIO("hidden_states", "timestep", (*self.ARGUMENTS, *guidance), guidance="plain")

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

    @property
    def sizes_of(self) -> Callable[[str, torch.Tensor], dict[str, Any]]:
        return partial(_sizes_of, self.side)


class FluxModel(FromPictures, _Flux):
    """Text to image."""

    DEFAULTS = "flux"
    TWIN = "FluxImg2ImgPipeline"

    def packed(self, latents: torch.Tensor, settings: Settings) -> torch.Tensor:
        tokens: torch.Tensor = self.pipeline._pack_latents(latents, *latents.shape)
        return tokens


class FluxKontextModel(_Flux):
    """Picture and text to image; the picture is scaled to the size of the image. A prompt begins with its picture's file."""

    DEFAULTS = "flux-kontext"

    @property
    def io(self) -> ModelIO:
        io = super().io
        return replace(io, conditions=(*io.conditions, REFERENCE), parts=(REFERENCE,))

    def embeddings(self, settings: Settings, random: Callable[..., torch.Tensor]) -> dict[str, torch.Tensor]:
        tokens = (settings.height // self.side) * (settings.width // self.side)
        return {**super().embeddings(settings, random), REFERENCE: random(tokens, self.config.in_channels)}

    def arguments(self, conditions: Mapping[str, torch.Tensor], settings: Settings) -> dict[str, Any]:
        return {**super().arguments(conditions, settings), "image": self.unpacked(conditions[REFERENCE], settings)}

    def sized(self, settings: Settings) -> dict[str, Any]:
        return {**super().sized(settings), "max_area": settings.height * settings.width, "_auto_resize": False}

    def text(self, prompts: Sequence[str], settings: Settings) -> dict[str, Any]:
        self._load("vae")
        texts, pictures = read_pictured(prompts, settings.width, settings.height)
        return {"prompt": texts, "image": pictures}

    def opposed(self, prompts: Sequence[str], negatives: Sequence[str] | None) -> Sequence[str]:
        """The pipeline shows the picture to both branches."""
        return on_pictures_of(prompts, super().opposed(prompts, negatives))

    def state(self, given: Mapping[str, Any]) -> torch.Tensor:
        return super().state(given)[:, : _image_tokens(given)]

    def taken(self, given: Mapping[str, Any], settings: Settings) -> dict[str, torch.Tensor]:
        return super().taken({**given, REFERENCE: super().state(given)[:, _image_tokens(given) :]}, settings)


def _image_tokens(given: Mapping[str, Any]) -> int:
    """How many tokens the latents have: the ids of pictures begin with a one."""
    return int((given["img_ids"][:, 0] == 0).sum())


def _sizes_of(side: int, name: str, ids: torch.Tensor) -> dict[str, Any]:
    """Sizes of ids [L, 3]: picture, row, column; a token covers ``side`` pixels each way."""
    if ids.ndim != 2 or 0 in ids.shape or ids.shape[1] != 3:
        return {name: list(ids.shape)}
    if name == "txt_ids":
        return {"max_sequence_length": len(ids)}
    ids = ids[ids[:, 0] == ids[0, 0]]  # behind them there may be those of a picture to start from
    rows, columns = (int(ids[:, axis].max()) + 1 for axis in (1, 2))
    whole = rows * columns == len(ids)
    return {"height": rows * side, "width": columns * side} if whole else {name: f"of {len(ids)} tokens"}
