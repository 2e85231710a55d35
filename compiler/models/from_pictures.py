"""Families whose pipeline has a twin in diffusers that begins with a picture: how a picture becomes latents.

``B`` batch, ``H`` and ``W`` pixels.
"""

import copy
import inspect
from types import SimpleNamespace
from typing import Any, ClassVar

import diffusers
import torch
from torch import nn

from cachec.compiler.models.base import Settings
from cachec.compiler.models.pipeline_model import PipelineModel
from cachec.runtime.specs import Array

SAME = 1e-5  # that the sampler's own mixture of latents and noise may differ from a flow's


class FromPictures(PipelineModel):
    """``TWIN``: the pipeline of diffusers with the same parts that takes a picture and its strength."""

    TWIN: ClassVar[str]

    def packed(self, latents: torch.Tensor, settings: Settings) -> torch.Tensor:
        """Latents as sampling moves them, from those that the autoencoder gives, scaled."""
        return latents

    def scaled(self, mean: torch.Tensor) -> torch.Tensor:
        """What the autoencoder gives, in the scale of noise."""
        config = self.pipeline.vae.config
        moved: torch.Tensor = (mean - (config.get("shift_factor") or 0.0)) * config.scaling_factor
        return moved

    def mean(self, pictures: torch.Tensor) -> torch.Tensor:
        """The likeliest latents of pictures [B, 3, H, W] in [-1, 1], as the autoencoder gives them."""
        return _likeliest(self.pipeline.vae, pictures)

    def encoded(self, pictures: torch.Tensor, settings: Settings) -> torch.Tensor:
        """Latents as sampling moves them of pictures [B, H, W, 3] in [0, 1]."""
        return self.packed(self.scaled(self.mean(2 * pictures.movedim(-1, 1) - 1)), settings)

    @property
    def encoder(self) -> nn.Module:
        """The module whose weights :meth:`encoded` reads, loaded."""
        self._load("vae")
        vae: nn.Module = self.pipeline.vae
        return vae

    def mixes(self, settings: Settings) -> bool:
        """Does the pipeline's sampler begin at any step with ``(1 - sigma) * latents + sigma * noise``?"""
        scheduler = copy.copy(self.scheduled(settings))
        if not hasattr(scheduler, "scale_noise"):
            return False
        sigmas = self.sampling(settings).sigmas[:-1]
        for step, sigma in enumerate(map(float, sigmas)):
            scheduler.set_begin_index(step)
            found = scheduler.scale_noise(torch.tensor([2.0]), scheduler.timesteps[step : step + 1].cpu(), torch.tensor([-1.0]))
            if not abs(float(found) - (2.0 * (1 - sigma) - sigma)) <= SAME:
                return False
        return True

    @torch.no_grad()
    def encode_pictures(self, pictures: Array, settings: Settings) -> Array:
        """The twin's own latents of pictures [B, H, W, 3], float32 in [0, 1], without noise.

        The twin draws from what the autoencoder says of a picture: here it is told the likeliest.
        """
        vae: Any = self.encoder
        kind = getattr(diffusers, self.TWIN)
        known = inspect.signature(kind.__init__).parameters
        twin = kind(**{name: part for name, part in self.pipeline.components.items() if name in known})
        image = twin.image_processor.preprocess(pictures, height=settings.height, width=settings.width)
        twin.vae, twin.scheduler = _Certain(vae), _Quiet()
        given = {
            "image": image,
            "timestep": None,
            "batch_size": len(pictures),
            "num_images_per_prompt": 1,
            "num_channels_latents": vae.config.get("latent_channels") or vae.config.z_dim,
            "height": settings.height,
            "width": settings.width,
            "dtype": image.dtype,
            "device": image.device,
            "generator": torch.Generator().manual_seed(0),
        }
        taken = inspect.signature(twin.prepare_latents).parameters
        made: Any = twin.prepare_latents(**{name: value for name, value in given.items() if name in taken})
        latents: Array = (made[0] if isinstance(made, tuple) else made).numpy()
        return latents


class _Certain:
    """An autoencoder that says one thing of a picture."""

    def __init__(self, vae: Any) -> None:
        self._vae, self.config, self.dtype = vae, vae.config, vae.dtype

    def encode(self, pictures: torch.Tensor) -> SimpleNamespace:
        return SimpleNamespace(latents=_likeliest(self._vae, pictures))


class _Quiet:
    """A sampler that adds no noise."""

    @staticmethod
    def scale_noise(sample: torch.Tensor, timestep: object, noise: torch.Tensor) -> torch.Tensor:
        return sample


def _likeliest(vae: Any, pictures: torch.Tensor) -> torch.Tensor:
    mean: torch.Tensor = vae.encode(pictures).latent_dist.mode()
    return mean
