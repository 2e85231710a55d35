"""Qwen-Image (``QwenImagePipeline``) and Qwen-Image-Edit (``QwenImageEditPipeline``): true guidance, renormalised.

Read QwenLM/Qwen-Image, arXiv 2508.02324.

Cut: the image tokens after the last block, before ``norm_out`` and ``proj_out``. The pipeline's texts are as long as the
longest, and its mask is missing where no token is padding; here they always have ``text_tokens`` and a mask. Padding is masked
in the attention, and the positions of images do not depend on it, so that the result is the same.
"""

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import torch
from diffusers.pipelines.qwenimage.pipeline_qwenimage_edit import calculate_dimensions
from PIL import Image
from torch.nn.functional import pad

from cachec.compiler.models.base import Settings
from cachec.compiler.models.from_pictures import FromPictures
from cachec.compiler.models.inputs import ragged_mask, spread, unspread
from cachec.compiler.models.pictured_prompts import on_pictures_of, read_pictured
from cachec.compiler.models.pipeline_model import PipelineModel
from cachec.compiler.models.reading import Seen
from cachec.runtime.errors import InputError
from cachec.runtime.model_io import ModelIO
from cachec.runtime.specs import Array

STATES, MASK = "encoder_hidden_states", "encoder_hidden_states_mask"
REFERENCE = "reference"  # the picture to edit, as tokens
PICTURE_AREA = 1024 * 1024  # pixels that the pipeline scales a picture to


class _QwenImage(PipelineModel):
    """What both have."""

    ARGUMENTS: ClassVar = {STATES: "prompt_embeds", MASK: "prompt_embeds_mask"}
    GIVES, APART = ("encoder_hidden_states", "hidden_states"), True
    SCALE = "true_cfg_scale"

    @property
    def io(self) -> ModelIO:
        return ModelIO("hidden_states", "timestep", (STATES, MASK), guidance="renormalised", text=(STATES, MASK))

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
        if missing < 0:
            raise InputError(f"a prompt with its picture has {states.shape[1]} text tokens, and {settings.text_tokens} fit: "
                             "shorten it, or compile with more --text-tokens")  # fmt: skip
        return {STATES: pad(states, (0, 0, 0, missing)), MASK: pad(mask, (0, missing))}

    def read_length(self, tokenizer: str, limit: int, settings: Settings) -> int:
        """The pipeline cuts the states of a longer text, none of which looks at what comes behind it."""
        return limit - int(self.pipeline.tokenizer_max_length) + settings.text_tokens

    def conditions_of(self, tokens: Mapping[str, torch.Tensor], seen: Seen, settings: Settings) -> dict[str, torch.Tensor]:
        """The pipeline takes padding out, and what stands before the prompt."""
        (call,), begin = seen.calls, self.pipeline.prompt_template_encode_start_idx
        ids, mask = (tokens[name] for name in call.names)
        encoded = self.pipeline.text_encoder(input_ids=ids, attention_mask=mask, output_hidden_states=True)
        states, mask = encoded.hidden_states[-1][:, begin:], mask[:, begin:]
        return {STATES: states * mask[..., None], MASK: mask.bool()}

    def constants(self, settings: Settings) -> dict[str, Any]:
        constants = super().constants(settings)
        return {**constants, "img_shapes": constants["img_shapes"][:1]}  # the same for each sample

    def thin(self, config: Mapping[str, Any]) -> dict[str, Any]:
        return {"num_layers": 1, "num_attention_heads": 2}

    def pictures(self, latents: torch.Tensor, settings: Settings) -> torch.Tensor:
        pipe, vae = self.pipeline, self.pipeline.vae
        unpacked = pipe._unpack_latents(latents, settings.height, settings.width, pipe.vae_scale_factor)
        video: torch.Tensor = vae.decode(spread(unpacked, vae.config), return_dict=False)[0]
        return video[:, :, 0]


