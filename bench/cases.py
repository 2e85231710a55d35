"""What the speed bench measures on: tiny-flux, and a FLUX-shaped model with random weights; and how often.

The FLUX-shaped model has no text encoder and no VAE. Its conditions are noise from the prompt's text, its latents are compared
as they are.
"""

import hashlib
import logging
import math
import warnings
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxTransformer2DModel

from bench.peers import Request, Subject, bare_subject, make_peer, make_requests, open_subject, plain
from bench.timing import part_arguments, write_part
from cachec.compiler.calibration.metrics import psnr_db
from cachec.compiler.calibration.prompts import default_prompts
from cachec.compiler.methods import get_method
from cachec.compiler.models import find_model, load_model
from cachec.compiler.models.base import LoadedModel, ModelSpec, Settings, tensors_from
from cachec.compiler.tables.lower import lower, lower_uncached
from cachec.compiler.tables.sampling import Sampling
from cachec.compiler.tables.schedule import Schedule
from cachec.runtime.errors import InputError
from cachec.runtime.files import hash_file
from cachec.runtime.model_io import ModelIO
from cachec.runtime.noise import make_noise
from cachec.runtime.program import Program, ProgramKey, hash_sigmas
from cachec.runtime.specs import Array

TINY, SHAPED = "tiny-flux", "flux-shaped"
CASES = (TINY, SHAPED)
METHODS = {"hidden": ("taylor", {"order": "1"}), "output": ("adams", {"order": "2"})}
SIDE = 16  # pixels of a FLUX image token
WEIGHTS_SEED = 0
SHAPED_CONFIG = {
    "patch_size": 1,
    "in_channels": 64,
    "num_layers": 4,
    "num_single_layers": 8,
    "attention_head_dim": 64,
    "num_attention_heads": 12,
    "joint_attention_dim": 4096,
    "pooled_projection_dim": 768,
    "guidance_embeds": True,
    "axes_dims_rope": (8, 28, 28),
}
SMALL_CONFIG = {**SHAPED_CONFIG, "num_layers": 1, "num_single_layers": 2, "num_attention_heads": 2, "joint_attention_dim": 64}


@dataclass(frozen=True)
class Sizes:
    """How often things are run. ``warm``: an untimed run of the same row before each timed one.

    Pairs go on for ``pair_rounds`` rounds, or ``pair_seconds`` for each back end if that is less (two rounds at least).
    """

    prompts: int
    repeats: int
    request_repeats: int
    pair_rounds: int
    pair_seconds: float
    cold_repeats: int
    warm: bool


@dataclass(frozen=True, eq=False)
class Case:
    """A model with settings, the numbers of computed steps to try, and how often. ``pictures``: it can draw some."""

    name: str
    model: LoadedModel
    settings: Settings
    budgets: tuple[int, ...]
    pictures: bool
    sizes: Sizes

    @cached_property
    def requests(self) -> list[Request]:
        return make_requests(self.model, self.settings, self.prompts)

    @property
    def prompts(self) -> list[str]:
        return default_prompts("avatars", "eval")[: self.sizes.prompts]

    @property
    def steps(self) -> int:
        return self.settings.steps

    def subject(self) -> Subject:
        if isinstance(self.model, FluxShaped):
            return self.model.subject(self.settings)
        return open_subject(self.model, self.settings)

    def program(self, cut: str, schedule: Schedule) -> Program:
        """A program of the cut's linear method; the uncached one if ``schedule`` computes every step."""
        sampling = self.model.sampling(self.settings)
        key = ProgramKey(self.steps, hash_sigmas(sampling.sigmas), self.settings.sizes)
        if not schedule.forecast:
            return lower_uncached(key, sampling)
        name, options = METHODS[cut]
        table = get_method(name).with_options(options).table(schedule, sampling.sigmas, None)
        return lower(table, key, sampling)

    def psnr(self, latents: Array, reference: Array) -> float:
        """In dB, of the picture where there is one, else of the latents with their range as peak; batch 1."""
        if self.pictures:
            return psnr_db(*(self.model.decode(array, self.settings)[0] for array in (latents, reference)))
        error = float(np.sqrt(np.mean((latents - reference) ** 2)))
        return 20 * math.log10(float(np.ptp(reference)) / error) if error else math.inf


