"""What all families of diffusers' pipelines have in common: files, what is loaded when, and what the pipeline hands over.

A family adds what it knows: names, sizes, the cut, random embeddings, how latents become pictures. ``B`` batch, ``T`` steps.
"""

import copy
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
import torch
from accelerate import init_empty_weights
from diffusers.image_processor import VaeImageProcessor
from torch import nn

from cachec.compiler.models.base import ModelSpec, Settings
from cachec.compiler.models.blocks import OfBlocks
from cachec.compiler.models.components import Components
from cachec.compiler.models.flow_maps import check_second_time, second_time, targets_of, telling
from cachec.compiler.models.inputs import as_the_weights, only_scale, own_levels, owned, widened
from cachec.compiler.models.lora import fuse_loras
from cachec.compiler.models.lora_files import LoraFile
from cachec.compiler.models.named import MODELS
from cachec.compiler.models.observed import TRANSFORMER, Observed, observe
from cachec.compiler.models.own_weights import OwnHash, hash_with_loras
from cachec.compiler.models.prompt_model import PromptModel
from cachec.compiler.models.shards import Stored
from cachec.compiler.tables.sampler_probe import check_sampler, probe_sampler
from cachec.compiler.tables.sampling import Sampling
from cachec.runtime.abi import GUIDANCE, TARGET_TIMESTEP, negative_name
from cachec.runtime.errors import InputError, ModelUnavailableError
from cachec.runtime.specs import Array


