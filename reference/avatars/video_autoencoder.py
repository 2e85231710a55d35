"""HunyuanVideo's kind of autoencoder: ``python -m reference.avatars.video_autoencoder --out build/reference``.

It begins as the pictures' autoencoder, whose layers it shares by name: each kernel is put at the present frame of a causal one.
Nine frames of 96 x 96 become three of 12 x 12 with 16 channels.
"""

from pathlib import Path

import click
import numpy as np
import torch
from diffusers import AutoencoderKL, AutoencoderKLHunyuanVideo
from torch import Tensor, nn

from reference.avatars import loop
from reference.avatars.autoencoder import Descent, corner, psnr, save_sheet, to_input, to_pictures
from reference.avatars.clips import load
from reference.avatars.motion import CLIP_SIDE, FRAMES
from reference.avatars.networks import LATENT_CHANNELS

CROP = 48
SHOWN = 6


def build_autoencoder() -> AutoencoderKLHunyuanVideo:
    """4.4 M parameters."""
    return AutoencoderKLHunyuanVideo(
        block_out_channels=(12, 24, 48, 96),
        layers_per_block=1,
        norm_num_groups=2,
        latent_channels=LATENT_CHANNELS,
        mid_block_add_attention=False,
    )


@torch.no_grad()
def inflate(video: AutoencoderKLHunyuanVideo, picture: AutoencoderKL) -> None:
    """Give ``video`` the kernels of ``picture`` at the last tap in time, zeros at the others."""
    flat = picture.state_dict()
    for name, parameter in video.named_parameters():
        ours = flat.get(name.replace(".conv.weight", ".weight").replace(".conv.bias", ".bias"), flat.get(name))
        if ours is None:  # the two 1 x 1 x 1 convolutions around the latents
            if parameter.ndim == 1:
                parameter.zero_()
            else:
                nn.init.dirac_(parameter)
        elif parameter.ndim == 5:
            parameter.zero_()
            parameter[:, :, -1] = ours
        else:
            parameter.copy_(ours)


def to_video(frames: np.ndarray) -> Tensor:
    """uint8 [B, F, S, S, 3] to [B, 3, F, S, S] in [-1, 1]."""
    flat = to_input(frames.reshape(-1, *frames.shape[2:]))
    return flat.view(len(frames), -1, *flat.shape[1:]).transpose(1, 2).contiguous()


def to_frames(decoded: Tensor) -> np.ndarray:
    """[B, 3, F, S, S] in [-1, 1] to uint8 [B, F, S, S, 3]."""
    flat = to_pictures(decoded.transpose(1, 2).flatten(0, 1))
    return flat.reshape(len(decoded), -1, *flat.shape[1:])


def begun(out: Path, begin: Path | None) -> AutoencoderKLHunyuanVideo:
    """One to go on with: that of ``begin``, or the pictures' own in OUT/vae, inflated."""
    if begin is not None:
        trained: AutoencoderKLHunyuanVideo = AutoencoderKLHunyuanVideo.from_pretrained(begin).float()
        return trained
    vae = build_autoencoder()
    inflate(vae, AutoencoderKL.from_pretrained(out / "vae"))
    return vae


class Trainer(Descent):
    """Clips, the autoencoder and its optimizers."""

    def __init__(self, clips: np.ndarray, vae: AutoencoderKLHunyuanVideo, steps: int, batch: int) -> None:
        super().__init__(vae, steps)
        self.clips, self.batch = clips, batch

    def update(self, step: int) -> float:
        index = np.sort(torch.randint(len(self.clips), (self.batch,)).numpy())
        top, left = corner(CLIP_SIDE, CROP)
        return self.learn(to_video(self.clips[index, :, top : top + CROP, left : left + CROP]))


@click.command()
@loop.options
@click.option("--steps", default=5000, show_default=True)
@click.option("--batch", default=2, show_default=True)
@click.option("--begin", type=click.Path(path_type=Path, exists=True), help="A trained one to go on with.")
def main(out: Path, steps: int, batch: int, begin: Path | None, threads: int) -> None:
    """Train on the clips and write it to OUT/vae-video."""
    torch.set_num_threads(threads)
    torch.manual_seed(7)
    clips = load("clips", out)[0]
    trainer = Trainer(clips, begun(out, begin), steps, batch)
    shown = load("held-out-clips", out)[0][:SHOWN]

    @torch.no_grad()
    def watch(step: int) -> dict[str, float]:
        found = to_frames(trainer.vae.decode(trainer.vae.encode(to_video(shown)).latent_dist.mode()).sample)
        pairs = np.stack([shown, found], 1).reshape(-1, CLIP_SIDE, CLIP_SIDE, 3)
        save_sheet(pairs, out / "vae-video.png", columns=FRAMES)
        return {"held_out_psnr": psnr(found, shown)}

    training = loop.Training("autoencoder-video", out, steps, trainer.parts, trainer.update, watch, seed=7)
    if not training.run() and (out / "vae-video").exists():
        return
    with torch.no_grad():
        z = trainer.vae.encode(to_video(clips[:32])).latent_dist.mode()
    # This class has no shift: the last of the encoder's layers and the first of the decoder's take it.
    trainer.vae.quant_conv.bias.data[:LATENT_CHANNELS] -= z.mean()
    trainer.vae.post_quant_conv.bias.data += trainer.vae.post_quant_conv.weight.data.sum((1, 2, 3, 4)) * z.mean()
    trainer.vae.register_to_config(scaling_factor=1 / z.std().item())
    loop.replace_network(trainer.vae, out / "vae-video")


if __name__ == "__main__":
    main()
