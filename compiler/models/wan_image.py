"""Wan 2.1 and 2.2, picture to video (``WanImageToVideoPipeline``). Read Wan-Video/Wan2.1, arXiv 2503.20314.

Behind the channels of the latents the model takes those of a reference, the same at every step: which frames are given, four
numbers for each of the autoencoder's, and the latents of a video that begins with the picture. Wan 2.1 is shown the picture by
CLIP, too, and its attention wants texts of 512 tokens then. A prompt begins with its picture's file.

``B`` batch, ``F`` frames of latents.
"""

import copy
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn

from cachec.compiler.models.base import Settings
from cachec.compiler.models.pictured_prompts import on_pictures_of, read_pictured
from cachec.compiler.models.wan import STATES, WanModel
from cachec.runtime.errors import InputError, ModelUnavailableError
from cachec.runtime.model_io import ModelIO
from cachec.runtime.specs import Array

REFERENCE = "reference"  # what the model is handed behind the latents [B, C, F, H, W]
SEEN = "encoder_hidden_states_image"  # the picture by CLIP [B, L, D]
CLIP_TOKENS = 257  # of the published encoder
TEXT_TOKENS = 512  # what diffusers' attention takes the others to be of the picture by


class WanImageModel(WanModel):
    """A Wan pipeline that begins with a picture, which is scaled to the size of the video."""

    DEFAULTS = "wan-i2v"

    @property
    def io(self) -> ModelIO:
        seen = () if self.config.image_dim is None else (SEEN,)
        return replace(super().io, conditions=(STATES, *seen, REFERENCE), parts=(REFERENCE,))

    def check_sizes(self, settings: Settings) -> None:
        super().check_sizes(settings)
        if getattr(getattr(self.pipeline, "config", None), "expand_timesteps", False):
            raise InputError(f"{self.spec.name} tells the tokens of its picture another time (expand_timesteps), which is not "
                             "compiled: take text to video, or another model")  # fmt: skip
        if self.config.image_dim is not None and settings.text_tokens != TEXT_TOKENS:
            raise InputError(f"text-tokens is {settings.text_tokens}; {self.spec.name} takes {TEXT_TOKENS} beside a picture")

    def small(self, settings: Settings) -> Settings:
        made = super().small(settings)
        return made if self.config.image_dim is None else replace(made, text_tokens=settings.text_tokens)

    def thin(self, config: Mapping[str, Any]) -> dict[str, Any]:
        made = super().thin(config)
        seen = (
            {}
            if config["image_dim"] is None
            else {"added_kv_proj_dim": made["num_attention_heads"] * config["attention_head_dim"]}
        )
        return {**made, **seen}

    def embeddings(self, settings: Settings, random: Callable[..., torch.Tensor]) -> dict[str, torch.Tensor]:
        config, shrink = self.config, self.pipeline.vae_scale_factor_spatial
        frames = (settings.frames - 1) // self.spacing + 1
        channels = config.in_channels - config.out_channels
        found = super().embeddings(settings, random)
        found[REFERENCE] = random(channels, frames, settings.height // shrink, settings.width // shrink)
        if config.image_dim is not None:
            found[SEEN] = random(self._clip_tokens, config.image_dim)
        return found

    @property
    def _clip_tokens(self) -> int:
        """Patches of a picture as CLIP sees it, and one for all of it."""
        file = None if self._components is None else self._components.directory / "image_encoder" / "config.json"
        if file is None or not file.is_file():
            return CLIP_TOKENS
        config = json.loads(file.read_text(encoding="utf-8-sig"))
        return int((config["image_size"] // config["patch_size"]) ** 2 + 1)

    def arguments(self, conditions: Mapping[str, torch.Tensor], settings: Settings) -> dict[str, Any]:
        known = _Given(conditions[REFERENCE][:, self.spacing :], conditions.get(SEEN))
        return {**super().arguments(conditions, settings), "image": known}

    def staged(self, call: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
        """The pipeline takes pictures, not what is made of them: it gets encoders that hand it ours."""
        if not isinstance(known := call["image"], _Given):
            return super().staged(call)
        twin, blank = copy.copy(self.pipeline), Image.new("RGB", (call["width"], call["height"]))
        vars(twin).update(vae=_KnownLatents(known.latents), encode_image=lambda *_: _ForEach(known.seen))
        return twin, {**call, "image": blank}

    def _encode(self, prompts: Sequence[str], settings: Settings) -> dict[str, Array]:
        """One by one: the pipeline begins all videos of a call with one picture."""
        self._load("vae", *(["image_encoder"] if self.config.image_dim is not None else []))
        found = [super(WanImageModel, self)._encode([prompt], settings) for prompt in prompts]
        return {name: np.concatenate([one[name] for one in found]) for name in found[0]}

    def text(self, prompts: Sequence[str], settings: Settings) -> dict[str, Any]:
        if not hasattr(sys.modules[type(self.pipeline).__module__], "ftfy"):
            raise ModelUnavailableError(f"{type(self.pipeline).__name__} mends prompts with ftfy, which is not installed: "
                                        "pip install ftfy")  # fmt: skip
        texts, pictures = read_pictured(prompts, settings.width, settings.height)
        return {"prompt": texts, "image": pictures[0]}

    def opposed(self, prompts: Sequence[str], negatives: Sequence[str] | None) -> Sequence[str]:
        return on_pictures_of(prompts, super().opposed(prompts, negatives))

    def state(self, given: Mapping[str, Any]) -> torch.Tensor:
        return super().state(given)[:, : self.config.out_channels]

    def taken(self, given: Mapping[str, Any], settings: Settings) -> dict[str, torch.Tensor]:
        reference = super().state(given)[:, self.config.out_channels :]
        return super().taken({**given, REFERENCE: reference}, settings)


@dataclass(frozen=True, eq=False)
class _Given:
    """What is made of pictures already: the autoencoder's latents [B, C, F, H, W], and what CLIP sees [B, L, D]."""

    latents: torch.Tensor
    seen: torch.Tensor | None


class _ForEach:
    """Values of all samples already, which the pipeline would repeat for each."""

    def __init__(self, values: Any) -> None:
        self._values = values

    def repeat(self, *_times: int) -> Any:
        return self._values


class _KnownLatents(nn.Module):
    """In an autoencoder's place: hands over latents, as they are."""

    def __init__(self, latents: torch.Tensor) -> None:
        super().__init__()
        self.dtype, self.device, self._latents = latents.dtype, latents.device, latents
        channels = latents.shape[1]
        self.config = SimpleNamespace(z_dim=channels, latents_mean=[0.0] * channels, latents_std=[1.0] * channels)

    def encode(self, _video: torch.Tensor) -> Any:
        return SimpleNamespace(latents=_ForEach(self._latents))
