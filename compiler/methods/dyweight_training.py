"""Training of DyWeight (arXiv 2603.11607): weights and told times by backpropagation through the closed loop.

Shapes: ``P`` prompts, ``K`` computed steps.
"""

import numpy as np
import torch
from tqdm import tqdm

from cachec.compiler.calibration.calibration import Calibration
from cachec.compiler.tables.schedule import Schedule
from cachec.runtime.errors import InputError
from cachec.runtime.specs import Array

IPNDM = ((1.0,), (-1 / 2, 3 / 2), (5 / 12, -16 / 12, 23 / 12), (-9 / 24, 37 / 24, -59 / 24, 55 / 24))  # oldest first


def first_weights(num: int, window: int) -> Array:
    """``theta`` [K, K] of iPNDM, of as high an order as there are velocities, up to ``window``."""
    theta = np.zeros((num, num))
    for i in range(num):
        row = IPNDM[min(i + 1, window) - 1]
        theta[i, i + 1 - len(row) : i + 1] = row
    return theta


def train_dyweight(
    calibration: Calibration,
    schedule: Schedule,
    *,
    window: int,
    updates: int,
    batch: int,
    rate: float,
    decay: float,
    seed: int = 0,
) -> tuple[Array, Array]:
    """``theta`` [K, K] and the scales of told times [K].

    Raises:
        InputError: the loss is not finite.
    """
    num, device = len(schedule.compute), calibration.evaluator.device
    theta = torch.from_numpy(first_weights(num, window)).float().to(device).requires_grad_()
    phi = torch.zeros(num, device=device, requires_grad=True)
    counts = torch.triu(torch.tril(torch.ones(num, num, device=device)), -(window - 1))
    optimizer = torch.optim.AdamW([theta, phi], lr=rate, weight_decay=decay)
    falling = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, updates)
    generator = torch.Generator().manual_seed(seed)
    batch = min(batch, calibration.num_prompts)
    with tqdm(range(updates), desc="training dyweight", unit="update", disable=None, leave=False) as bar:
        for update in bar:
            index = torch.randperm(calibration.num_prompts, generator=generator)[:batch]
            loss = _loss(calibration.select(index.numpy()), schedule, theta * counts, 0.5 + torch.sigmoid(phi))
            if not torch.isfinite(loss):
                raise InputError(f"dyweight: the loss is not finite at update {update}: lower --set rate ({rate})")
            theta.grad, phi.grad = torch.autograd.grad(loss, [theta, phi])
            optimizer.step()
            falling.step()
            bar.set_postfix_str(f"squared error {loss.item():.3g}")
    weights: Array = (theta * counts).detach().cpu().double().numpy()
    scales: Array = (0.5 + torch.sigmoid(phi)).detach().cpu().double().numpy()
    return weights, scales


def _loss(calibration: Calibration, schedule: Schedule, theta: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """The mean squared error of the final latents."""
    sampling = calibration.sampling

    def there(value: Array) -> torch.Tensor:
        return torch.from_numpy(value).to(theta.device)

    noise, reference = there(calibration.noise()), there(calibration.latents(calibration.num_steps))
    conditions = {name: there(value) for name, value in calibration.all_conditions().items()}
    ends = [*schedule.compute[1:], schedule.num_steps]
    levels, told = (there(value.astype(np.float32)) for value in (sampling.clock[:-1], sampling.timesteps))
    x, moved, velocities = noise, torch.zeros_like(noise), list[torch.Tensor]()
    now = levels[0]
    for i, end in enumerate(ends):
        timestep = scales[i] * _told(now, levels, told)
        besides = {name: there(value) for name, value in sampling.told_besides(schedule.compute[i], len(x)).items()}
        velocities.append(calibration.evaluator.evaluate_with_gradients(x, timestep, {**conditions, **besides})[0])
        move = float(sampling.clock[end]) - now
        moved = moved + move * torch.stack([theta[i, j] * v for j, v in enumerate(velocities)]).sum(0)
        x = float(sampling.shares[end]) * (noise + moved)
        now = now + move * theta[i, : i + 1].sum()
    return (x - reference).square().mean()


def _told(level: torch.Tensor, levels: torch.Tensor, told: torch.Tensor) -> torch.Tensor:
    """What the sampler tells at a level of its clock, between those that it has by a line; held beyond them. Differentiable."""
    level = level.clamp(min=levels[-1].item(), max=levels[0].item())
    place = int((levels[1:-1] >= level.detach()).sum())
    share = (level - levels[place]) / (levels[place + 1] - levels[place])
    return told[place] + share * (told[place + 1] - told[place])
