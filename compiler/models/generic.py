"""Pipelines of a kind that no family knows: what can be seen is used, what cannot is asked, and the rest is refused.

The pipeline runs with its own text encoders and a spy in its transformer's place; the cut is proposed from the lists of blocks.
One branch of guidance is compiled, as the pipeline has it with guidance switched off.
"""

import inspect
import logging
from collections.abc import Callable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
import torch

from cachec.compiler.models.base import ModelSpec, Settings
from cachec.compiler.models.components import Components
from cachec.compiler.models.inferred import find_cut, infer_io, is_one_branch
from cachec.compiler.models.observed import TRANSFORMER, Observed, let_through, observe
from cachec.compiler.models.pipeline_model import PipelineModel
from cachec.compiler.models.shards import Stored
from cachec.runtime.errors import InputError
from cachec.runtime.model_io import ModelIO
from cachec.runtime.specs import Array

log = logging.getLogger(__name__)

TAKES = ("prompt", "latents", "num_inference_steps", "output_type")  # what the pipeline's call must know
SCALES = ("guidance_scale", "true_cfg_scale")
OFF = (1.0, 0.0)  # scales that switch true guidance off, in one pipeline or another
EXAMPLES = ("a red circle", "a small green square at the left of a blue cross", "two stars")
SIZE, TEXT = 1024, 256  # where the pipeline's call has no default


