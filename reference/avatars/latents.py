"""Latents of the training pictures, made when they are first asked for and kept on disk; captions are said anew each time."""

from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL

from reference.avatars.attributes import Look, say
from reference.avatars.autoencoder import to_input
from reference.avatars.dataset import read
from reference.avatars.networks import LATENT_CHANNELS, LATENT_SIDE


class Latents:
    """``pictures`` or ``held-out`` as normalised latents [16, 16, 16], and their looks.

    The cache is ``NAME.f16`` in the folder of the autoencoder and belongs to it: a new autoencoder needs a new cache.
    """

    def __init__(self, name: str, out: Path) -> None:
        self.pictures, described = read(name, out)
        self.looks = [Look(**each["look"]) for each in described]
        self.captions = [str(each["caption"]) for each in described]
        self.vae = AutoencoderKL.from_pretrained(out / "vae").eval().requires_grad_(False)
        path, shape = out / "vae" / f"{name}.f16", (len(self.looks), LATENT_CHANNELS, LATENT_SIDE, LATENT_SIDE)
        missing = int(np.prod(shape)) * 2 - (path.stat().st_size if path.exists() else 0)
        if missing > 0:  # zeros: a picture whose latents are all zero has not been encoded
            with path.open("ab") as file:
                file.truncate(int(np.prod(shape)) * 2)
        self.cache = np.memmap(path, np.float16, "r+", shape=shape)

    def __len__(self) -> int:
        return len(self.looks)

    @torch.no_grad()
    def take(self, index: np.ndarray) -> torch.Tensor:
        """Latents [len(index), 16, 16, 16] in float32, of mean zero and deviation one over the dataset."""
        new = index[~self.cache[index].any((1, 2, 3))]
        if len(new):
            z = self.vae.encode(to_input(self.pictures[new])).latent_dist.mode()
            self.cache[new] = ((z - self.vae.config.shift_factor) * self.vae.config.scaling_factor).half().numpy()
        return torch.from_numpy(self.cache[index].astype(np.float32))

    def say(self, index: np.ndarray, rng: np.random.Generator) -> list[str]:
        """A caption for each, in words chosen anew."""
        return [say(self.looks[i], rng).caption for i in index]

    @torch.no_grad()
    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Pictures [B, 3, 128, 128] in [-1, 1] of normalised latents."""
        return torch.cat([
            self.vae.decode(part / self.vae.config.scaling_factor + self.vae.config.shift_factor).sample
            for part in latents.split(8)
        ])  # fmt: skip
