"""Train the transformer of tiny-hunyuan on clips: ``python -m reference.avatars.tiny_hunyuan --out build/reference``.

HunyuanVideo takes its guidance scale as an input, so guidance is distilled at the end, as it is for tiny-flux.
"""

import math
from pathlib import Path

import click
import numpy as np
import torch
from diffusers import AutoencoderKLHunyuanVideo, HunyuanVideoPipeline, HunyuanVideoTransformer3DModel
from torch import Tensor, nn

from reference.avatars import loop
from reference.avatars.attributes import vocabulary
from reference.avatars.autoencoder import save_sheet
from reference.avatars.clips import load
from reference.avatars.decoder_text import build_llama
from reference.avatars.flow import Condition, HeldOut, Plan, adaptive_norms, train
from reference.avatars.motion import CLIP_SIDE, CLIP_WORDS, FRAMES
from reference.avatars.networks import LATENT_CHANNELS
from reference.avatars.text import WIDTH, build_clip
from reference.avatars.video_autoencoder import to_frames, to_video

LATENT_SHAPE = (LATENT_CHANNELS, 1 + (FRAMES - 1) // 4, CLIP_SIDE // 8, CLIP_SIDE // 8)
CLIP_TOKENS = 77  # the pipeline always pads to it
SHIFT = math.log(3.0)  # the mu of the sampler: log of the shift that its pipeline has
SHOWN = 8


def build_transformer() -> HunyuanVideoTransformer3DModel:
    """HunyuanVideo at width 192: two double and four single blocks, one refiner layer, guidance embedding on."""
    return HunyuanVideoTransformer3DModel(
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        num_attention_heads=4,
        attention_head_dim=48,
        num_layers=2,
        num_single_layers=4,
        num_refiner_layers=1,
        text_embed_dim=WIDTH,
        pooled_projection_dim=WIDTH,
        rope_axes_dim=(16, 16, 16),
    )


class HunyuanLearner:
    """HunyuanVideo at width 192, with its frozen readers."""

    def __init__(self) -> None:
        words = vocabulary()
        (tokenizer, llama), (clip_tokenizer, clip) = build_llama(words), build_clip(words, CLIP_TOKENS)
        self.pipeline = HunyuanVideoPipeline(
            text_encoder=llama,
            tokenizer=tokenizer,
            transformer=None,
            vae=None,
            scheduler=None,
            text_encoder_2=clip,
            tokenizer_2=clip_tokenizer,
        )

    def build(self) -> nn.Module:
        return adaptive_norms(build_transformer())

    @torch.no_grad()
    def encode(self, captions: list[str]) -> Condition:
        states, pooled, mask = self.pipeline.encode_prompt(captions, max_sequence_length=CLIP_WORDS)
        return {"encoder_hidden_states": states, "pooled_projections": pooled, "encoder_attention_mask": mask}

    def velocity(self, network: nn.Module, x: Tensor, sigma: Tensor, condition: Condition, guidance: Tensor) -> Tensor:
        thousands = {"timestep": 1000 * sigma, "guidance": 1000 * guidance}  # as the pipeline hands them over
        found: Tensor = network(hidden_states=x, return_dict=False, **thousands, **condition)[0]
        return found


class ClipLatents:
    """Latents [16, 3, 12, 12] of the clips, encoded once and kept beside the autoencoder, and captions worded anew."""

    def __init__(self, name: str, out: Path) -> None:
        frames, self.clips, self.captions = load(name, out)
        self.vae = AutoencoderKLHunyuanVideo.from_pretrained(out / "vae-video").eval().requires_grad_(False)
        path = out / "vae-video" / f"{name}.pt"
        if not path.exists():
            loop.write(path, torch.cat([self._encode(frames[i : i + 16]) for i in range(0, len(frames), 16)]))
        self.latents = torch.load(path, weights_only=True)

    @torch.no_grad()
    def _encode(self, frames: np.ndarray) -> Tensor:
        z: Tensor = self.vae.encode(to_video(frames)).latent_dist.mode()
        return (z * self.vae.config.scaling_factor).half()

    @torch.no_grad()
    def decode(self, latents: Tensor) -> np.ndarray:
        """Frames, uint8 [B, 9, 96, 96, 3]."""
        return to_frames(torch.cat([self.vae.decode(z[None] / self.vae.config.scaling_factor).sample for z in latents]))

    def batch(self, num: int) -> tuple[Tensor, list[str]]:
        index = torch.randint(len(self.latents), (num,))
        rng = np.random.default_rng(int(torch.randint(2**31, ())))
        return self.latents[index].float(), [self.clips[i].caption(rng) for i in index.tolist()]


def held_out(out: Path) -> HeldOut:
    """The first held-out clips; on the sheet each is a row of frames."""
    held = ClipLatents("held-out-clips", out)

    def save(latents: Tensor, path: Path) -> None:
        save_sheet(held.decode(latents).reshape(-1, CLIP_SIDE, CLIP_SIDE, 3), path, columns=FRAMES)

    return HeldOut(held.latents[:64].float(), held.captions, SHOWN, SHIFT, save)


@click.command()
@loop.options
@click.option("--steps", default=1700, show_default=True, help="Updates in all, both stages.")
@click.option("--distill-steps", default=200, show_default=True, help="How many of them distil guidance.")
@click.option("--batch", default=32, show_default=True)
def main(out: Path, steps: int, distill_steps: int, batch: int, threads: int) -> None:
    """Train on the clips' latents; log held-out loss and draw held-out captions every twenty minutes."""
    torch.set_num_threads(threads)
    plan = Plan("tiny-hunyuan", out, steps, batch, distill_steps)
    train(plan, HunyuanLearner(), ClipLatents("clips", out), held_out(out), seed=8)


if __name__ == "__main__":
    main()
