"""The toy DiT as a family of its own, with a pipeline in a directory: text in, pictures out, in milliseconds.

Prompts are read as seeds; a picture is the latents of each token, mixed to colours by fixed weights.
"""

import json
import zlib
from functools import cache, partial
from types import SimpleNamespace

import numpy as np
import torch
from safetensors.torch import save_file
from toy import TOKENS, WIDTH, ToyDiT

from cachec.compiler.models.base import Family, ModelSpec, Settings
from cachec.compiler.models.blocks import Body
from cachec.compiler.models.shards import Stored
from cachec.compiler.tables.sampling import Sampling
from cachec.runtime.errors import InputError, ModelUnavailableError
from cachec.runtime.files import hash_file
from cachec.runtime.model_io import ModelIO
from cachec.runtime.noise import make_noise

HEIGHT, WIDTH_PIXELS = 16, 24  # a token is 8 x 8 pixels, two rows of three
SETTINGS = Settings(height=HEIGHT, width=WIDTH_PIXELS, text_tokens=1, guidance=1.0, steps=4, dtype="float32")
POISON = "poison"  # a prompt whose condition is NaN
WEIGHTS = "transformer/toy.safetensors"


class FlowEuler:
    """What stands for a sampler: only its name is looked at."""


class ToyPipeline:
    """What a diffusers pipeline would be."""

    def __init__(self, transformer, scheduler=None, origin=""):
        self.transformer, self.scheduler = transformer, scheduler or FlowEuler()
        self.config = SimpleNamespace(_name_or_path=origin)

    def save_pretrained(self, directory):
        (directory / "transformer").mkdir(parents=True)
        (directory / "model_index.json").write_text(json.dumps({"_class_name": "ToyPipeline"}))
        save_file(self.transformer.state_dict(), directory / WEIGHTS)


class ToyModel(Family):
    """Linear noise levels, times ``shift``."""

    spec = ModelSpec("toy", "tests", HEIGHT, WIDTH_PIXELS, text_tokens=1, guidance=1.0, prompts="avatars")
    block = "blocks.2"
    io = ModelIO("latents", "timestep", ("prompt",))
    stored = None
    body = Body(("blocks",), WIDTH, ("x",))

    def __init__(self, *, weights="a" * 64, scheduler=None, shift=1.0, pipeline=None, spec=None):
        self.pipeline = pipeline or ToyPipeline(ToyDiT(head_axis=True).eval(), scheduler)
        self.spec = spec or self.spec
        self._weights, self._shift = weights, shift

    @classmethod
    def make_spec(cls, name, source):
        return ModelSpec(name, source, HEIGHT, WIDTH_PIXELS, text_tokens=1, guidance=1.0, prompts="avatars")

    @classmethod
    @cache  # a compilation captures a loaded model once: these stay loaded, so one directory is captured once
    def load(cls, spec, directory, *, with_transformer):
        model = cls.wrap(spec, ToyPipeline(None, origin=str(directory)), directory)
        if with_transformer:
            model.stored = Stored.open(partial(ToyDiT, head_axis=True), [directory / WEIGHTS], directory / "model_index.json")
        return model

    @classmethod
    def wrap(cls, spec, pipeline, directory):
        return cls(weights=hash_file(directory / WEIGHTS) if directory else "0" * 64, pipeline=pipeline, spec=spec)

    @property
    def transformer(self):
        if self.pipeline.transformer is None:
            if self.stored is None:
                raise ModelUnavailableError(f"{self.spec.name} was loaded without its transformer")
            self.pipeline.transformer = ToyDiT(head_axis=True).eval()
            self.pipeline.transformer.load_state_dict(
                {name: self.stored.shards.read(name) for name in self.stored.shards.places}
            )
        return self.pipeline.transformer

    def thin_twin(self, settings):
        return ToyModel(pipeline=ToyPipeline(ToyDiT(head_axis=True).eval())), settings

    @property
    def device(self):
        return torch.device("cpu")

    @property
    def weights_hash(self):
        return self._weights

    def example_inputs(self, settings, *, batch=2):
        if (settings.height, settings.width) != (HEIGHT, WIDTH_PIXELS):
            raise InputError(f"the toy draws {HEIGHT} x {WIDTH_PIXELS} pixels, not {settings.height} x {settings.width}")
        generator = torch.Generator().manual_seed(1)
        shapes = {"latents": (batch, TOKENS, WIDTH), "timestep": (batch,), "prompt": (batch, WIDTH)}
        return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}

    def constants(self, settings):
        return {}

    def sampling(self, settings):
        sigmas = np.linspace(1, 0, settings.steps + 1, dtype=np.float32) * np.float32(self._shift)
        return Sampling(sigmas, sigmas[:-1])

    def encode(self, prompts, settings, names):
        values = [make_noise(zlib.crc32(prompt.encode()), (WIDTH,)) for prompt in prompts]
        values = [np.full_like(v, np.nan) if p == POISON else v for p, v in zip(prompts, values, strict=True)]
        return {name: np.stack(values) for name in names}

    def decode(self, latents, settings):
        colours = 0.5 + 0.5 * np.tanh(latents @ make_noise(7, (WIDTH, 8 * 8 * 3)) / WIDTH)  # [B, 6, 192]
        tiles = colours.reshape(-1, 2, 3, 8, 8, 3).transpose(0, 1, 3, 2, 4, 5)
        return tiles.reshape(-1, HEIGHT, WIDTH_PIXELS, 3).astype(np.float32)

    @torch.no_grad()
    def generate(self, conditions, noise, settings):
        sampling = self.sampling(settings)
        sigmas, timesteps = map(torch.from_numpy, (sampling.sigmas, sampling.timesteps))
        x, prompt = torch.from_numpy(noise), torch.from_numpy(conditions["prompt"])
        for step in range(settings.steps):
            velocity = self.transformer(x, timesteps[step].expand(len(x)), prompt)
            x = x + (sigmas[step + 1] - sigmas[step]) * velocity
        return x.numpy()


def save_toy(directory):
    """A pipeline directory of the toy, with the weights that ``ToyDiT`` begins with."""
    ToyPipeline(ToyDiT()).save_pretrained(directory)
    return directory
