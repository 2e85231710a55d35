"""Training of output-cut rows by backpropagation through the closed loop: BNS (arXiv 2403.01329).

Shapes: ``P`` prompts, ``K`` computed steps.
"""

import numpy as np
import torch
from tqdm import tqdm

from cachec.compiler.calibration.calibration import Calibration
from cachec.compiler.methods.gram_fit import node_timesteps
from cachec.compiler.tables.samplers import adams_bashforth
from cachec.compiler.tables.schedule import Schedule
from cachec.runtime.errors import InputError
from cachec.runtime.specs import Array


def train_rows(calibration: Calibration, schedule: Schedule, *, updates: int, batch: int, rate: float, seed: int = 0) -> Array:
    """Rows [K, K] by Adam from Adams-Bashforth 2; the loss is the mean log squared error of the final latents.

    Raises:
        InputError: the loss is not finite.
    """
    nodes = calibration.sampling.clock[[*schedule.compute, schedule.num_steps]]
    device = calibration.evaluator.device
    rows = torch.from_numpy(adams_bashforth(nodes, 2)).float().to(device).requires_grad_()
    timesteps = torch.from_numpy(node_timesteps(calibration, schedule)).float().to(device)
    optimizer = torch.optim.Adam([rows], lr=rate)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, updates)
    generator = torch.Generator().manual_seed(seed)
    batch = min(batch, calibration.num_prompts)
    with tqdm(range(updates), desc="training bns", unit="update", disable=None, leave=False) as bar:
        for update in bar:
            index = torch.randperm(calibration.num_prompts, generator=generator)[:batch]
            loss = _loss(calibration.select(index.numpy()), schedule, rows, timesteps)
            if not torch.isfinite(loss):
                raise InputError(f"bns: the loss is not finite at update {update}: lower --set rate ({rate})")
            (rows.grad,) = torch.autograd.grad(loss, [rows])  # the model's parameters gather none
            optimizer.step()
            decay.step()
            bar.set_postfix_str(f"{-10 * loss.item() / np.log(10):.2f} dB")
    result: Array = rows.detach().cpu().double().tril().numpy()
    return result


def _loss(calibration: Calibration, schedule: Schedule, rows: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
    def there(value: Array) -> torch.Tensor:
        return torch.from_numpy(value).to(rows.device)

    noise, reference = there(calibration.noise()), there(calibration.latents(calibration.num_steps))
    conditions = {name: there(value) for name, value in calibration.all_conditions().items()}
    x, velocities = noise, []
    shares = [float(calibration.sampling.shares[node]) for node in (*schedule.compute[1:], schedule.num_steps)]
    for i, timestep in enumerate(timesteps):
        besides = {name: there(value) for name, value in calibration.sampling.told_besides(schedule.compute[i], len(x)).items()}
        velocities.append(calibration.evaluator.evaluate_with_gradients(x, timestep, {**conditions, **besides})[0])
        moved = torch.stack([weight * v for weight, v in zip(rows[i], velocities, strict=False)]).sum(0)
        x = shares[i] * (noise + moved)
    error = (x - reference).flatten(1).square().mean(dim=1)
    return torch.log(error / reference.flatten(1).square().mean(dim=1)).mean()