class PipelineModel(OfBlocks, PromptModel):
    """A pipeline of diffusers; as loaded here it is on the CPU in float32.

    What a family says, beside the methods, and beside what it says of prompts (``prompt_model.py``):

    - ``DEFAULTS``: the short name of the model whose sizes and scales a directory of this family gets.
    - ``ARGUMENTS``: by condition, the keyword of the pipeline's call that takes it ready made; for the negative branch the
      pipelines have the same with ``negative_``. Other conditions follow from the settings, and the pipeline makes them.
    - ``SCALE``: the keyword of the guidance scale; ``EMBEDDED`` that of one which is an input of the model, if it is another.
    - ``BLOCKS``: the transformer's list of blocks, behind the last of which is the cut.
    - ``SIGN``: -1 where the pipeline hands its sampler the negated output.
    - ``SHOWN``: components that the pipeline's constructor looks at.
    - ``part``: which of the pipeline's transformers the model is about.
    """

    DEFAULTS: ClassVar[str]
    ARGUMENTS: ClassVar[Mapping[str, str]]
    SCALE: ClassVar[str] = "guidance_scale"
    EMBEDDED: ClassVar[str | None] = None
    BLOCKS: ClassVar[str] = "transformer_blocks"
    SIGN: ClassVar[float] = 1.0
    SHOWN: ClassVar[tuple[str, ...]] = ("vae",)
    part = TRANSFORMER

    def __init__(self, spec: ModelSpec, pipeline: Any, directory: Path | None = None, stored: Stored | None = None) -> None:
        self.check_scheduler(pipeline.scheduler)
        self.spec = spec
        self.pipeline: Any = pipeline
        self._components = None if directory is None else Components(spec.source, directory)
        self._stored = stored
        self._described: nn.Module | None = None
        self._told = set()
        self._samplings: dict[Settings, Sampling] = {}
        self._seen: tuple[tuple[Settings, int], Observed] | None = None  # the last run that was observed

    # --- what a family says

    @property
    @abstractmethod
    def side(self) -> int:
        """Height and width are multiples of so many pixels."""

    @abstractmethod
    def embeddings(self, settings: Settings, random: Callable[..., torch.Tensor]) -> dict[str, torch.Tensor]:
        """Random values of the conditions of ``ARGUMENTS``; ``random(*shape)`` gives [B, *shape]."""

    @abstractmethod
    def thin(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """What is different in the transformer's configuration of a thin twin: one block of each kind, few heads."""

    @property
    def block(self) -> str:
        return f"{self.BLOCKS}.{len(self.described.get_submodule(self.BLOCKS)) - 1}"  # type: ignore[arg-type]

    def answer(self, velocity: torch.Tensor, given: Mapping[str, Any]) -> Any:
        """Zeros stand for a variance that the network gives besides."""
        io = self.io
        return velocity if io.parts or io.output is None else widened(velocity, io.axis, io.output, self.config.out_channels)

    def apart(self) -> Self:
        pipeline = copy.copy(self.pipeline)
        own = vars(pipeline)
        own.update({name: None for name, part in own.items() if isinstance(part, nn.Module) and name not in self.parts})
        return type(self)(self.spec, pipeline)

    def scheduled(self, settings: Settings) -> Any:
        return self.observed(settings).scheduler

    def sized(self, settings: Settings) -> dict[str, Any]:
        """The settings as keywords of the pipeline's call."""
        return {"height": settings.height, "width": settings.width, "num_inference_steps": settings.steps}

    def staged(self, call: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
        """The pipeline to be called, and what with: for what is no keyword of its call, a copy that has it otherwise."""
        return self.pipeline, dict(call)

    def arguments(self, conditions: Mapping[str, torch.Tensor], settings: Settings) -> dict[str, Any]:
        """Conditions of one branch as keywords of the pipeline's call."""
        return {keyword: conditions[name] for name, keyword in self.ARGUMENTS.items()}

    def handed(self, noise: torch.Tensor, settings: Settings) -> torch.Tensor:
        """Noise as the pipeline's call takes it."""
        return noise

    def unpacked(self, latents: torch.Tensor, settings: Settings) -> torch.Tensor:
        """Latents as the autoencoder takes them, from those that the pipeline ends with."""
        return latents

    def pictures(self, latents: torch.Tensor, settings: Settings) -> torch.Tensor:
        """What the autoencoder makes of the latents that the pipeline ends with: [B, 3, H, W] in [-1, 1]."""
        vae = self.pipeline.vae
        scaled = self.unpacked(latents, settings) / vae.config.scaling_factor + (vae.config.get("shift_factor") or 0.0)
        picture: torch.Tensor = vae.decode(scaled, return_dict=False)[0]
        return picture

    def finished(self, made: torch.Tensor) -> Array:
        """Pictures [B, H, W, 3] in [0, 1] of what :meth:`pictures` gives."""
        processor = getattr(self.pipeline, "image_processor", None) or VaeImageProcessor()
        array: Array = processor.postprocess(made, output_type="np")
        return array

    def small(self, settings: Settings) -> Settings:
        """Settings of a thin twin."""
        side, text_tokens = self.side, min(5, settings.text_tokens)
        return replace(settings, height=2 * side, width=3 * side, text_tokens=text_tokens)

    # --- how it is found

    @classmethod
    def make_spec(cls, name: str, source: str) -> ModelSpec:
        return replace(MODELS[cls.DEFAULTS], name=name, source=source, packaged=False, probe=None)

    @classmethod
    def wrap(cls, spec: ModelSpec, pipeline: Any, directory: Path | None) -> Self:
        return cls(spec, pipeline, directory)

    @classmethod
    def load(cls, spec: ModelSpec, directory: Path, *, with_transformer: bool) -> Self:
        components = Components(spec.source, directory)
        stored = components.open(TRANSFORMER) if with_transformer else None
        if stored is not None:
            check_second_time(stored.module, directory)
        pipeline = components.pipeline(cls.SHOWN, {} if stored is None else {TRANSFORMER: stored.module})
        pipeline.set_progress_bar_config(disable=True)
        return cls(spec, pipeline, directory, stored)

    @classmethod
    def outline(cls, spec: ModelSpec, directory: Path) -> Self:
        components = Components(spec.source, directory)
        stored = Stored.outline(lambda: components.describe(TRANSFORMER))
        return cls(spec, components.outline(cls.SHOWN, {TRANSFORMER: stored.module}), directory, stored)

    def thin_twin(self, settings: Settings) -> tuple[Self, Settings] | None:
        config = {**self.config, **self.thin(self.config)}
        with torch.random.fork_rng():
            torch.manual_seed(0)
            transformer = type(self.described).from_config(config)  # type: ignore[attr-defined]
        pipeline = copy.copy(self.pipeline)
        pipeline.register_modules(vae=None, **dict.fromkeys(self._text_encoders), transformer=transformer)
        twin = type(self)(replace(self.spec, name=f"{self.spec.name}, thin"), pipeline)
        return twin, replace(self.small(settings), cut=None)

    # --- the transformer

    @property
    def transformer(self) -> nn.Module:
        if self._held is None:
            if self._stored is None or self._components is None:
                raise ModelUnavailableError(f"{self.spec.name} was loaded without its {self.part}")
            setattr(self.pipeline, self.part, loaded := self._components.load(self.part))
            self._stored.fuse_into(loaded)
        module: nn.Module = self._held.eval()
        return module

    @property
    def _held(self) -> Any:
        return getattr(self.pipeline, self.part)

    @property
    def stored(self) -> Stored | None:
        return self._stored

    @property
    def loras(self) -> Sequence[Mapping[str, Any]]:
        return () if self._stored is None else self._stored.loras

    def fuse(self, loras: Sequence[LoraFile]) -> None:
        if self._stored is None:
            super().fuse(loras)
        else:
            self._stored = fuse_loras(self._stored, loras, self.pipeline, self.part)

    @property
    def device(self) -> torch.device:
        return torch.device("cpu") if self._held is None else super().device

    @property
    def described(self) -> nn.Module:
        """The transformer, with or without the values of its weights; what it would be, if it was loaded without."""
        if self._stored is not None:
            return self._stored.module
        if self._held is not None or self._components is None:
            return self.transformer
        if self._described is None:
            with init_empty_weights():
                self._described = self._components.describe(self.part)
        return self._described

    @property
    def config(self) -> Any:
        """The transformer's configuration."""
        return self.described.config

    @property
    def plain_hash(self) -> str:
        return self._own_hash.value

    @property
    def weights_hash(self) -> str:
        return hash_with_loras(self.plain_hash, self.loras)

    def hashing_weights(self) -> AbstractContextManager[None]:
        return self._own_hash.beside()

    @cached_property
    def _own_hash(self) -> OwnHash:
        folder = None if self._components is None else self._components.directory / self.part
        return OwnHash(self.spec.source, self._stored, folder, lambda: self.transformer)

    # --- what the pipeline hands over

    def observed(self, settings: Settings, *, batch: int = 2) -> Observed:
        """A run of the pipeline on random embeddings, one branch of guidance: no text encoder is needed."""
        if self._seen is None or self._seen[0] != (settings, batch):
            self.check_sizes(settings)
            generator = torch.Generator().manual_seed(0)  # on the CPU: the same numbers on all devices

            def random(*shape: int) -> torch.Tensor:
                return torch.randn(batch, *shape, generator=generator)

            given = self.examples(settings, random)
            self._seen = ((settings, batch), self._observe(settings, {**given, "generator": generator}))
        return self._seen[1]

    def examples(self, settings: Settings, random: Callable[..., torch.Tensor]) -> dict[str, Any]:
        """Keywords of the pipeline's call for an example; ``random(*shape)`` gives [B, *shape]."""
        embeddings = {name: value.to(self.device) for name, value in self.embeddings(settings, random).items()}
        return self.arguments(embeddings, settings)

    def _observe(self, settings: Settings, given: Mapping[str, Any], *, whole: bool = True) -> Observed:
        pipeline, call = self.staged({**self._wanted(settings), **given, **self._scales(settings)})
        return observe(pipeline, self.parts, call, device=self.device, whole=whole)

    def branch_scale(self, settings: Settings) -> float:
        return super().branch_scale(settings) if self.EMBEDDED is None else settings.true_cfg_scale

    @property
    def branch_setting(self) -> str:
        return super().branch_setting if self.EMBEDDED is None else "true_cfg_scale"

    def _scales(self, settings: Settings, scales: Array | None = None) -> dict[str, float]:
        """Guidance as keywords of the pipeline's call: of two branches with the ``scales`` of all requests, else of one."""
        given = {self.EMBEDDED or self.SCALE: settings.guidance}
        return given if (rule := self.io.guidance) is None else {**given, self.SCALE: only_scale(scales, rule)}

    @property
    def parts(self) -> dict[str, nn.Module]:
        """The pipeline's transformers, by name."""
        return {TRANSFORMER: self.described}

    def _wanted(self, settings: Settings) -> dict[str, Any]:
        """The settings, noise levels of the user's own among them, as keywords of the pipeline's call."""
        return {**self.sized(settings), **own_levels(self.pipeline, settings.sigmas)}

    def check_sizes(self, settings: Settings) -> None:
        """Raise ``InputError`` unless the model draws pictures of this size."""
        side = self.side
        for axis, size in (("height", settings.height), ("width", settings.width)):
            if size < side or size % side:
                raise InputError(f"{axis} is {size}; {self.spec.name} takes multiples of {side} pixels")
        if settings.frames != 1:
            raise InputError(f"frames is {settings.frames}; {self.spec.name} draws pictures: leave it at 1")

    def example_inputs(self, settings: Settings, *, batch: int = 2) -> dict[str, torch.Tensor]:
        io, seen = self.io, self.observed(settings, batch=batch)
        told = seen.told(io.timestep).to(self.device)
        examples = {**self.taken(seen.first, settings), io.latents: self.state(seen.first)}
        examples[io.timestep] = told[torch.arange(batch) % len(told)]
        names = (io.latents, io.timestep, *io.conditions)
        if second_time(self.described) is not None:
            examples[TARGET_TIMESTEP] = torch.from_numpy(targets_of(told.cpu().numpy()))[torch.arange(batch) % len(told)]
            names = (io.latents, io.timestep, TARGET_TIMESTEP, *io.conditions)
        return {name: owned(examples[name]).to(self.device) for name in names}

    def constants(self, settings: Settings) -> dict[str, Any]:
        io, given = self.io, self.observed(settings).first
        inputs = (io.latents, io.timestep, *io.conditions)
        return {**{name: value for name, value in given.items() if name not in inputs}, "return_dict": False}

    def sampling(self, settings: Settings) -> Sampling:
        if settings not in self._samplings:
            seen = self.observed(settings)
            told = seen.told(self.io.timestep).numpy()
            sampling = Sampling.of(probe_sampler(seen.scheduler), told, sign=self.SIGN, graphs=seen.graphs)
            targets = None if second_time(self.described) is None else targets_of(sampling.timesteps)
            self._samplings[settings] = replace(sampling, targets=targets)
        return self._samplings[settings]

    def _load(self, *names: str) -> None:
        """Components that are not there yet: some have gigabytes, and compiling may never want them."""
        for name in names:
            if getattr(self.pipeline, name) is None and self._components is not None and self._components.has(name):
                self.pipeline.register_modules(**{name: self._components.load(name)})

    def release_text_encoders(self) -> None:
        if self._stored is not None:
            self.pipeline.register_modules(**dict.fromkeys(self._text_encoders))

    @property
    def vae_config(self) -> Mapping[str, Any] | None:
        """Of the autoencoder; ``None`` where there is none."""
        if self.pipeline.vae is not None:
            return dict(self.pipeline.vae.config)
        return None if self._components is None else self._components.config("vae")

    def part_counts(self) -> Mapping[str, int]:
        if self._components is None:
            return {}
        found = {name: self._components.count(name) for name in (*self._text_encoders, "vae")}
        return {name: count for name, count in found.items() if count is not None}

    # --- pictures, and the untouched run

    @torch.no_grad()
    def decode(self, latents: Array, settings: Settings) -> Array:
        self._load("vae")
        vae = self.pipeline.vae
        made = self.pictures(torch.from_numpy(latents).to(vae.device, vae.dtype), settings)
        return self.finished(made).astype(np.float32)

    def pictured(self, latents: torch.Tensor, settings: Settings) -> torch.Tensor:
        made = (self.pictures(latents, settings) / 2 + 0.5).clamp(0, 1)
        return made.permute(0, *range(2, made.ndim), 1)

    @property
    def decoder(self) -> nn.Module | None:
        self._load("vae")
        vae: nn.Module | None = self.pipeline.vae
        return vae

    def generate(self, conditions: Mapping[str, Array], noise: Array, settings: Settings) -> Array:
        there = partial(as_the_weights, like=next(self.transformer.parameters()))
        given = {name: there(value) for name, value in conditions.items()}
        call = {**self._wanted(settings), **self.arguments(given, settings), **self._scales(settings, conditions.get(GUIDANCE))}
        if self.io.guidance is not None and GUIDANCE in conditions:
            others = {name: given[negative_name(name)] for name in self.io.conditions}
            negative = self.arguments({**given, **others}, settings)
            call |= {negative_name(keyword): negative[keyword] for keyword in self.ARGUMENTS.values()}
        with telling(self.pipeline, self.part, self.io.timestep, self.sampling(settings)):
            return self._run({**call, "return_dict": False}, self.handed(there(noise), settings)).float().cpu().numpy()

    def _run(self, call: Mapping[str, Any], noise: torch.Tensor) -> torch.Tensor:
        pipeline, given = self.staged(call)
        latents: torch.Tensor = pipeline(**given, latents=noise, output_type="latent")[0]
        return latents

    @staticmethod
    def check_scheduler(scheduler: Any) -> None:
        check_sampler(scheduler)