class FluxShaped(LoadedModel):
    """A FLUX transformer with random weights, on FLUX.1-dev's sampling grid. Its weights lie in ``directory``."""

    def __init__(self, directory: Path, *, name: str = SHAPED, pixels: int = 128, text_tokens: int = 512) -> None:
        self.spec = ModelSpec(name, f"random weights, seed {WEIGHTS_SEED}", pixels, pixels, text_tokens, guidance=3.5)
        self._directory = directory
        self._transformer = FluxTransformer2DModel.from_pretrained(directory, local_files_only=True).eval()

    @property
    def transformer(self) -> FluxTransformer2DModel:
        return self._transformer

    @property
    def block(self) -> str:
        return f"single_transformer_blocks.{len(self._transformer.single_transformer_blocks) - 1}"

    @property
    def sampler(self) -> str:
        return FlowMatchEulerDiscreteScheduler.__name__

    @property
    def io(self) -> ModelIO:
        return ModelIO("hidden_states", "timestep", ("encoder_hidden_states", "pooled_projections", "guidance"))

    @cached_property
    def weights_hash(self) -> str:
        files = sorted(self._directory.glob("*.safetensors"))
        return hashlib.sha256("".join(map(hash_file, files)).encode()).hexdigest()

    def subject(self, settings: Settings) -> Subject:
        rows, columns = settings.height // SIDE, settings.width // SIDE
        return bare_subject(self._transformer, rows=rows, columns=columns, text_tokens=settings.text_tokens)

    def example_inputs(self, settings: Settings, *, batch: int = 2) -> dict[str, torch.Tensor]:
        conditions = self.encode([f"example {i}" for i in range(batch)], settings, self.io.conditions)
        generator = torch.Generator().manual_seed(0)
        tokens = (settings.height // SIDE) * (settings.width // SIDE)
        return {
            "hidden_states": torch.randn(batch, tokens, self._transformer.config.in_channels, generator=generator),
            "timestep": torch.rand(batch, generator=generator),
            **tensors_from(conditions),
        }

    def constants(self, settings: Settings) -> dict[str, Any]:
        return dict(self.subject(settings).constants)

    def sampling(self, settings: Settings) -> Sampling:
        sampling = self.subject(settings).sampling(settings.steps)
        return Sampling(sampling.sigmas.astype(np.float32), sampling.timesteps.astype(np.float32))

    def encode(self, prompts: Sequence[str], settings: Settings, names: Sequence[str]) -> dict[str, Array]:
        """Noise from each prompt's text, of the shapes that text encoders give."""
        config, seeds = self._transformer.config, [zlib.crc32(prompt.encode()) for prompt in prompts]
        shapes = {
            "encoder_hidden_states": (settings.text_tokens, config.joint_attention_dim),
            "pooled_projections": (config.pooled_projection_dim,),
        }
        conditions = {name: np.stack([make_noise(seed, shape) for seed in seeds]) for name, shape in shapes.items()}
        conditions["guidance"] = np.full(len(prompts), settings.guidance, np.float32)
        return {name: conditions[name] for name in names}

    def decode(self, latents: Array, settings: Settings) -> Array:
        raise InputError(f"{self.spec.name} has random weights and no VAE: compare its latents")

    def generate(self, conditions: Mapping[str, Array], noise: Array, settings: Settings) -> Array:
        peer = make_peer(plain(), self.subject(settings), num_steps=settings.steps)
        latents: Array = peer.run(tensors_from(conditions), torch.from_numpy(noise)).latents.numpy()
        return latents


def shaped_weights(work: Path) -> Path:
    return work / "weights"


def write_weights(directory: Path, config: Mapping[str, Any]) -> None:
    """Random weights from a seed, as a diffusers transformer."""
    torch.manual_seed(WEIGHTS_SEED)
    FluxTransformer2DModel(**config).save_pretrained(directory)


def open_case(name: str, work: Path, *, quick: bool) -> Case:
    """A case; the FLUX-shaped weights are made if ``work`` has none.

    Raises:
        InputError: there is no such case.
    """
    if name == TINY:
        spec = find_model(TINY)
        settings = Settings(spec.height, spec.width, spec.text_tokens, spec.guidance, 50, "float32")
        sizes = Sizes(2, 2, 2, 2, 20.0, 2, warm=True) if quick else Sizes(4, 6, 4, 60, 150.0, 5, warm=True)
        return Case(name, load_model(spec), settings, (7, 10), pictures=True, sizes=sizes)
    if name != SHAPED:
        raise InputError(f"there is no case {name!r}: take one of {', '.join(CASES)}")
    directory = shaped_weights(work)
    if not (directory / "config.json").is_file():
        write_weights(directory, SMALL_CONFIG if quick else SHAPED_CONFIG)
    model = FluxShaped(directory, pixels=64 if quick else 128, text_tokens=32 if quick else 512)
    spec = model.spec
    settings = Settings(spec.height, spec.width, spec.text_tokens, spec.guidance, 12 if quick else 28, "float32")
    sizes = Sizes(1, 2, 0, 2, 20.0, 1, warm=False) if quick else Sizes(1, 1, 0, 5, 160.0, 1, warm=False)
    return Case(name, model, settings, (5, 7) if quick else (7, 10), pictures=False, sizes=sizes)


def tiny_command(parts: Mapping[str, Callable[..., dict[str, Any]]]) -> click.Command:
    """A command that measures one of ``parts`` on tiny-flux."""

    @click.command()
    @part_arguments("part")
    def main(part: str, work: Path, out: Path, quick: bool) -> None:
        logging.basicConfig(level=logging.ERROR)
        warnings.filterwarnings("ignore")
        if part not in parts:
            raise click.UsageError(f"there is no part {part!r}: take one of {', '.join(parts)}")
        case = open_case(TINY, work, quick=quick)
        write_part(out, {"case": TINY, "part": part, **parts[part](case, work, quick=quick)})

    return main


def at_size(case: Case, *, pixels: int, steps: int) -> Case:
    """The same model at another resolution and number of steps."""
    return replace(case, settings=replace(case.settings, height=pixels, width=pixels, steps=steps))
