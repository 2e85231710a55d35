"""The autoencoder of the avatars, 128 x 128 RGB to 16 channels at 16 x 16: ``python -m reference.avatars.autoencoder``.

L1 on pixels and on their differences, a light KL term; Muon for the kernels; nine updates in ten on crops.
"""

from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from diffusers import AutoencoderKL
from PIL import Image
from torch import nn

from reference.avatars import loop
from reference.avatars.dataset import read
from reference.avatars.muon import Muon
from reference.avatars.networks import LATENT_CHANNELS
from reference.avatars.render import SIDE

CROP = 48
OUTERMOST = ("encoder.conv_in.", "decoder.conv_in.", "decoder.conv_out.")  # not Muon's
CROPPED = 0.9  # share of the updates


def build_autoencoder() -> AutoencoderKL:
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(12, 24, 48, 96),
        layers_per_block=1,
        norm_num_groups=2,  # few: the last norm has 12 channels, and each group loses its mean, which is colour
        latent_channels=LATENT_CHANNELS,
        sample_size=SIDE,
        use_quant_conv=False,
        use_post_quant_conv=False,
        mid_block_add_attention=False,
    )


def edges(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Differences of neighbours, along rows and along columns."""
    return x[..., 1:, :] - x[..., :-1, :], x[..., :, 1:] - x[..., :, :-1]


@torch.no_grad()
def initialise(vae: AutoencoderKL) -> None:
    """Start as an almost linear, almost noiseless network: it learns several times faster than from PyTorch's default."""
    for name, module in vae.named_modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, nonlinearity="linear")
            nn.init.zeros_(module.bias)
            if name.endswith("conv2"):  # the last convolution of a residual block
                nn.init.zeros_(module.weight)
    vae.encoder.conv_out.weight[LATENT_CHANNELS:] = 0
    vae.encoder.conv_out.bias[LATENT_CHANNELS:] = -5  # log variance of the posterior


@torch.no_grad()
def pass_on(vae: AutoencoderKL) -> None:
    """Let the convolutions between residual blocks begin as rotations of each pixel's channels, averaging where they shrink.

    A chain of random ones hands on little but brightness: colours then take thousands of updates.
    """
    initialise(vae)
    for name, module in vae.named_modules():
        if isinstance(module, nn.Conv2d) and "resnets" not in name and name != "decoder.conv_out":
            rotation = nn.init.orthogonal_(torch.empty(module.out_channels, module.in_channels))
            module.weight.zero_()
            if module.stride == (2, 2):
                module.weight[:, :, :2, :2] = rotation[..., None, None] / 4
            else:
                module.weight[:, :, 1, 1] = rotation
    vae.encoder.conv_out.weight[LATENT_CHANNELS:] = 0  # log variance: its bias alone


def to_input(pictures: np.ndarray) -> torch.Tensor:
    """uint8 [B, S, S, 3] to [B, 3, S, S] in [-1, 1]."""
    return torch.from_numpy(np.array(pictures)).permute(0, 3, 1, 2).contiguous().float() / 127.5 - 1


