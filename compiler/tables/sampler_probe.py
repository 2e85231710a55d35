"""What a pipeline's own scheduler does, as rows of numbers: it is run on basis vectors, and nothing is assumed of it.

A sampler that draws no noise, clips nothing and evaluates the model once a step is linear in the latents that it begins with
and in the model's outputs. Unit responses of its ``step`` then say all; that they do is checked on a random run.

Shapes: latents [B, …]; ``T`` steps.
"""

import copy
import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from cachec.runtime.errors import InputError, in_one_line, shortened
from cachec.runtime.specs import Array

if TYPE_CHECKING:
    import torch

CLIPPING = ("thresholding", "clip_sample")  # options of diffusers' schedulers
NOISE = {"stochastic_sampling": False, "eta": 0, "algorithm_type": "dpmsolver++"}  # options that draw it, and what does not
INSTEAD = "DPMSolverMultistepScheduler and UniPCMultistepScheduler fit flows and diffusion"
TRIAL = 4  # steps that tell what a scheduler is like
TOLERANCE = 1e-6  # of the size of what is added up
ROUNDING = 2**-24  # more of it at every step, where many schedulers round the latents to float32
GIVEN = ("model_output", "timestep", "sample")


@dataclass(frozen=True, eq=False)
class Sampler:
    """A scheduler over one run, all float64.

    After step ``i`` the latents are ``rows[i, 0] * start + sum_{j <= i} rows[i, 1 + j] * output_j``: ``rows`` [T, 1 + T].
    ``start`` is what the first step begins with: text to image begins with ``noise_scale`` times unit noise. At step ``i`` the
    model is given ``input_scale[i]`` times the latents and told ``timesteps[i]``, both [T]; pipelines may still divide the
    latter. ``sigmas`` [T + 1] noise levels as the scheduler lists them, ``None`` where it lists none (DDIM); ``levels`` [T + 1]
    the noise's part of the latents, sigma / (alpha + sigma), ``None`` where neither its list nor its alphas tell.

    Of Euler's kind, that is Euler in (alpha, sigma), are samplers whose every step is ``carry[i] * latents +
    gain[i] * output_i``: ``carry`` and ``gain`` [T], both ``None`` for the others. Flow Euler has a carry of 1.
    """

    name: str
    rows: Array
    timesteps: Array
    input_scale: Array
    noise_scale: float
    sigmas: Array | None
    levels: Array | None
    carry: Array | None
    gain: Array | None

    @property
    def is_euler(self) -> bool:
        """Does each step need the newest output only?"""
        return self.carry is not None