class QwenImageModel(FromPictures, _QwenImage):
    """Text to image."""

    DEFAULTS = "qwen-image"
    TWIN = "QwenImageImg2ImgPipeline"

    def mean(self, pictures: torch.Tensor) -> torch.Tensor:
        """Of a video of one frame [B, C, 1, H, W]."""
        return super().mean(pictures[:, :, None])

    def scaled(self, mean: torch.Tensor) -> torch.Tensor:
        return unspread(mean, self.pipeline.vae.config)

    def packed(self, latents: torch.Tensor, settings: Settings) -> torch.Tensor:
        tokens: torch.Tensor = self.pipeline._pack_latents(latents[:, :, 0], *latents[:, :, 0].shape)
        return tokens


class QwenImageEditModel(_QwenImage):
    """Picture and text to image. A prompt begins with its picture's file; its text counts the picture's tokens, too.

    The pipeline scales every picture to a million pixels of its own proportions: here it is brought to those of the image.
    """

    DEFAULTS = "qwen-image-edit"
    LENGTH = None
    TOKENIZER = None  # counts the picture's tokens, too: what does not fit is refused

    @property
    def io(self) -> ModelIO:
        io = super().io
        return replace(io, conditions=(*io.conditions, REFERENCE), parts=(REFERENCE,))

    def _picture_size(self, settings: Settings) -> tuple[int, int]:
        """Width and height that the pipeline scales pictures to."""
        width, height, _ = calculate_dimensions(PICTURE_AREA, settings.width / settings.height)
        return width, height

    def embeddings(self, settings: Settings, random: Callable[..., torch.Tensor]) -> dict[str, torch.Tensor]:
        width, height = self._picture_size(settings)
        tokens = (height // self.side) * (width // self.side)
        return {**super().embeddings(settings, random), REFERENCE: random(tokens, self.config.in_channels)}

    def arguments(self, conditions: Mapping[str, torch.Tensor], settings: Settings) -> dict[str, Any]:
        width, height = self._picture_size(settings)
        picture = self.pipeline._unpack_latents(conditions[REFERENCE], height, width, self.pipeline.vae_scale_factor)
        return {**super().arguments(conditions, settings), "image": picture}

    def staged(self, call: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
        """The pipeline takes pictures, not their latents: it gets an autoencoder that hands it ours."""
        if not isinstance(latents := call["image"], torch.Tensor):
            return self.pipeline, dict(call)
        twin, blank = copy.copy(self.pipeline), Image.new("RGB", (call["width"], call["height"]))
        plain = SimpleNamespace(latents_mean=[0.0] * latents.shape[1], latents_std=[1.0] * latents.shape[1])
        vars(twin)["vae"] = SimpleNamespace(config=plain, encode=lambda _picture: SimpleNamespace(latents=latents))
        return twin, {**call, "image": [blank] * len(latents)}

    def _encode(self, prompts: Sequence[str], settings: Settings) -> dict[str, Array]:
        """One by one: the pipeline reads one picture at a time."""
        self._load("processor", "vae")
        found = [super(QwenImageEditModel, self)._encode([prompt], settings) for prompt in prompts]
        return {name: np.concatenate([one[name] for one in found]) for name in found[0]}

    def text(self, prompts: Sequence[str], settings: Settings) -> dict[str, Any]:
        texts, pictures = read_pictured(prompts, settings.width, settings.height)
        return {"prompt": texts, "image": pictures}

    def opposed(self, prompts: Sequence[str], negatives: Sequence[str] | None) -> Sequence[str]:
        """The pipeline shows the picture to both branches."""
        return on_pictures_of(prompts, super().opposed(prompts, negatives))

    def state(self, given: Mapping[str, Any]) -> torch.Tensor:
        return super().state(given)[:, : math.prod(given["img_shapes"][0][0])]

    def taken(self, given: Mapping[str, Any], settings: Settings) -> dict[str, torch.Tensor]:
        picture = super().state(given)[:, math.prod(given["img_shapes"][0][0]) :]
        return {**super().taken(given, settings), REFERENCE: picture}