def to_pictures(decoded: torch.Tensor) -> np.ndarray:
    """[B, 3, S, S] in [-1, 1] to uint8 [B, S, S, 3]."""
    bytes_ = ((decoded.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    return bytes_.permute(0, 2, 3, 1).numpy()


def save_sheet(pictures: np.ndarray, path: Path, columns: int = 8) -> None:
    """Pictures [N, S, S, 3] in rows of ``columns``, as PNG."""
    rows = [np.concatenate(list(pictures[i : i + columns]), 1) for i in range(0, len(pictures), columns)]
    Image.fromarray(np.concatenate(rows)).save(path)


def psnr(found: np.ndarray, real: np.ndarray) -> float:
    """Peak signal-to-noise ratio in dB of uint8 [N, ...], mean over N."""
    mse = np.square((found.astype(np.float32) - real) / 255).reshape(len(real), -1).mean(1)
    return float(np.mean(-10 * np.log10(mse)))


class Descent:
    """An autoencoder's optimizers and rates: what all kinds of them share."""

    def __init__(self, vae: nn.Module, steps: int) -> None:
        self.vae, self.steps = vae, steps
        kernels = [p for n, p in vae.named_parameters() if p.ndim >= 4 and not n.startswith(OUTERMOST)]
        ids = {id(p) for p in kernels}
        rest = [p for p in vae.parameters() if id(p) not in ids]
        self.optimizers = (Muon(kernels, lr=3e-3, weight_decay=0.0), torch.optim.Adam(rest, lr=1e-3, betas=(0.9, 0.99)))
        self.schedules = [
            torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1, (step + 1) / 20, (steps - step) / (0.4 * steps)))
            for optimizer in self.optimizers
        ]

    @property
    def parts(self) -> dict[str, Any]:
        """What a checkpoint holds."""
        named = {f"optimizer{i}": optimizer for i, optimizer in enumerate(self.optimizers)}
        return {"vae": self.vae, **named, **{f"schedule{i}": schedule for i, schedule in enumerate(self.schedules)}}

    def down(self, loss: torch.Tensor) -> None:
        """One update."""
        loss.backward()
        nn.utils.clip_grad_norm_(self.vae.parameters(), 1.0)
        for optimizer, schedule in zip(self.optimizers, self.schedules, strict=True):
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()

    def learn(self, x: torch.Tensor) -> float:
        """One update that shows ``x`` again from a sampled posterior. Returns the difference."""
        posterior = self.vae.encode(x).latent_dist
        loss = difference(self.vae.decode(posterior.sample()).sample, x)
        self.down(loss + 1e-5 * posterior.kl().mean() / 64)
        return float(loss.item())


def difference(y: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """L1 of pixels, twice, and of their differences to the next row and column: colours are learnt last."""
    return 2 * (y - x).abs().mean() + sum((a - b).abs().mean() for a, b in zip(edges(y), edges(x), strict=True))


def corner(side: int, crop: int, grid: int = 1) -> tuple[int, int]:
    """Top and left of a random crop on a grid of pixels."""
    top, left = torch.randint((side - crop) // grid + 1, (2,)).tolist()
    return top * grid, left * grid


class Trainer(Descent):
    """Pictures, the autoencoder and its optimizers."""

    def __init__(self, pictures: np.ndarray, steps: int, batch: int) -> None:
        super().__init__(build_autoencoder(), steps)
        pass_on(self.vae)
        self.pictures, self.batch = pictures, batch

    def draw(self, step: int) -> torch.Tensor:
        index = np.sort(torch.randint(len(self.pictures), (self.batch,)).numpy())
        if step >= CROPPED * self.steps:
            return to_input(self.pictures[index[: max(self.batch // 6, 1)]])
        top, left = corner(SIDE, CROP)
        return to_input(self.pictures[index, top : top + CROP, left : left + CROP])

    def update(self, step: int) -> float:
        return self.learn(self.draw(step))


@torch.no_grad()
def reconstruct(vae: AutoencoderKL, pictures: np.ndarray) -> np.ndarray:
    """What the decoder makes of the encoder's means: uint8 [B, S, S, 3]."""
    return to_pictures(vae.decode(vae.encode(to_input(pictures)).latent_dist.mode()).sample)


@click.command()
@loop.options
@click.option("--steps", default=6000, show_default=True)
@click.option("--batch", default=6, show_default=True)
def main(out: Path, steps: int, batch: int, threads: int) -> None:
    """Train the autoencoder and write it to OUT/vae."""
    torch.set_num_threads(threads)
    torch.manual_seed(1)
    trainer = Trainer(read("pictures", out)[0], steps, batch)
    print(f"{sum(p.numel() for p in trainer.vae.parameters()) / 1e6:.2f} M parameters")
    shown = read("held-out", out)[0][:32]

    def watch(step: int) -> dict[str, float]:
        again = reconstruct(trainer.vae, shown)
        pairs = np.stack([shown[:16], again[:16]], 1).reshape(-1, SIDE, SIDE, 3)
        save_sheet(pairs, out / "vae.png")
        return {"held_out_psnr": psnr(again, shown)}

    training = loop.Training("autoencoder", out, steps, trainer.parts, trainer.update, watch, seed=1, watch_seconds=400)
    if not training.run() and (out / "vae").exists():
        return
    with torch.no_grad():
        z = trainer.vae.encode(to_input(read("pictures", out)[0][:256])).latent_dist.mode()
    trainer.vae.register_to_config(scaling_factor=1 / z.std().item(), shift_factor=z.mean().item())
    loop.replace_network(trainer.vae, out / "vae")


if __name__ == "__main__":
    main()