class GenericModel(PipelineModel):
    """A pipeline of an unknown kind."""

    ARGUMENTS: ClassVar = {}
    TOKENIZER = None
    LENGTH = None
    SHOWN = ("vae", "transformer")

    def __init__(self, spec: ModelSpec, pipeline: Any, directory: Path | None = None, stored: Stored | None = None) -> None:
        super().__init__(spec, pipeline, directory, stored)
        if missing := [name for name in TAKES if name not in _parameters(type(pipeline))]:
            raise InputError(f"no family of cachec knows {type(pipeline).__name__}, and its call takes no "
                             f"{', '.join(missing)}: it cannot be looked at; write a family (CONTRIBUTING.md)")  # fmt: skip

    @classmethod
    def make_spec(cls, name: str, source: str) -> ModelSpec:
        """The defaults of the pipeline's call, where its directory is there."""
        known: Mapping[str, Any] = {}
        if (Path(source) / TRANSFORMER).is_dir():
            parameters = _parameters(Components(source, Path(source)).pipeline_kind())
            known = {name: one.default for name, one in parameters.items() if isinstance(one.default, int | float)}
        return ModelSpec(
            name,
            source,
            height=int(known.get("height", SIZE)),
            width=int(known.get("width", SIZE)),
            text_tokens=int(known.get("max_sequence_length", TEXT)),
            guidance=float(known.get("guidance_scale", 1.0)),
            steps=int(known.get("num_inference_steps", 50)),
            frames=int(known.get("num_frames", 1)),
        )

    @classmethod
    def outline(cls, spec: ModelSpec, directory: Path) -> Self:
        return cls.load(spec, directory, with_transformer=True)

    def thin_twin(self, settings: Settings) -> tuple[Self, Settings] | None:
        return None

    def thin(self, config: Mapping[str, Any]) -> dict[str, Any]:
        return {}

    @property
    def block(self) -> str:
        return find_cut(self.described)

    @cached_property
    def io(self) -> ModelIO:
        spec = self.spec
        settings = Settings(spec.height, spec.width, spec.text_tokens, spec.guidance, 2, "float32", spec.frames)
        few, many = (self._observe(settings, self.text(EXAMPLES[:batch], settings)) for batch in (2, 3))
        io = infer_io(few, many, self.config)
        log.warning("%s is a %s, which no family of cachec knows: %s move, %s is the time, conditions are %s; one branch, "
                    "without true guidance", spec.name, type(self.pipeline).__name__, io.latents, io.timestep,
                    ", ".join(io.conditions))  # fmt: skip
        return io

    @property
    def side(self) -> int:
        """Of most; the pipeline has the last word."""
        side: int = 2 * getattr(self.pipeline, "vae_scale_factor", 8)
        return side

    def check_sizes(self, settings: Settings) -> None:
        if settings.frames == 1 or "num_frames" not in _parameters(type(self.pipeline)):
            super().check_sizes(settings)

    def embeddings(self, settings: Settings, random: Callable[..., torch.Tensor]) -> dict[str, torch.Tensor]:
        return {}

    def examples(self, settings: Settings, random: Callable[..., torch.Tensor]) -> dict[str, Any]:
        return self.text([EXAMPLES[sample % len(EXAMPLES)] for sample in range(len(random()))], settings)

    def sized(self, settings: Settings) -> dict[str, Any]:
        lengths = {"max_sequence_length": settings.text_tokens, "num_frames": settings.frames}
        known = _parameters(type(self.pipeline))
        return {name: value for name, value in {**super().sized(settings), **lengths}.items() if name in known}

    def _observe(self, settings: Settings, given: Mapping[str, Any], *, whole: bool = True) -> Observed:
        return self._one_branch(settings, given, whole=whole)[0]

    def _one_branch(self, settings: Settings, given: Mapping[str, Any], *, whole: bool) -> tuple[Observed, dict[str, Any]]:
        """With the guidance scale as it is, if the pipeline has one branch then, or else with one that switches it off."""
        self._load(*self._text_encoders)
        batch = len(given["prompt"])
        for scale in (settings.guidance, *OFF):
            call = {**self._wanted(settings), **self._scaled(scale), **given}
            seen = observe(self.pipeline, {TRANSFORMER: self.described}, call, device=self.device, whole=whole)
            if is_one_branch(seen, batch):
                return seen, call
        raise InputError(f"{type(self.pipeline).__name__} calls its transformer {len(seen.calls)} times, or with rows of both "
                         "branches of guidance, at every guidance scale: write a family (CONTRIBUTING.md)")  # fmt: skip

    def _scaled(self, scale: float) -> dict[str, float]:
        return {name: scale for name in SCALES if name in _parameters(type(self.pipeline))}

    @torch.no_grad()
    def decode(self, latents: Array, settings: Settings) -> Array:
        self._load("vae", *self._text_encoders)
        given = {**self._plain(len(latents), settings), "latents": torch.from_numpy(latents), "output_type": "np"}
        return np.asarray(let_through(self.pipeline, {TRANSFORMER: self.described}, given, self.device), np.float32)

    def generate(self, conditions: Mapping[str, Array], noise: Array, settings: Settings) -> Array:
        """The pipeline runs on prompts of its own, and its transformer gets these conditions instead of theirs."""
        self._load(*self._text_encoders)
        transformer, signature = self.transformer, inspect.signature(self.transformer.forward)
        given = {name: torch.from_numpy(conditions[name]).to(self.device) for name in self.io.conditions}

        def exchange(_: Any, args: tuple[Any, ...], keywords: Mapping[str, Any]) -> tuple[tuple[()], dict[str, Any]]:
            taken = signature.bind(*args, **keywords).arguments
            return (), {**taken, **{name: value.to(taken[name].dtype) for name, value in given.items()}}

        call = {**self._plain(len(noise), settings), "latents": torch.from_numpy(noise).to(self.device)}
        handle = transformer.register_forward_pre_hook(exchange, with_kwargs=True)
        try:
            latents: torch.Tensor = self.pipeline(**call, output_type="latent", return_dict=False)[0]
        finally:
            handle.remove()
        return latents.float().cpu().numpy()

    def _plain(self, batch: int, settings: Settings) -> dict[str, Any]:
        """A call whose prompts do not matter, in the branch that is compiled."""
        given = self.text([EXAMPLES[0]] * batch, settings)
        return self._one_branch(settings, given, whole=False)[1]


def _parameters(kind: Any) -> Mapping[str, inspect.Parameter]:
    """Of a pipeline's call."""
    return inspect.signature(kind.__call__).parameters
