"""Train the transformer of tiny-flux: ``python -m reference.train_transformer --out reference/build``.

Two stages, as FLUX.1-dev was made. First plain rectified flow with the guidance input at 1 and a tenth of the captions
dropped. Then guidance distillation: the target is the first stage's own classifier-free guided velocity at a random
guidance scale, and that scale is the input; so the guidance embedding does what it does in FLUX.1-dev.

Resumable: a checkpoint is replaced atomically every ``--save-every`` steps, and a rerun goes on from it.
"""

import json
import os
import time
from pathlib import Path

import click
import numpy as np
import torch
from diffusers import AutoencoderKL, FluxTransformer2DModel
from tqdm import tqdm

from reference.dataset import draw, scenes, vocabulary
from reference.networks import build_transformer, image_ids, pack, to_tensor
from reference.text import T5_TOKENS, build_clip, build_t5, encode

MAX_GUIDANCE = 5.0
EMA_DECAY = 0.999


@torch.no_grad()
def make_latents(out: Path, num: int, seed: int) -> dict[str, torch.Tensor]:
    """Latents and text features of ``num`` training pictures, computed once and kept on disk; the empty caption is last."""
    path = out / "latents.pt"
    if path.exists():
        return torch.load(path)
    vae = AutoencoderKL.from_pretrained(out / "vae")
    words = vocabulary()
    clip, t5 = build_clip(words), build_t5(words)
    stream, rng = scenes(seed, held_out=False), np.random.default_rng(seed + 1)
    parts: dict[str, list[torch.Tensor]] = {"x": [], "text": [], "pooled": []}
    for _ in tqdm(range(num // 128), desc="latents", mininterval=5):
        batch = [next(stream) for _ in range(128)]
        z = vae.encode(to_tensor([draw(scene, rng) for scene in batch])).latent_dist.mode()
        text, pooled = encode([scene.caption() for scene in batch], clip, t5)
        parts["x"].append(pack((z - vae.config.shift_factor) * vae.config.scaling_factor).half())
        parts["text"].append(text.half())
        parts["pooled"].append(pooled.half())
    text, pooled = encode([""], clip, t5)
    parts["text"].append(text.half())
    parts["pooled"].append(pooled.half())
    data = {name: torch.cat(tensors) for name, tensors in parts.items()}
    torch.save(data, path)
    return data


def make_optimizers(model: torch.nn.Module) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside the blocks, AdamW for everything else."""
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and "transformer_blocks" in n]
    ids = {id(p) for p in matrices}
    others = [p for p in model.parameters() if id(p) not in ids]
    return [
        torch.optim.Muon(matrices, lr=1.5e-3, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=1.5e-3, betas=(0.9, 0.98), weight_decay=0.0),
    ]


def learning_rate(step: int, steps: int) -> float:
    """Factor: linear warm-up over 100 steps, flat, linear to zero over the last 40 %."""
    return min(1.0, (step + 1) / 100, max(0.0, (steps - step) / (0.4 * steps)))


def sample_sigma(num: int) -> torch.Tensor:
    """Logit-normal noise levels [num, 1, 1], leaning to the noisy side where layout is decided."""
    return torch.sigmoid(torch.randn(num, 1, 1) * 1.1 + 0.5)


class Trainer:
    """The model, its running average, and the two losses."""

    def __init__(self, data: dict[str, torch.Tensor]) -> None:
        self.data = data
        self.model = build_transformer()
        for block in [*self.model.transformer_blocks, *self.model.single_transformer_blocks]:
            for name, module in block.named_modules():
                if name in ("norm.linear", "norm1.linear", "norm1_context.linear"):  # AdaLN-zero, as in DiT
                    torch.nn.init.zeros_(module.weight)
                    torch.nn.init.zeros_(module.bias)
        torch.nn.init.zeros_(self.model.proj_out.weight)
        self.average = build_transformer().requires_grad_(False)
        self.average.load_state_dict(self.model.state_dict())
        self.optimizers = make_optimizers(self.model)
        self.ids = {"txt_ids": torch.zeros(T5_TOKENS, 3), "img_ids": image_ids()}
        self.forward = torch.compile(self.velocity)

    def velocity(self, model: FluxTransformer2DModel, x, sigma, text, pooled, guidance):
        with torch.autocast("cpu", torch.bfloat16):
            return model(
                hidden_states=x,
                timestep=sigma[:, 0, 0],
                guidance=guidance,
                encoder_hidden_states=text,
                pooled_projections=pooled,
                return_dict=False,
                **self.ids,
            )[0].float()

    def batch(self, num: int, drop: float) -> tuple[torch.Tensor, ...]:
        index = torch.randint(len(self.data["x"]), (num,))
        caption = torch.where(torch.rand(num) < drop, torch.tensor(len(self.data["x"])), index)
        x0 = self.data["x"][index].float()
        sigma, noise = sample_sigma(num), torch.randn_like(x0)
        text, pooled = self.data["text"][caption].float(), self.data["pooled"][caption].float()
        return (1 - sigma) * x0 + sigma * noise, sigma, text, pooled, noise - x0

    def flow_loss(self, num: int) -> torch.Tensor:
        x, sigma, text, pooled, target = self.batch(num, drop=0.1)
        return (self.forward(self.model, x, sigma, text, pooled, torch.ones(num)) - target).square().mean()

    def distillation_loss(self, teacher: FluxTransformer2DModel, num: int) -> torch.Tensor:
        x, sigma, text, pooled, target = self.batch(num, drop=0.0)
        guidance = 1 + (MAX_GUIDANCE - 1) * torch.rand(num)
        empty = [self.data[name][-1:].float().expand(num, *self.data[name].shape[1:]) for name in ("text", "pooled")]
        with torch.no_grad():
            both = self.forward(
                teacher,
                torch.cat([x, x]),
                torch.cat([sigma, sigma]),
                torch.cat([text, empty[0]]),
                torch.cat([pooled, empty[1]]),
                torch.ones(2 * num),
            )
            conditional, unconditional = both.chunk(2)
            # The true target on top of the teacher's extrapolation: unbiased, and not bounded by the teacher's errors.
            wanted = target + (guidance[:, None, None] - 1) * (conditional - unconditional)
        return (self.forward(self.model, x, sigma, text, pooled, guidance) - wanted).square().mean()

    def update(self, step: int, steps: int) -> None:
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = 1.5e-3 * learning_rate(step, steps)
            optimizer.step()
            optimizer.zero_grad()
        decay = min(EMA_DECAY, (step + 1) / (step + 10))
        for average, parameter in zip(self.average.parameters(), self.model.parameters(), strict=True):
            average.lerp_(parameter.detach(), 1 - decay)

    def state(self) -> dict:
        return {
            "model": self.model.state_dict(),
            "average": self.average.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
        }

    def load(self, state: dict) -> None:
        self.model.load_state_dict(state["model"])
        self.average.load_state_dict(state["average"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)


def save(path: Path, state: dict) -> None:
    torch.save(state, path.with_suffix(".partial"))
    os.replace(path.with_suffix(".partial"), path)


@click.command()
@click.option("--out", type=click.Path(path_type=Path), required=True)
@click.option("--pictures", default=40960)
@click.option("--steps", default=3500, help="Updates in all, both stages.")
@click.option("--distill-steps", default=200, help="How many of them distil guidance.")
@click.option("--batch", default=64)
@click.option("--seed", default=2)
@click.option("--save-every", default=250)
def main(out: Path, pictures: int, steps: int, distill_steps: int, batch: int, seed: int, save_every: int) -> None:
    data = make_latents(out, pictures, seed)
    trainer, path, log = Trainer(data), out / "transformer.pt", out / "loss.jsonl"
    done, teacher = 0, None
    if path.exists():
        saved = torch.load(path)
        trainer.load(saved)
        done = saved["step"]
    torch.manual_seed(seed + done)
    start, losses = time.time(), []
    for step in range(done, steps):
        if step >= steps - distill_steps:
            if teacher is None:
                teacher = build_transformer().requires_grad_(False)
                stage_one = out / "stage1.pt"
                if not stage_one.exists():
                    save(stage_one, trainer.average.state_dict())
                teacher.load_state_dict(torch.load(stage_one))
            loss = trainer.distillation_loss(teacher, batch)
        else:
            loss = trainer.flow_loss(batch)
        loss.backward()
        trainer.update(step, steps)
        losses.append(loss.item())
        if step % 50 == 49:
            line = {
                "step": step + 1,
                "samples": (step + 1) * batch,
                "loss": float(np.mean(losses)),
                "seconds": time.time() - start,
            }
            losses.clear()
            print(line, flush=True)
            with log.open("a") as file:
                file.write(json.dumps(line) + "\n")
        if step % save_every == save_every - 1 or step == steps - 1:
            save(path, {**trainer.state(), "step": step + 1})


if __name__ == "__main__":
    main()
