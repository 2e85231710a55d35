"""Wan 2.1 and 2.2 (``WanPipeline``, text to video). Read Wan-Video/Wan2.1, arXiv 2503.20314.

Cut: the video tokens after the last block, before the final norm and projection. Texts have no mask: padding is attended to.
Wan 2.2 has two transformers, of which the second takes over when the told time falls below a boundary; both have one scale of
guidance here. Its 5B model (``expand_timesteps``) is told a time for each token [B, L], all the same where no picture is given:
here one for each sample [B], which comes to the same.
"""

import copy
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from torch import nn

from cachec.compiler.models.base import ModelSpec, Settings
from cachec.compiler.models.components import Components
from cachec.compiler.models.inputs import spread
from cachec.compiler.models.lora_files import LoraFile
from cachec.compiler.models.observed import TRANSFORMER
from cachec.compiler.models.own_weights import hash_digests
from cachec.compiler.models.reading import Seen
from cachec.compiler.models.shards import Stored
from cachec.compiler.models.video_model import VideoModel
from cachec.runtime.errors import InputError
from cachec.runtime.model_io import ModelIO

STATES = "encoder_hidden_states"
SECOND = "transformer_2"  # its name in the pipeline, and its folder


class WanModel(VideoModel):
    """A Wan pipeline."""

    DEFAULTS = "wan"
    ARGUMENTS: ClassVar = {STATES: "prompt_embeds"}
    BLOCKS, GIVES = "blocks", ("hidden_states",)
    _stored_second: Stored | None = None
    _first: nn.Module | None = None  # of the model that this one is the expert of

    @classmethod
    def load(cls, spec: ModelSpec, directory: Path, *, with_transformer: bool) -> Self:
        model = super().load(spec, directory, with_transformer=with_transformer)
        if with_transformer and model._switches:
            model._stored_second = Components(spec.source, directory).open(SECOND)
        return model

    @classmethod
    def outline(cls, spec: ModelSpec, directory: Path) -> Self:
        model = super().outline(spec, directory)
        if model._switches:
            model._stored_second = Stored.outline(lambda: Components(spec.source, directory).describe(SECOND))
        return model

    @property
    def _switches(self) -> bool:
        options = getattr(self.pipeline, "config", None)  # what stands around a transformer alone has none
        return getattr(options, "boundary_ratio", None) is not None

    @cached_property
    def expert(self) -> tuple[Self, float] | None:
        if not self._switches or self.part == SECOND:
            return None
        second = copy.copy(self)
        second.part, second._stored, second._described, second._first = SECOND, self._stored_second, None, self.described
        vars(second).pop("_own_hash", None)
        return second, self.pipeline.config.boundary_ratio * self.pipeline.scheduler.config.num_train_timesteps

    @property
    def parts(self) -> dict[str, nn.Module]:
        if self._first is not None:
            return {TRANSFORMER: self._first, SECOND: self.described}
        expert = self.expert
        return {TRANSFORMER: self.described} if expert is None else expert[0].parts

    @property
    def plain_hash(self) -> str:
        """Of both transformers."""
        own, expert = super().plain_hash, self.expert
        return own if expert is None else hash_digests([own, expert[0].plain_hash])

    @property
    def loras(self) -> Sequence[Mapping[str, Any]]:
        return super().loras if self.expert is None else [*super().loras, *self.expert[0].loras]

    def fuse(self, loras: Sequence[LoraFile]) -> None:
        if self.expert is None:
            super().fuse(loras)
            return
        if unsaid := [file.path for file in loras if file.part is None]:
            raise InputError(f"{self.spec.name} has two transformers: say which {unsaid[0]} is for, as {unsaid[0].name}@"
                             f"{TRANSFORMER} or {unsaid[0].name}@{SECOND}; the second is for low noise")  # fmt: skip
        super().fuse([file for file in loras if file.part != SECOND])
        self.expert[0].fuse([file for file in loras if file.part == SECOND])

    def _run(self, call: Mapping[str, Any], noise: torch.Tensor) -> torch.Tensor:
        """Both transformers are loaded for it."""
        if self.expert is not None:
            self.pipeline.register_modules(**{SECOND: self.expert[0].transformer})
        return super()._run(call, noise)

    def thin_twin(self, settings: Settings) -> tuple[Self, Settings] | None:
        """Of the first transformer: both are of one make."""
        made = super().thin_twin(settings)
        if made is not None:
            made[0].pipeline.register_to_config(boundary_ratio=None)
        return made

    @property
    def io(self) -> ModelIO:
        return ModelIO("hidden_states", "timestep", (STATES,), guidance="plain")

    @property
    def side(self) -> int:
        side: int = self.pipeline.vae_scale_factor_spatial * self.config.patch_size[1]
        return side

    def embeddings(self, settings: Settings, random: Callable[..., torch.Tensor]) -> dict[str, torch.Tensor]:
        return {STATES: random(settings.text_tokens, self.config.text_dim)}

    def conditions_of(self, tokens: Mapping[str, torch.Tensor], seen: Seen, settings: Settings) -> dict[str, torch.Tensor]:
        """The pipeline puts zeros in the place of what was made of padding."""
        (call,) = seen.calls
        ids, mask = (tokens[name] for name in call.names)
        return {STATES: self.pipeline.text_encoder(ids, mask).last_hidden_state * mask[..., None]}

    def thin(self, config: Mapping[str, Any]) -> dict[str, Any]:
        return {"num_layers": 1, "num_attention_heads": 2}

    def pictures(self, latents: torch.Tensor, settings: Settings) -> torch.Tensor:
        vae = self.pipeline.vae
        video: torch.Tensor = vae.decode(spread(latents, vae.config), return_dict=False)[0]
        return video
