"""Training of DisCa's predictor (arXiv 2602.05449): squared error, then squared error and a discriminator's opinion.

The released code holds no training. As the paper has it: the frozen model's answer at the current latents is the target;
500 updates by the squared error, 1000 by it plus the hinge loss against a discriminator with spectral norms, which looks at
features of the frozen model at several depths; rates 1e-4 and 1e-2. Where the paper says nothing, this is ours: latents are
those of recorded uncached runs, anchors those of the schedule; what is compared are the latents after the step that the
velocity leads to; AdamW, and Adam without momentum for the discriminator; runs and steps are drawn anew for each update.

Shapes: ``B`` samples of an update, ``L`` tokens, ``D`` channels.
"""

import json
import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.nn.functional import leaky_relu, mse_loss, relu
from tqdm import tqdm

from cachec.compiler.calibration.checkpoints import read_checkpoint, write_checkpoint
from cachec.compiler.methods.base import BlockData
from cachec.compiler.methods.frozen_model import FrozenModel
from cachec.runtime.errors import InputError, PredictorError
from cachec.runtime.specs import Array

if TYPE_CHECKING:
    from cachec.compiler.methods.disca import Disca

log = logging.getLogger(__name__)

EVALUATIONS = 20  # of the held-out error, over a training
HELD_OUT = 4  # runs that it is taken on, at most
SAVE_SECONDS = 60.0
DEPTHS = (1 / 3, 2 / 3, 1.0)  # where the discriminator looks at the model's blocks
HIDDEN = 64  # channels of the discriminator
CLIP = 1.0  # of the gradient's norm


class Discriminator(nn.Module):
    """For each depth a pair of linear maps with spectral norms, token by token: from features [B, L, D] to marks [B, L]."""

    def __init__(self, widths: list[int]) -> None:
        super().__init__()
        norm = torch.nn.utils.parametrizations.spectral_norm
        self.inner = nn.ModuleList(norm(nn.Linear(width, HIDDEN)) for width in widths)
        self.outer = nn.ModuleList(norm(nn.Linear(HIDDEN, 1)) for _ in widths)

    def forward(self, features: list[torch.Tensor]) -> list[torch.Tensor]:
        pairs = zip(features, self.inner, self.outer, strict=True)
        return [outer(leaky_relu(inner(feature.float()), 0.2))[..., 0] for feature, inner, outer in pairs]


def discriminator_loss(real: list[torch.Tensor], fake: list[torch.Tensor]) -> torch.Tensor:
    """Hinge loss: real marks are to be above 1, those of forecasts below -1; the mean over depths."""
    losses = [relu(1 - one).mean() + relu(1 + other).mean() for one, other in zip(real, fake, strict=True)]
    return torch.stack(losses).mean()


@dataclass
class TrainingState:
    """Where a training stands; everything that a checkpoint holds but the tensors. ``curve`` is for plots."""

    update: int = 0
    seconds: float = 0.0
    curve: list[dict[str, float]] = field(default_factory=list)


