"""FLUX.1 (``FluxPipeline``): FLUX.1-dev and its fine-tunes, and tiny-flux. Read black-forest-labs/flux first.

Cut: the image tokens after the last single block, before ``norm_out`` and ``proj_out``.
"""

import hashlib
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Self

import diffusers
import numpy as np
import torch
import transformers
from accelerate import init_empty_weights
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from diffusers.pipelines.flux import pipeline_flux
from diffusers.pipelines.flux.pipeline_flux import calculate_shift
from safetensors import SafetensorError
from torch import nn
from transformers import CLIPTextModel, T5EncoderModel

from cachec.compiler.models.base import Family, ModelSpec, Settings, lost_text
from cachec.compiler.models.named import MODELS
from cachec.compiler.models.shards import Shards, Stored, weight_files
from cachec.runtime.errors import InputError, ModelUnavailableError, shortened
from cachec.runtime.files import hash_file, reason_of
from cachec.runtime.hashing import hashing
from cachec.runtime.model_io import ModelIO
from cachec.runtime.specs import Array

log = logging.getLogger(__name__)

TRANSFORMER = "transformer"  # its folder
TEXT_ENCODERS = {"text_encoder": CLIPTextModel, "text_encoder_2": T5EncoderModel}


class FluxModel(Family):
    """A FLUX pipeline; as loaded here it is on the CPU in float32."""

    def __init__(
        self, spec: ModelSpec, pipeline: FluxPipeline, directory: Path | None = None, stored: Stored | None = None
    ) -> None:
        self.check_scheduler(pipeline.scheduler)
        self.spec = spec
        self.pipeline: Any = pipeline
        self._directory, self._stored = directory, stored
        self._described: nn.Module | None = None
        self._digests: Callable[[], list[str]] | None = None  # of the weights' files, if they are being made
        self._told: set[str] = set()  # prompts that are cut, and that was said

    @classmethod
    def make_spec(cls, name: str, source: str) -> ModelSpec:
        return replace(MODELS["flux"], name=name, source=source)

    @classmethod
    def wrap(cls, spec: ModelSpec, pipeline: Any, directory: Path | None) -> Self:
        return cls(spec, pipeline, directory)

    @classmethod
    def load(cls, spec: ModelSpec, directory: Path, *, with_transformer: bool) -> Self:
        _quiet_loading()
        stored = _open_transformer(spec, directory / TRANSFORMER) if with_transformer else None
        absent = dict.fromkeys(("transformer", "vae", *TEXT_ENCODERS))  # until they are wanted
        pipeline = FluxPipeline.from_pretrained(directory, local_files_only=True, **absent)
        pipeline.vae_scale_factor = _vae_scale_factor(directory)
        pipeline.set_progress_bar_config(disable=True)
        return cls(spec, pipeline, directory, stored)

    @classmethod
    def outline(cls, spec: ModelSpec, directory: Path) -> Self:
        config = FluxTransformer2DModel.load_config(directory / TRANSFORMER, local_files_only=True)
        stored = Stored.outline(lambda: FluxTransformer2DModel.from_config(config))
        absent = dict.fromkeys(("transformer", "vae", *TEXT_ENCODERS, "tokenizer", "tokenizer_2"))
        pipeline = FluxPipeline(scheduler=_scheduler(directory / "scheduler"), **absent)
        if (directory / "vae").is_dir():  # else that of FLUX.1
            pipeline.vae_scale_factor = _vae_scale_factor(directory)
        return cls(spec, pipeline, directory, stored)

    @property
    def transformer(self) -> nn.Module:
        if self.pipeline.transformer is None:
            if self._stored is None or self._directory is None:
                raise ModelUnavailableError(f"{self.spec.name} was loaded without its transformer")
            self.pipeline.transformer = FluxTransformer2DModel.from_pretrained(self._directory / TRANSFORMER)
        module: nn.Module = self.pipeline.transformer.eval()
        return module

    @property
    def stored(self) -> Stored | None:
        return self._stored

    @property
    def device(self) -> torch.device:
        return torch.device("cpu") if self.pipeline.transformer is None else super().device

    @property
    def _modules(self) -> Any:
        """The transformer, with or without the values of its weights; what it would be, if it was loaded without."""
        if self._stored is not None:
            return self._stored.module
        if self.pipeline.transformer is not None or self._directory is None:
            return self.transformer
        if self._described is None:
            config = FluxTransformer2DModel.load_config(self._directory / TRANSFORMER, local_files_only=True)
            with init_empty_weights():
                self._described = FluxTransformer2DModel.from_config(config)
        return self._described

    @property
    def _config(self) -> Any:
        return self._modules.config

    @property
    def block(self) -> str:
        return f"single_transformer_blocks.{len(self._modules.single_transformer_blocks) - 1}"

    @property
    def io(self) -> ModelIO:
        config = self._config
        guidance = ("guidance",) if config.guidance_embeds else ()  # FLUX.1-schnell takes none
        conditions = ("encoder_hidden_states", "pooled_projections", *guidance)
        return ModelIO(latents="hidden_states", timestep="timestep", conditions=conditions)

    @cached_property
    def weights_hash(self) -> str:
        files = self._own_files()
        if not files:
            tensors = sorted(self.transformer.state_dict().items())
            return hashlib.sha256(b"".join(hashlib.sha256(_raw(tensor)).digest() for _, tensor in tensors)).hexdigest()
        try:
            digests = [hash_file(file) for file in files] if self._digests is None else self._digests()
        except OSError as error:
            raise ModelUnavailableError(f"the weights of {self.spec.source} cannot be read: {reason_of(error)}") from error
        return hashlib.sha256("".join(digests).encode()).hexdigest()

    @contextmanager
    def hashing_weights(self) -> Iterator[None]:
        if self._stored is None or "weights_hash" in vars(self):
            yield
            return
        with hashing(self._own_files()) as self._digests:
            try:
                yield
            finally:
                self._digests = None

    def _own_files(self) -> list[Path]:
        """Files with the very weights of the transformer: one in memory may have become different from its own."""
        if self._stored is not None:
            return list(self._stored.shards.files)
        if self._directory is None or not (folder := self._directory / TRANSFORMER).is_dir():
            return []
        try:
            shards = Shards.open(files := weight_files(self.spec.source, folder))
        except ModelUnavailableError:  # the weights are in memory, and what lies beside is not looked for
            return []
        held = self.transformer.state_dict()
        same = held.keys() == shards.places.keys() and all(
            torch.equal(shards.read(name).to(value.dtype), value.cpu()) for name, value in held.items()
        )
        return files if same else []

    def thin_twin(self, settings: Settings) -> tuple[Self, Settings]:
        config = {**self._config, "num_layers": 1, "num_single_layers": 1, "num_attention_heads": 2}
        with torch.random.fork_rng():
            torch.manual_seed(0)
            transformer = FluxTransformer2DModel.from_config(config)
        parts = {name: getattr(self.pipeline, name) for name in ("scheduler", "tokenizer", "tokenizer_2")}
        pipeline = FluxPipeline(**parts, **dict.fromkeys(("vae", *TEXT_ENCODERS)), transformer=transformer)
        pipeline.vae_scale_factor = self.pipeline.vae_scale_factor
        twin = type(self)(replace(self.spec, name=f"{self.spec.name}, thin"), pipeline)
        return twin, replace(settings, height=2 * self._side, width=3 * self._side, text_tokens=min(5, settings.text_tokens))

    def example_inputs(self, settings: Settings, *, batch: int = 2) -> dict[str, torch.Tensor]:
        config = self._config
        generator = torch.Generator().manual_seed(0)

        def random(*shape: int) -> torch.Tensor:
            return torch.randn(batch, *shape, generator=generator)  # on the CPU: the same numbers on all devices

        examples = {
            "hidden_states": random(self._tokens(settings), config.in_channels),
            "timestep": torch.rand(batch, generator=generator),
            "encoder_hidden_states": random(settings.text_tokens, config.joint_attention_dim),
            "pooled_projections": random(config.pooled_projection_dim),
            "guidance": torch.full((batch,), settings.guidance),
        }
        io = self.io
        return {name: examples[name].to(self.device) for name in (io.latents, io.timestep, *io.conditions)}

    def constants(self, settings: Settings) -> dict[str, Any]:
        side = self._side
        ids = self.pipeline._prepare_latent_image_ids(
            1, settings.height // side, settings.width // side, self.device, torch.float32
        )
        return {"img_ids": ids, "txt_ids": torch.zeros(settings.text_tokens, 3, device=self.device), "return_dict": False}

    def sampling(self, settings: Settings) -> tuple[Array, Array]:
        scheduler = FlowMatchEulerDiscreteScheduler.from_config(self.pipeline.scheduler.config)
        sigmas = np.linspace(1.0, 1 / settings.steps, settings.steps)
        scheduler.set_timesteps(sigmas=sigmas, mu=self.shift(settings))
        timesteps = scheduler.timesteps.float() / 1000  # as the pipeline in float32 does it, whatever the precision
        return scheduler.sigmas.numpy().astype(np.float32), timesteps.float().numpy()

    def shift(self, settings: Settings) -> float:
        """The scheduler's mu at this resolution."""
        config = self.pipeline.scheduler.config
        keys = ("base_image_seq_len", "max_image_seq_len", "base_shift", "max_shift")
        mu: float = calculate_shift(self._tokens(settings), *(config[key] for key in keys))
        return mu

    @torch.no_grad()
    def encode(self, prompts: Sequence[str], settings: Settings, names: Sequence[str]) -> dict[str, Array]:
        self._tell_of_lost_text(prompts, settings.text_tokens)
        self._load_text_encoders()
        with _not_said_twice():
            states, pooled, _ = self.pipeline.encode_prompt(
                prompt=list(prompts), prompt_2=None, max_sequence_length=settings.text_tokens
            )
        conditions = {
            "encoder_hidden_states": states.float().cpu().numpy(),
            "pooled_projections": pooled.float().cpu().numpy(),
            "guidance": np.full(len(prompts), settings.guidance, np.float32),
        }
        return {name: conditions[name] for name in names}

    def _load_text_encoders(self) -> None:
        """Those that are not there yet: the larger one has gigabytes, and compiling may never want it."""
        for name, kind in TEXT_ENCODERS.items():
            if getattr(self.pipeline, name) is None and self._directory is not None:
                encoder = _from_directory(self.spec, kind, self._directory / name)
                self.pipeline.register_modules(**{name: encoder})

    def release_text_encoders(self) -> None:
        if self._stored is not None:
            self.pipeline.register_modules(**dict.fromkeys(TEXT_ENCODERS))

    def _tell_of_lost_text(self, prompts: Sequence[str], text_tokens: int) -> None:
        """Once for each prompt that is cut."""
        pipe, limit = self.pipeline, self.pipeline.tokenizer_max_length
        for prompt in dict.fromkeys(prompts):
            if prompt in self._told:
                continue
            if lost := lost_text(prompt, pipe.tokenizer_2, text_tokens):
                self._told.add(prompt)
                log.warning("prompt %s is cut at %d text tokens, without %s: shorten it, or compile with more --text-tokens",
                            shortened(prompt), text_tokens, shortened(lost, 200))  # fmt: skip
            if limit < text_tokens and (lost := lost_text(prompt, pipe.tokenizer, limit)):
                self._told.add(prompt)
                log.warning("prompt %s: the pooled text encoder reads %d tokens only, not %s",
                            shortened(prompt), limit, shortened(lost, 200))  # fmt: skip

    @torch.no_grad()
    def decode(self, latents: Array, settings: Settings) -> Array:
        pipe = self.pipeline
        if pipe.vae is None and self._directory is not None:
            pipe.register_modules(vae=_from_directory(self.spec, AutoencoderKL, self._directory / "vae"))
        given = torch.from_numpy(latents).to(pipe.vae.device, pipe.vae.dtype)
        unpacked = pipe._unpack_latents(given, settings.height, settings.width, pipe.vae_scale_factor)
        scaled = unpacked / pipe.vae.config.scaling_factor + pipe.vae.config.shift_factor
        picture = pipe.vae.decode(scaled, return_dict=False)[0]
        array: Array = pipe.image_processor.postprocess(picture, output_type="np")
        return array.astype(np.float32)

    def generate(self, conditions: Mapping[str, Array], noise: Array, settings: Settings) -> Array:
        def there(value: Array) -> torch.Tensor:
            return torch.from_numpy(value).to(self.device, next(self.transformer.parameters()).dtype)

        result = self.pipeline(
            prompt_embeds=there(conditions["encoder_hidden_states"]),
            pooled_prompt_embeds=there(conditions["pooled_projections"]),
            latents=there(noise),
            height=settings.height,
            width=settings.width,
            num_inference_steps=settings.steps,
            guidance_scale=settings.guidance,
            output_type="latent",
        )
        latents: Array = result.images.float().cpu().numpy()
        return latents

    @staticmethod
    def check_scheduler(scheduler: Any) -> None:
        if not isinstance(scheduler, FlowMatchEulerDiscreteScheduler):
            raise InputError(
                f"the model's sampler is {type(scheduler).__name__}; cachec compiles FlowMatchEulerDiscreteScheduler only"
            )
        if scheduler.config.stochastic_sampling:
            raise InputError("the model's sampler adds noise at every step (stochastic_sampling); its runs cannot be forecast")

    @property
    def sizes_of(self) -> Callable[[str, torch.Tensor], dict[str, Any]]:
        return partial(_sizes_of, self._side)

    @property
    def _side(self) -> int:
        """Height and width of a token in pixels."""
        side: int = 2 * self.pipeline.vae_scale_factor
        return side

    def _tokens(self, settings: Settings) -> int:
        side = self._side
        for axis, size in (("height", settings.height), ("width", settings.width)):
            if size < side or size % side:
                raise InputError(f"{axis} is {size}; {self.spec.name} takes multiples of {side} pixels")
        tokens: int = (settings.height // side) * (settings.width // side)
        return tokens


def _from_directory(spec: ModelSpec, kind: Any, folder: Path) -> Any:
    """A component that is loaded only when it is wanted."""
    try:
        return kind.from_pretrained(folder, local_files_only=True).eval()
    except (OSError, ValueError, SafetensorError) as error:
        raise ModelUnavailableError(f"{folder.name} of {spec.source} cannot be loaded: {error}") from error


def _vae_scale_factor(directory: Path) -> int:
    """Pixels of a latent's side."""
    widths = AutoencoderKL.load_config(directory / "vae", local_files_only=True)["block_out_channels"]
    factor: int = 2 ** (len(widths) - 1)
    return factor


def _open_transformer(spec: ModelSpec, folder: Path) -> Stored:
    config = FluxTransformer2DModel.load_config(folder, local_files_only=True)
    files = weight_files(spec.source, folder)
    return Stored.open(lambda: FluxTransformer2DModel.from_config(config), files, folder / "config.json")


def _scheduler(folder: Path) -> Any:
    config = FlowMatchEulerDiscreteScheduler.load_config(folder, local_files_only=True)
    return getattr(diffusers, config["_class_name"]).from_config(config)


def _quiet_loading() -> None:
    """No progress bars for files that load in a second."""
    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()


@contextmanager
def _not_said_twice() -> Iterator[None]:
    """The pipeline says, too, that a prompt is cut; elsewhere it may."""
    pipelines = logging.getLogger(pipeline_flux.__name__)
    pipelines.addFilter(_is_news)
    try:
        yield
    finally:
        pipelines.removeFilter(_is_news)


def _is_news(record: logging.LogRecord) -> bool:
    return "was truncated because" not in record.getMessage()


def _sizes_of(side: int, name: str, ids: torch.Tensor) -> dict[str, Any]:
    """Sizes of ids [L, 3]: picture, row, column; a token covers ``side`` pixels each way."""
    if ids.ndim != 2 or 0 in ids.shape or ids.shape[1] != 3:
        return {name: list(ids.shape)}
    if name == "txt_ids":
        return {"max_sequence_length": len(ids)}
    rows, columns = (int(ids[:, axis].max()) + 1 for axis in (1, 2))
    whole = rows * columns == len(ids)
    return {"height": rows * side, "width": columns * side} if whole else {name: f"of {len(ids)} tokens"}


def _raw(tensor: torch.Tensor) -> bytes:
    return tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes()
