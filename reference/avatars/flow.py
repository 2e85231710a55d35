"""Rectified flow and guidance distillation, for any of the reference models.

First plain rectified flow with the guidance input at 1 and a tenth of the captions dropped. Then, for models that take a
guidance scale, distillation as FLUX.1-dev had it: the target is the first stage's own classifier-free guided velocity at a
random scale, and that scale is the input. Muon learns the blocks' matrices, AdamW the rest.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor, nn

from reference.avatars.loop import Average, Training, write
from reference.avatars.muon import Muon
from reference.avatars.networks import build_scheduler

MAX_GUIDANCE = 5.0
LEARNING_RATE = 1.5e-3
Condition = dict[str, Tensor]


class Learner(Protocol):
    """What tells one model from another."""

    def build(self) -> nn.Module:
        """The network, initialised."""

    def encode(self, captions: list[str]) -> Condition:
        """What the frozen text encoders make of captions, batch first."""

    def velocity(self, network: nn.Module, x: Tensor, sigma: Tensor, condition: Condition, guidance: Tensor) -> Tensor:
        """What the network says of ``x`` [B, tokens, channels] at noise levels ``sigma`` [B], of ``x``'s shape."""


class Source(Protocol):
    """Where samples come from."""

    def batch(self, num: int) -> tuple[Tensor, list[str]]:
        """``num`` clean samples [num, tokens, channels] and a caption for each."""


def adaptive_norms(network: nn.Module) -> nn.Module:
    """``network``, begun as AdaLN-zero (DiT): blocks as the identity, the last projection at zero."""
    for name, module in network.named_modules():
        last = name.rsplit("blocks.", 1)[-1].split(".", 1)[-1]
        if last in ("norm.linear", "norm1.linear", "norm1_context.linear", "img_mod.1", "txt_mod.1"):
            nn.init.zeros_(module.weight)
            nn.init.zeros_(module.bias)
    nn.init.zeros_(network.proj_out.weight)
    return network


def make_optimizers(network: nn.Module) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside the blocks except the modulations', AdamW for everything else."""
    matrices = [
        p for n, p in network.named_parameters()
        if p.ndim == 2 and "transformer_blocks" in n and not any(word in n for word in ("norm", "_mod."))
    ]  # fmt: skip
    ids = {id(p) for p in matrices}
    others = [p for p in network.parameters() if id(p) not in ids]
    return [
        Muon(matrices, LEARNING_RATE),
        torch.optim.AdamW(others, LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.0),
    ]


def learning_rate(step: int, steps: int) -> float:
    """Factor: linear warm-up over 100 updates, flat, linear to zero over the last 40 %."""
    return min(1.0, (step + 1) / 100, max(0.0, (steps - step) / (0.4 * steps)))


def sample_sigma(num: int) -> Tensor:
    """Logit-normal noise levels [num], leaning to the noisy side where layout is decided."""
    return torch.sigmoid(torch.randn(num) * 1.1 + 0.5)


@dataclass(frozen=True)
class Noised:
    """Samples on their way: ``x`` at ``sigma``, and the velocity that is right on average."""

    x: Tensor
    sigma: Tensor
    target: Tensor

    @classmethod
    def of(cls, clean: Tensor) -> "Noised":
        sigma, noise = sample_sigma(len(clean)), torch.randn_like(clean)
        level = sigma.view(-1, *[1] * (clean.ndim - 1))
        return cls((1 - level) * clean + level * noise, sigma, noise - clean)


@dataclass(frozen=True)
class Plan:
    """What is trained and how long: updates in all, samples an update, updates that distil guidance (they come last)."""

    name: str
    out: Path
    steps: int
    batch: int
    distill_steps: int = 0

    @property
    def stage_one(self) -> Path:
        """Where the network is kept that the last updates learn from."""
        return self.out / f"{self.name}-stage-one.pt"


