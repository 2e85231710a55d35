"""Training of LinCa's networks (arXiv 2608.17973), teacher-forced: forecasts of true features from true ones.

An update takes random steps of one segment, each with the last three steps that a random interval would have computed. Loss:
squared error of the feature, plus ``LAMBDA`` times that of its code, over the distance to the last computed step, all relative
to the mean square of the features. AdamW, cosine to a hundredth, clipped; the weights that do best on held-out prompts stay.

Shapes: ``P`` prompts, ``T`` steps, ``N`` tokens, ``D`` channels, ``b`` forecasts of an update.
"""

import json
import logging
from typing import TYPE_CHECKING

import numpy as np
import torch
from tqdm import tqdm

from cachec.compiler.calibration.runs import features_of
from cachec.compiler.methods.base import TrainingData
from cachec.compiler.methods.hicache import hermite_rows
from cachec.compiler.methods.linca_net import InvertibleNet
from cachec.compiler.tables.schedule import interval_schedule
from cachec.runtime.errors import InputError
from cachec.runtime.specs import Array

if TYPE_CHECKING:
    from cachec.compiler.methods.linca import LinCa

log = logging.getLogger(__name__)

INTERVALS = range(3, 13)
BATCH, LAMBDA, WEIGHT_DECAY, CLIP = 16, 0.1, 1e-5, 1.0
CHECKS = 10  # on held-out prompts
Example = tuple[int, list[int], Array]  # a step, those that it is forecast from, and weights [3, of them] by order


def train_linca(data: TrainingData, method: "LinCa") -> tuple[dict[str, Array], dict[str, str]]:
    """All segments' networks, by released names behind ``segment0.`` …, and facts.

    Raises:
        InputError: the loss is not finite, or the channels or steps cannot be parted so.
    """
    train, held_out = features_of(data.train), features_of(data.held_out)
    split, num = method.split(train.shape[-1]), data.schedule.num_steps
    if method.segments > num:
        raise InputError(f"segments is {method.segments}, and a run has {num} steps")
    lengths = [len(part) for part in np.array_split(np.arange(num), method.segments)]
    arrays, losses, end = dict[str, Array](), list[str](), 0
    for number, length in enumerate(lengths):
        end += length
        examples = _examples(num, range(end - length, end))
        net, before, best = _train_one(train, held_out, examples, split, method, data, number)
        losses.append(f"{before:.4g} to {best:.4g}")
        arrays |= {f"segment{number}.net.{name}": value.cpu().numpy() for name, value in net.state_dict().items()}
    facts = {"split": json.dumps(list(split)), "segments": json.dumps(lengths), "held_out_loss": ", ".join(losses)}
    return arrays, facts


def _examples(num_steps: int, steps: range) -> list[Example]:
    """Every forecast of these steps under any of the intervals."""
    from cachec.compiler.methods.linca import SIGMA

    found = []
    for interval in INTERVALS:
        schedule = interval_schedule(num_steps, interval)
        rows = np.stack([hermite_rows(schedule, order, SIGMA, warmup=0) for order in range(3)])
        for step in set(schedule.forecast) & set(steps):
            sources = [place for place, computed in enumerate(schedule.compute) if computed < step][-3:]
            found.append((step, [schedule.compute[place] for place in sources], rows[:, step, sources]))
    return found


def _train_one(
    train: Array,
    held_out: Array,
    examples: list[Example],
    split: tuple[int, ...],
    method: "LinCa",
    data: TrainingData,
    number: int,
) -> tuple[InvertibleNet, float, float]:
    """A segment's network, and its loss on held-out prompts before and after."""
    torch.manual_seed(data.seed + number)
    generator, device = np.random.default_rng(data.seed + number), data.evaluator.device
    net = InvertibleNet(train.shape[-1], method.blocks, method.hidden).to(device)
    if not examples:  # every step of it is computed
        return net, 0.0, 0.0
    scale = float(np.square(train, dtype=np.float64).mean())
    optimizer = torch.optim.AdamW(net.parameters(), lr=method.rate, weight_decay=WEIGHT_DECAY)
    falling = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, method.updates, eta_min=method.rate / 100)
    some = [examples[place] for place in np.random.default_rng(0).permutation(len(examples))[: 4 * BATCH]]
    before = best = _held_out(net, held_out, some, split, scale)
    kept = {name: value.clone() for name, value in net.state_dict().items()}
    every = max(1, method.updates // CHECKS)
    with tqdm(
        range(1, method.updates + 1), desc=f"training linca {number + 1}", unit="update", disable=None, leave=False
    ) as bar:
        for update in bar:
            chosen = [examples[place] for place in generator.integers(len(examples), size=BATCH)]
            loss = _loss(net, train, generator.integers(len(train), size=BATCH), chosen, split, scale)
            if not torch.isfinite(loss):
                raise InputError(f"linca: the loss is not finite at update {update}: lower --set rate ({method.rate})")
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            torch.nn.utils.clip_grad_norm_(net.parameters(), CLIP)
            optimizer.step()
            falling.step()
            if update % every == 0 and (now := _held_out(net, held_out, some, split, scale)) < best:
                best, kept = now, {name: value.clone() for name, value in net.state_dict().items()}
    net.load_state_dict(kept)
    return net, before, best


@torch.no_grad()
def _held_out(net: InvertibleNet, features: Array, examples: list[Example], split: tuple[int, ...], scale: float) -> float:
    starts = range(0, len(examples), BATCH)
    prompts = np.arange(len(examples)) % len(features)
    losses = [_loss(net, features, prompts[i : i + BATCH], examples[i : i + BATCH], split, scale).item() for i in starts]
    return float(np.mean(losses))


def _loss(
    net: InvertibleNet, features: Array, prompts: Array, examples: list[Example], split: tuple[int, ...], scale: float
) -> torch.Tensor:
    device = next(net.parameters()).device
    there = [features[prompt, [*sources, step]] for prompt, (step, sources, _) in zip(prompts, examples, strict=True)]
    known = torch.from_numpy(np.concatenate(there)).to(device)
    codes, lengths = net(known), [len(one) for one in there]
    forecasts = []
    for (_, _, weights), code in zip(examples, torch.split(codes, lengths), strict=True):
        rows, parts = torch.from_numpy(weights.astype(np.float32)).to(device), torch.split(code[:-1], list(split), -1)
        forecasts.append(torch.cat([torch.tensordot(row, part, 1) for row, part in zip(rows, parts, strict=True)], -1))
    forecast, true = torch.stack(forecasts), np.cumsum(lengths) - 1
    off, of_code = net.inverse(forecast) - known[true], forecast - codes[true]
    errors = off.square().mean(dim=(1, 2)) + LAMBDA * of_code.square().mean(dim=(1, 2))
    distances = torch.tensor([step - sources[-1] for step, sources, _ in examples], device=device)
    loss: torch.Tensor = (errors / distances).mean() / scale
    return loss