def probe_sampler(scheduler: Any) -> Sampler:
    """Rows of a diffusers scheduler whose timesteps are set, over the run that it would begin now; it is left as it is.

    With a begin index the steps before it are left out.

    Raises:
        InputError: it is no scheduler, its timesteps are not set, or it is in the middle of a run; it draws noise, clips,
            evaluates the model more than once a step, wants more than outputs and latents, or is not linear.
    """
    import torch

    check_options(scheduler)
    first = _first_step(scheduler)
    num = len(scheduler.timesteps) - first
    basis = torch.eye(num + 1, dtype=torch.float64)[:, None, None, None]  # solvers want a batch and channels
    random = torch.randn(num + 1, 2, 3, 2, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    response = _play(scheduler, first, basis, seed=0).flatten(2).numpy()  # [2, T, 1 + T]
    rows, inputs = response
    if not np.isfinite(response).all():
        step = int(np.flatnonzero(~np.isfinite(response).all(axis=(0, 2)))[0])
        raise InputError(f"{_name(scheduler)} is not finite at step {step} of {num}: it divides by an alpha or sigma of 0 "
                         f"(prediction_type, rescale_betas_zero_snr, final_sigmas_type); {INSTEAD}")  # fmt: skip
    run = _play(scheduler, first, random, seed=0)
    if not torch.equal(run, _play(scheduler, first, random, seed=1)):
        raise InputError(_draws_noise(scheduler))
    before = np.vstack([np.eye(1, num + 1), rows[:-1]])  # the latents that each step begins with
    scale = (inputs * before).sum(axis=1) / (before**2).sum(axis=1)
    _check_linear(scheduler, random.flatten(1).numpy(), run.flatten(2).numpy(), rows, scale[:, None] * before)
    carry, gain = euler_of(before, rows) or (None, None)
    return Sampler(
        name=_name(scheduler),
        rows=rows,
        timesteps=_numbers(scheduler.timesteps[first:]),
        input_scale=scale,
        noise_scale=float(getattr(scheduler, "init_noise_sigma", 1.0)),
        sigmas=_sigmas(scheduler, first, num),
        levels=_levels(scheduler, first, num),
        carry=carry,
        gain=gain,
    )


def check_sampler(scheduler: Any) -> None:
    """Refuse a scheduler whose runs cannot be told by rows, by a few steps of a copy; whether its timesteps are set or not.

    Raises:
        InputError: see ``probe_sampler``.
    """
    check_options(scheduler)
    trial = copy.deepcopy(scheduler)
    shift = {"mu": 1.0} if _config(scheduler).get("use_dynamic_shifting") else {}
    trial.set_timesteps(TRIAL, **shift)
    probe_sampler(trial)


def check_options(scheduler: Any) -> None:
    """Refuse what a scheduler's class and options already tell, before its timesteps are set.

    Raises:
        InputError: it has no ``step`` or one that wants more than outputs and latents, it clips, or it evaluates the model
            more than once a step.
    """
    step = getattr(scheduler, "step", None)
    if step is None:
        raise InputError(f"{_name(scheduler)} has no step(), so it is not a sampler of one evaluation a step; {INSTEAD}")
    asked = inspect.signature(step).parameters.values()
    named = [one for one in asked if one.kind not in (one.VAR_POSITIONAL, one.VAR_KEYWORD)]
    if extra := [one.name for one in named if one.default is one.empty and one.name not in GIVEN]:
        raise InputError(f"{_name(scheduler)} wants {', '.join(extra)} at every step, not the model's output and the latents "
                         f"alone; {INSTEAD}")  # fmt: skip
    for option in CLIPPING:
        if _config(scheduler).get(option):
            raise InputError(f"{_name(scheduler)} has {option} on, which is not linear in the model's outputs: switch it off, "
                             f"{option}=False")  # fmt: skip
    if (order := getattr(scheduler, "order", 1)) != 1:
        raise InputError(f"{_name(scheduler)} evaluates the model {order} times a step, and cachec takes one evaluation "
                         f"a step; {INSTEAD}")  # fmt: skip


def _first_step(scheduler: Any) -> int:
    """The step at which the scheduler would begin."""
    name, timesteps = _name(scheduler), getattr(scheduler, "timesteps", None)
    steps = getattr(scheduler, "num_inference_steps", 0)  # some never say
    if timesteps is None or steps is None or not len(timesteps):
        raise InputError(f"the timesteps of {name} are not set: call its set_timesteps() first")
    if steps and len(timesteps) != steps:
        raise InputError(f"{name} evaluates the model {len(timesteps)} times in {steps} steps, and cachec takes one evaluation "
                         f"a step; {INSTEAD}")  # fmt: skip
    if (index := getattr(scheduler, "step_index", None)) is not None:
        raise InputError(f"{name} is in the middle of a run, at step {index}: call its set_timesteps() again")
    first = getattr(scheduler, "begin_index", None) or 0
    if not 0 <= first < len(timesteps):
        raise InputError(f"{name} begins at step {first} of {len(timesteps)}: give it a begin index among its steps")
    return first


def _play(scheduler: Any, first: int, given: "torch.Tensor", *, seed: int) -> "torch.Tensor":
    """Latents after each step and what the model is given before it, [2, T, …], of a copy run on ``given`` [1 + T, …]."""
    import torch

    scheduler = copy.deepcopy(scheduler)
    scale = getattr(scheduler, "scale_model_input", None)  # flows have none
    latents, after, inputs = given[0], [], []
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        try:
            for timestep, output in zip(scheduler.timesteps[first:], given[1:], strict=True):
                inputs.append(latents if scale is None else scale(latents, timestep))
                latents = scheduler.step(output, timestep, latents, return_dict=False)[0]
                after.append(latents)
            return torch.stack([torch.stack(after), torch.stack(inputs)])
        except (TypeError, ValueError, RuntimeError, IndexError, AttributeError, ImportError) as error:
            raise InputError(f"{_name(scheduler)} cannot step from latents and a model's output alone: "
                             f"{in_one_line(error)}; {INSTEAD}") from error  # fmt: skip


def _check_linear(scheduler: Any, given: Array, run: Array, rows: Array, inputs: Array) -> None:
    """Does a run [2, T, N] on ``given`` [1 + T, N] come out as the two tables [T, 1 + T] say?"""
    for what, found, table in zip(("latents", "inputs of the model"), run, (rows, inputs), strict=True):
        size = np.maximum.accumulate((np.abs(table) @ np.abs(given)).max(axis=1))
        off = np.abs(table @ given - found).max(axis=1) / np.maximum(size, np.finfo(float).tiny)
        if not (fits := off <= TOLERANCE + ROUNDING * np.arange(len(off))).all():  # or NaN
            step = int(np.flatnonzero(~fits)[0])
            raise InputError(f"{_name(scheduler)} is not linear: at step {step} its {what} are {off[step]:.1g} off the sum of "
                             f"its unit responses; {INSTEAD}")  # fmt: skip


def euler_of(before: Array, rows: Array) -> tuple[Array, Array] | None:
    """Carry and gain [T], if each row is its predecessor ``before`` times a number, but for the newest output."""
    num = len(rows)
    old = np.tri(num, num + 1)  # of row i the start and the outputs before i
    carry = (rows * before * old).sum(axis=1) / (before**2).sum(axis=1)
    rest = np.abs((rows - carry[:, None] * before) * old).max(axis=1)
    size = np.maximum(np.abs(rows).max(axis=1), np.abs(before).max(axis=1))
    return (carry, rows[:, 1:].diagonal().copy()) if (rest <= TOLERANCE * size).all() else None


def _sigmas(scheduler: Any, first: int, num: int) -> Array | None:
    sigmas = getattr(scheduler, "sigmas", None)
    if sigmas is None or len(sigmas) != first + num + 1:
        return None
    return _numbers(sigmas[first:])


def _levels(scheduler: Any, first: int, num: int) -> Array | None:
    sigmas = _sigmas(scheduler, first, num)
    if sigmas is not None:
        flows = _name(scheduler).startswith("FlowMatch") or _config(scheduler).get("use_flow_sigmas")
        return sigmas if flows else sigmas / (1 + sigmas)
    alphas = getattr(scheduler, "alphas_cumprod", None)
    if alphas is None:
        return None
    last = getattr(scheduler, "final_alpha_cumprod", 1.0)
    kept = np.array([*_numbers(alphas)[_numbers(scheduler.timesteps[first:]).astype(int)], float(last)])
    levels: Array = np.sqrt(1 - kept) / (np.sqrt(kept) + np.sqrt(1 - kept))
    return levels


def _draws_noise(scheduler: Any) -> str:
    options = {name: value for name in NOISE if (value := _config(scheduler).get(name))}
    if not str(options.get("algorithm_type", "sde")).startswith("sde"):
        del options["algorithm_type"]
    on = ", ".join(f"{name}={shortened(value)}" for name, value in options.items())
    off = ", ".join(f"{name}={NOISE[name]!r}" for name in options)
    way = f"set {off}" if off else f"take a deterministic one; {INSTEAD}"
    return f"{_name(scheduler)} draws noise at its steps{f' ({on})' if on else ''}, so its runs cannot be forecast: {way}"


def _name(scheduler: Any) -> str:
    return type(scheduler).__name__


def _config(scheduler: Any) -> Mapping[str, Any]:
    config: Mapping[str, Any] = getattr(scheduler, "config", {})
    return config


def _numbers(values: Any) -> Array:
    return np.array(values.cpu() if hasattr(values, "cpu") else values, np.float64)