class Trainer:
    """A learner's network, its average and optimizers, and the two losses."""

    def __init__(self, learner: Learner, source: Source, plan: Plan) -> None:
        self.learner, self.source, self.plan = learner, source, plan
        self.network = learner.build()
        self.average = Average(self.network, learner.build())
        self.optimizers = make_optimizers(self.network)
        self.teacher: nn.Module | None = None

    @property
    def parts(self) -> dict[str, object]:
        """What a checkpoint holds."""
        names = {"network": self.network, "average": self.average.network}
        return {**names, **{f"optimizer{i}": optimizer for i, optimizer in enumerate(self.optimizers)}}

    def flow_loss(self) -> Tensor:
        clean, captions = self.source.batch(self.plan.batch)
        noised = Noised.of(clean)
        kept = torch.rand(len(captions)) >= 0.1
        condition = self.learner.encode([caption if keep else "" for caption, keep in zip(captions, kept, strict=True)])
        ones = torch.ones(len(clean))
        found = self.learner.velocity(self.network, noised.x, noised.sigma, condition, ones)
        return (found - noised.target).square().mean()

    def distillation_loss(self, teacher: nn.Module) -> Tensor:
        clean, captions = self.source.batch(self.plan.batch)
        noised, num = Noised.of(clean), len(clean)
        guidance = 1 + (MAX_GUIDANCE - 1) * torch.rand(num)
        condition, empty = self.learner.encode(captions), self.learner.encode([""] * num)
        with torch.no_grad():
            ones = torch.ones(num)
            told, untold = (self.learner.velocity(teacher, noised.x, noised.sigma, each, ones) for each in (condition, empty))
            # The true target on top of the teacher's extrapolation: unbiased, and not bounded by the teacher's errors.
            wanted = noised.target + (guidance - 1).view(-1, *[1] * (clean.ndim - 1)) * (told - untold)
        found = self.learner.velocity(self.network, noised.x, noised.sigma, condition, guidance)
        return (found - wanted).square().mean()

    def update(self, step: int) -> float:
        """One update; the last ``distill_steps`` distil guidance."""
        loss = self.flow_loss() if step < self.plan.steps - self.plan.distill_steps else self.distillation_loss(self._teacher())
        loss.backward()
        nn.utils.clip_grad_norm_(self.network.parameters(), 1.0)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = LEARNING_RATE * learning_rate(step, self.plan.steps)
            optimizer.step()
            optimizer.zero_grad()
        self.average.update(step)
        return float(loss.item())

    def _teacher(self) -> nn.Module:
        """The average as the first stage left it, kept beside the checkpoint for runs that are resumed."""
        if self.teacher is None:
            self.teacher = self.learner.build().requires_grad_(False).eval()
            if not self.plan.stage_one.exists():
                write(self.plan.stage_one, self.average.network.state_dict())
            self.teacher.load_state_dict(torch.load(self.plan.stage_one, weights_only=True))
        return self.teacher

    @torch.no_grad()
    def held_out_loss(self, clean: Tensor, captions: list[str]) -> float:
        """The average's flow loss on held-out samples, with the same noise each time."""
        state = torch.get_rng_state()
        torch.manual_seed(5)
        noised = Noised.of(clean)
        torch.set_rng_state(state)
        condition, ones = self.learner.encode(captions), torch.ones(len(clean))
        found = self.learner.velocity(self.average.network, noised.x, noised.sigma, condition, ones)
        return float((found - noised.target).square().mean())


def schedule(steps: int, shift: float) -> Tensor:
    """Noise levels [steps + 1] from one to zero, shifted as ``FlowMatchEulerDiscreteScheduler`` does with ``mu = shift``."""
    scheduler = build_scheduler()
    scheduler.set_timesteps(sigmas=np.linspace(1, 1 / steps, steps), mu=shift)
    levels: Tensor = scheduler.sigmas
    return levels


@torch.no_grad()
def sample(
    learner: Learner, network: nn.Module, noise: Tensor, captions: list[str], *, scale: float, steps: int, shift: float
) -> Tensor:
    """Euler's steps with classifier-free guidance (guidance input 1). Returns clean samples of ``noise``'s shape."""
    condition, empty = learner.encode(captions), learner.encode([""] * len(captions))
    x, ones, levels = noise, torch.ones(len(noise)), schedule(steps, shift)
    for now, then in zip(levels[:-1], levels[1:], strict=True):
        sigma = now.expand(len(x))
        told, untold = (learner.velocity(network, x, sigma, each, ones) for each in (condition, empty))
        x = x + (then - now) * (untold + scale * (told - untold))
    return x


@dataclass(frozen=True)
class HeldOut:
    """Clean samples of held-out captions [N, ...], how the first ``shown`` captions are drawn and put on a sheet."""

    clean: Tensor
    captions: list[str]
    shown: int
    shift: float  # mu of the sampler
    save: Callable[[Tensor, Path], None]  # samples, as an image


class Watch:
    """Held-out loss, and a sheet of held-out captions beside the checkpoint: ``NAME-STEP.png``, guidance by two evaluations."""

    def __init__(self, trainer: Trainer, held: HeldOut) -> None:
        self.trainer, self.held = trainer, held
        self.noise = torch.randn(held.shown, *held.clean.shape[1:], generator=torch.Generator().manual_seed(3))

    def __call__(self, step: int) -> dict[str, float]:
        held, plan, network = self.held, self.trainer.plan, self.trainer.average.network
        captions = held.captions[: held.shown]
        drawn = sample(self.trainer.learner, network, self.noise, captions, scale=3.5, steps=20, shift=held.shift)
        held.save(drawn, plan.out / f"{plan.name}-{step:05d}.png")
        return {"held_out_loss": round(self.trainer.held_out_loss(held.clean, held.captions[: len(held.clean)]), 5)}


def train(plan: Plan, learner: Learner, source: Source, held: HeldOut, seed: int) -> None:
    """Go on to ``plan``'s last update; log held-out loss and draw held-out captions every twenty minutes."""
    torch.manual_seed(seed)
    trainer = Trainer(learner, source, plan)
    Training(plan.name, plan.out, plan.steps, trainer.parts, trainer.update, Watch(trainer, held), seed).run()
