"""The toy DiT as a loaded model: what calibration asks of one, with prompts that are read as seeds."""

import zlib
from types import SimpleNamespace

import numpy as np
import torch
from toy import TOKENS, WIDTH, ToyDiT

from cachec.compiler.models.base import LoadedModel, ModelSpec, Settings
from cachec.runtime.noise import make_noise
from cachec.runtime.plan import ModelIO

SETTINGS = Settings(height=TOKENS, width=WIDTH, text_tokens=1, guidance=1.0, steps=4, dtype="float32")
POISON = "poison"  # a prompt whose condition is NaN


class FlowEuler:
    """What stands for a sampler: only its name is looked at."""


class ToyModel(LoadedModel):
    """Linear noise levels, times ``shift``."""

    spec = ModelSpec("toy", "tests")
    block = "blocks.2"
    io = ModelIO("latents", "timestep", ("prompt",))

    def __init__(self, *, weights: str = "a" * 64, scheduler: object = None, shift: float = 1.0) -> None:
        self.pipeline = SimpleNamespace(scheduler=scheduler or FlowEuler())
        self._weights, self._shift, self._transformer = weights, shift, ToyDiT().eval()

    @property
    def transformer(self):
        return self._transformer

    @property
    def weights_hash(self):
        return self._weights

    def example_inputs(self, settings, *, batch=2):
        generator = torch.Generator().manual_seed(1)
        shapes = {"latents": (batch, TOKENS, WIDTH), "timestep": (batch,), "prompt": (batch, WIDTH)}
        return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}

    def constants(self, settings):
        return {}

    def sampling(self, settings):
        sigmas = np.linspace(1, 0, settings.steps + 1, dtype=np.float32) * np.float32(self._shift)
        return sigmas, sigmas[:-1]

    def encode(self, prompts, settings, names):
        values = [make_noise(zlib.crc32(prompt.encode()), (WIDTH,)) for prompt in prompts]
        values = [np.full_like(v, np.nan) if p == POISON else v for p, v in zip(prompts, values, strict=True)]
        return {"prompt": np.stack(values)}

    def decode(self, latents, settings):
        raise NotImplementedError

    def generate(self, conditions, noise, settings):
        raise NotImplementedError