class DiscaTrainer:
    """Trains one predictor; resumes from ``data.work`` if a checkpoint lies there."""

    def __init__(self, data: BlockData, method: "Disca") -> None:
        self._data, self._method, self.state = data, method, TrainingState()
        self._total = method.updates + method.adversarial
        if method.adversarial and data.sampling.euler is None:
            raise InputError(
                f"the discriminator looks at the latents after a step, and {data.sampling.name} looks back at earlier ones: "
                "train by the squared error alone (--set adversarial=0), or take a sampler of Euler's kind"
            )
        with torch.random.fork_rng():
            torch.manual_seed(data.seed)
            self._model = FrozenModel(data, method.made(data.model))
            widths = self._model.feature_widths(DEPTHS)
            self._discriminator = Discriminator(widths).to(data.device)
        self.predictor = self._model.predictor
        parameters = list(self.predictor.parameters())
        self._optimizer = torch.optim.AdamW(parameters, lr=method.rate)
        own = list(self._discriminator.parameters())
        self._own_optimizer = torch.optim.Adam(own, lr=method.discriminator_rate, betas=(0.0, 0.9))
        self._path, self._saved = data.work / "disca.checkpoint", time.perf_counter()
        if self._path.exists():
            self._load()

    def run(self, *, until: int | None = None) -> dict[str, Array]:
        """All updates, or those before number ``until``. Returns the weights.

        Raises:
            PredictorError: a loss is NaN or infinite; what was saved last is gone on from.
        """
        last, every = self._total if until is None else until, max(1, self._total // EVALUATIONS)
        with tqdm(desc="training disca", unit="update", initial=self.state.update, total=self._total, disable=None) as bar:
            while self.state.update < last:
                start = time.perf_counter()
                if self.state.update % every == 0:
                    self._evaluate()
                self._update()
                self.state.update += 1
                self.state.seconds += time.perf_counter() - start
                bar.update()
                bar.set_postfix_str(f"held-out velocities off by {self.state.curve[-1]['held_out']:.4f}")
                if time.perf_counter() - self._saved > SAVE_SECONDS:
                    self._save()
        if self.state.update == self._total and self.state.curve[-1]["update"] != self._total:
            self._evaluate()
        self._save()
        return {name: value.detach().float().cpu().numpy() for name, value in self.predictor.state_dict().items()}

    def facts(self) -> dict[str, str]:
        """How the training went, for the predictor file."""
        method, state = self._method, self.state
        values = {
            "updates": method.updates,
            "adversarial_updates": method.adversarial,
            "training_seconds": round(state.seconds),
            "held_out_velocity_rel_l2": state.curve[-1]["held_out"],
            "optimizer": f"AdamW {method.rate}, discriminator Adam {method.discriminator_rate}, weight {method.weight}",
            "batch": method.batch,
            "curve": json.dumps(state.curve),
            **self._model.facts,
        }
        return {name: str(value) for name, value in values.items()}

    def _update(self) -> None:
        method, state = self._method, self.state
        generator = torch.Generator().manual_seed(self._data.seed * 1_000_003 + state.update)
        drawn = self._model.draw(method.batch, generator)
        with self._model.computing():
            tokens, target = self._model.answers(drawn)
            made = self._model.forecast(drawn, tokens)
            loss = mse_loss(made.float(), target.float())
            if state.update >= method.updates:
                loss = loss + method.weight * self._opinion(drawn, made, target)
        self._step(self._optimizer, list(self.predictor.parameters()), loss, "predictor")

    def _opinion(self, drawn: Mapping[str, torch.Tensor], made: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """What the discriminator thinks of the forecasts, after it has learned from them."""
        fake = self._model.features(drawn, made, DEPTHS)
        with torch.no_grad():
            real = self._model.features(drawn, target, DEPTHS)
        judged = self._discriminator(real), self._discriminator([one.detach() for one in fake])
        own = list(self._discriminator.parameters())
        self._step(self._own_optimizer, own, discriminator_loss(*judged), "discriminator")
        return -torch.stack([marks.mean() for marks in self._discriminator(fake)]).mean()

    def _step(self, optimizer: torch.optim.Optimizer, own: list[nn.Parameter], loss: torch.Tensor, what: str) -> None:
        gradients = torch.autograd.grad(loss, own, allow_unused=True)  # a last block's text goes nowhere
        norm = torch.stack([gradient.norm() for gradient in gradients if gradient is not None]).norm()
        if not torch.isfinite(loss) or not torch.isfinite(norm):
            rate = "discriminator_rate" if what == "discriminator" else "rate"
            raise PredictorError(
                f"the loss of the {what} is {loss.item():g} at update {self.state.update}, its gradient {norm.item():g}: train "
                f"with a smaller --set {rate}, or by the squared error alone (--set adversarial=0)"
            )
        for parameter, gradient in zip(own, gradients, strict=True):
            parameter.grad = None if gradient is None else gradient * (CLIP / norm.clamp(min=CLIP))
        optimizer.step()
        optimizer.zero_grad()

    @torch.no_grad()
    def _evaluate(self) -> None:
        """The error of forecast velocities on held-out runs, relative, over all forecast steps; added to the curve."""
        off = whole = 0.0
        with self._model.computing():
            for drawn in self._model.held_out(HELD_OUT):
                tokens, target = self._model.answers(drawn)
                made = self._model.forecast(drawn, tokens)
                off += (made.float() - target.float()).square().sum().item()
                whole += target.float().square().sum().item()
        self.state.curve.append({"update": self.state.update, "held_out": (off / whole) ** 0.5})

    def _save(self) -> None:
        write_checkpoint(
            self._path,
            self.state,
            predictor=self.predictor.state_dict(),
            discriminator=self._discriminator.state_dict(),
            optimizer=self._optimizer.state_dict(),
            own_optimizer=self._own_optimizer.state_dict(),
        )
        self._saved = time.perf_counter()

    def _load(self) -> None:
        state, content = read_checkpoint(self._path, self._data.device)
        self.state = TrainingState(**state)
        self.predictor.load_state_dict(content["predictor"])
        self._discriminator.load_state_dict(content["discriminator"])
        self._optimizer.load_state_dict(content["optimizer"])
        self._own_optimizer.load_state_dict(content["own_optimizer"])
        log.info("going on from %s: %d updates done", self._path, self.state.update)
