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
from reference.avatars.autoencoder import Descent, corner, difference, psnr, save_sheet, to_pictures
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


def to_video(frames: np.ndarray | Tensor) -> Tensor:
    """uint8 [B, F, S, S, 3] to [B, 3, F, S, S] in [-1, 1], where it is."""
    given = frames if isinstance(frames, Tensor) else torch.from_numpy(np.array(frames))
    return given.movedim(-1, 1).contiguous().float() / 127.5 - 1


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

    def __init__(
        self, clips: np.ndarray, vae: AutoencoderKLHunyuanVideo, steps: int, batch: int, *, decoder_only: bool, crop: int = CROP
    ) -> None:
        super().__init__(vae, steps)
        self.batch, self.crop, self.decoder_only = batch, crop, decoder_only
        device = next(vae.parameters()).device
        self.clips = clips if device.type == "cpu" else torch.from_numpy(np.array(clips)).to(device)  # there once for all

    def update(self, step: int) -> float:
        """On crops, a quarter of which begin at either side, if they are smaller: clothes are at the lower one."""
        index = np.sort(torch.randint(len(self.clips), (self.batch,)).numpy())
        crop = self.crop
        top, left = (min(max(place - crop // 2, 0), CLIP_SIDE - crop) for place in corner(CLIP_SIDE + crop, crop))
        x = to_video(self.clips[index, :, top : top + crop, left : left + crop])
        return self.show_again(x) if self.decoder_only else self.learn(x)

    def show_again(self, x: Tensor) -> float:
        """One update of the decoder alone, from the means that the encoder gives. Returns the difference."""
        with torch.no_grad():
            z = self.vae.encode(x).latent_dist.mode()
        loss = difference(self.vae.decode(z).sample, x)
        self.down(loss)
        return float(loss.item())


@click.command()
@loop.options
@click.option("--steps", default=5000, show_default=True)
@click.option("--batch", default=2, show_default=True)
@click.option(
    "--crop",
    type=click.IntRange(8, CLIP_SIDE),
    default=CROP,
    show_default=True,
    help=f"Side of what an update sees, of {CLIP_SIDE} pixels.",
)
@click.option("--device", default="cpu", show_default=True)
@click.option("--begin", type=click.Path(path_type=Path, exists=True), help="A trained one to go on with.")
@click.option("--decoder-only", is_flag=True, help="Leave the latents as they are, and with them what was trained on them.")
def main(
    out: Path, steps: int, batch: int, crop: int, device: str, begin: Path | None, threads: int, *, decoder_only: bool
) -> None:
    """Train on the clips and write it to OUT/vae-video."""
    torch.set_num_threads(threads)
    torch.manual_seed(7)
    if decoder_only and begin is None:
        raise click.UsageError("--decoder-only goes on with a trained one: give --begin")
    clips = load("clips", out)[0]
    trainer = Trainer(clips, begun(out, begin).to(device), steps, batch, decoder_only=decoder_only, crop=crop)
    shown = load("held-out-clips", out)[0][:SHOWN]

    @torch.no_grad()
    def watch(step: int) -> dict[str, float]:
        found = to_frames(trainer.vae.decode(trainer.vae.encode(to_video(shown).to(device)).latent_dist.mode()).sample.cpu())
        pairs = np.stack([shown, found], 1).reshape(-1, CLIP_SIDE, CLIP_SIDE, 3)
        save_sheet(pairs, out / "vae-video.png", columns=FRAMES)
        return {"held_out_psnr": psnr(found, shown)}

    training = loop.Training("autoencoder-video", out, steps, trainer.parts, trainer.update, watch, seed=7)
    if not training.run() and (out / "vae-video").exists():
        return
    if not decoder_only:
        scale(trainer.vae.cpu(), clips[:32])
    loop.replace_network(trainer.vae, out / "vae-video")


@torch.no_grad()
def scale(vae: AutoencoderKLHunyuanVideo, clips: np.ndarray) -> None:
    """Let latents have no mean, and tell their spread."""
    z = vae.encode(to_video(clips)).latent_dist.mode()
    # This class has no shift: the last of the encoder's layers and the first of the decoder's take it.
    vae.quant_conv.bias.data[:LATENT_CHANNELS] -= z.mean()
    vae.post_quant_conv.bias.data += vae.post_quant_conv.weight.data.sum((1, 2, 3, 4)) * z.mean()
    vae.register_to_config(scaling_factor=1 / z.std().item())


if __name__ == "__main__":
    main()
