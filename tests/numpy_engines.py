"""Engines of a few lines of numpy, so that what plays programs is tested without torch, without files and within milliseconds.

``B`` batch, ``L = 3`` tokens, ``D = 4`` channels. The model bends with latents, time and prompt; its tail takes the prompt.
"""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np

from cachec.compiler.tables.coefficients import AdvanceTable, ForecastTable, collapse
from cachec.compiler.tables.lower import lower_advance, lower_table, lower_uncached
from cachec.compiler.tables.sampling import Sampling
from cachec.compiler.tables.schedule import Schedule
from cachec.runtime.abi import ADVANCE, COMPUTE, FORECAST, PROLOGUE
from cachec.runtime.device import Host
from cachec.runtime.engine import Call, Engine, ExecutionContext, check_bindings
from cachec.runtime.model_io import ModelIO
from cachec.runtime.noise import make_noise
from cachec.runtime.program import UNCACHED, ProgramKey, hash_sigmas
from cachec.runtime.session import LoadedBundle
from cachec.runtime.specs import Signature, TensorSpec

TOKENS, WIDTH, STEPS = 3, 4, 8
SHAPE = (TOKENS, WIDTH)
IO = ModelIO("latents", "timestep", ("prompt",))
SCHEDULE = Schedule(STEPS, (0, 2, 3, 6))  # forecasts step 1 while only one slot is written
SIGMAS = np.linspace(1, 0, STEPS + 1, dtype=np.float32)
KEY = ProgramKey(STEPS, hash_sigmas(SIGMAS), {"height": TOKENS, "width": WIDTH})


class NumpyEngine(Engine):
    """``native`` is a function from inputs to outputs, both by name."""

    name, needs_same_version = "numpy", False

    def __init__(self, native, signature, device=None):
        super().__init__(native, signature, device or Host())

    @classmethod
    def version(cls):
        return np.__version__

    @classmethod
    def check_target(cls, device, precision):
        raise NotImplementedError

    load = check_target

    def _context(self, native, device):
        return NumpyContext(native, self.signature, device)


class NumpyContext(ExecutionContext):
    def __init__(self, function, signature, device):
        self._function, self._signature, self._device = function, signature, device

    def bind(self, inputs, outputs):
        check_bindings(self._signature, self._device, inputs, outputs)
        return NumpyCall(self._function, inputs, outputs)


class NumpyCall(Call):
    def __init__(self, function, inputs, outputs):
        self._function, self._inputs, self._outputs = function, inputs, outputs

    def run(self):
        made = self._function(**self._inputs)
        for name, buffer in self._outputs.items():
            np.copyto(buffer, made[name])


def prologue(compute_timesteps, forecast_timesteps, prompt):
    """What a step adds inside the model, and what it scales in the tail."""
    return {
        "compute_shift": 3 * compute_timesteps[:, None, None] + prompt,
        "forecast_scale": 1 + 0.2 * prompt + 0 * forecast_timesteps[:, None, None],
    }


def compute(latents, delta, shift, prompt):
    feature = np.tanh(0.7 * latents + 0.3 * np.roll(latents, 1, axis=1) + np.sin(shift)[:, None])
    velocity = tail(feature, 1 + 0.2 * prompt)
    return {"feature": feature, "velocity": velocity, "next_latents": latents + delta[:, None, None] * velocity}


def forecast(features, coefficients, bias, deltas, latents, scale):
    summed = np.einsum("ngh,hbld->nbld", coefficients, features) + bias[:, None, None, None]
    velocities = np.stack([tail(feature, row) for feature, row in zip(summed, scale, strict=True)])
    return {"velocities": velocities, "next_latents": latents + np.einsum("n,nbld->bld", deltas, velocities)}


def tail(feature, scale):
    return np.sin(2 * feature) * scale[:, None]


def advance(base, base_share, velocities, coefficients):
    return {"next_latents": base_share * base + np.einsum("gh,hbld->bld", coefficients, velocities)}


def _specs(**shapes):
    return tuple(TensorSpec(name, shape, "float32") for name, shape in shapes.items())


X, PROMPT = ("batch", *SHAPE), ("batch", WIDTH)
SIGNATURES = {
    PROLOGUE: Signature(
        _specs(compute_timesteps=("compute_steps",), forecast_timesteps=("forecast_steps",), prompt=PROMPT),
        _specs(compute_shift=("compute_steps", *PROMPT), forecast_scale=("forecast_steps", *PROMPT)),
    ),
    COMPUTE: Signature(
        _specs(latents=X, delta=("batch",), shift=PROMPT, prompt=PROMPT), _specs(feature=X, velocity=X, next_latents=X)
    ),
    FORECAST: Signature(
        _specs(
            features=("slots", *X), coefficients=("forecasts", 1, "slots"), bias=("forecasts",), deltas=("forecasts",),
            latents=X, scale=("forecasts", *PROMPT),
        ),
        _specs(velocities=("forecasts", *X), next_latents=X),
    ),
    ADVANCE: Signature(
        _specs(base=X, base_share=(1,), velocities=("slots", *X), coefficients=(1, "slots")), _specs(next_latents=X)
    ),
}  # fmt: skip
FUNCTIONS = {PROLOGUE: prologue, COMPUTE: compute, FORECAST: forecast, ADVANCE: advance}


def make_engines(*, device=None, velocities=True, **functions):
    """All engines on one device; ``functions`` take the place of some. Without ``velocities``, forecasts keep these."""
    signatures = dict(SIGNATURES)
    if not velocities:
        signatures[FORECAST] = replace(SIGNATURES[FORECAST], outputs=_specs(next_latents=X))
    return {name: NumpyEngine({**FUNCTIONS, **functions}[name], signatures[name], device) for name in signatures}


def make_program(cut, *, schedule=SCHEDULE):
    """Straight lines through the last two computed values, on either cut; ``uncached`` computes every step."""
    if cut == UNCACHED:
        return lower_uncached(replace(KEY, level=UNCACHED), Sampling(SIGMAS, SIGMAS[:-1]))
    rows = np.zeros((STEPS, len(schedule.compute)))
    for step in schedule.forecast:
        last = [index for index, one in enumerate(schedule.compute) if one < step][-2:]
        rows[step, last] = 1.0
        if len(last) == 2:
            before, after = (schedule.compute[index] for index in last)
            rows[step, last[1]] = (step - before) / (after - before)
            rows[step, last[0]] -= rows[step, last[1]]
    table = ForecastTable.of_rows(schedule, rows)
    if cut == "hidden":
        return lower_table(table, KEY, Sampling(SIGMAS, SIGMAS[:-1]))
    moves = collapse(table, SIGMAS)
    told = np.array([SIGMAS[step] * 0.97 for step in schedule.compute])  # not the sampler's own
    return lower_advance(AdvanceTable(schedule, moves.coefficients, told), KEY, Sampling(SIGMAS, SIGMAS[:-1]))


def load(cut, **options):
    """What ``cachec.load`` would give for a bundle of these engines."""
    manifest = SimpleNamespace(
        texts=(),
        settings={"width": 64, "height": 64, "steps": 4},
        io=IO.to_json(),
        model={"name": "numpy"},
        method={"name": "line"},
        programs={"default": {}, UNCACHED: {}},
    )
    programs = {"default": make_program(cut), UNCACHED: make_program(UNCACHED)}
    return LoadedBundle(
        manifest, programs, make_engines(**options), SimpleNamespace(sizes={"batch": (1, 2, 5)}, shape_bucket="")
    )


def noise(*seeds):
    return np.stack([make_noise(seed, SHAPE) for seed in seeds])


def prompt(*seeds):
    return {"prompt": np.stack([make_noise(100 + seed, (WIDTH,)) for seed in seeds])}


def play(cut, *seeds, edits=None):
    """The same run written out in float64, without slots or instructions. Returns the latents after each step.

    ``edits`` are added to the latents before a step.
    """
    program, x, given = make_program(cut), noise(*seeds).astype(np.float64), prompt(*seeds)["prompt"]
    kept, latents, edits = [], [], edits or {}
    velocity = np.zeros_like(x)
    for step in range(STEPS):
        x = x + edits.get(step, 0)
        delta = float(SIGMAS[step + 1]) - float(SIGMAS[step])
        if step in program.compute_steps:
            shift = 3 * float(program.timesteps[step]) + given
            made = compute(x, np.full(len(x), delta), shift, given)
            velocity = made["velocity"]
            kept.append(made["feature"] if cut == "hidden" else velocity)
        if cut == "hidden" and step not in program.compute_steps:
            velocity = tail(_line(kept, step), 1 + 0.2 * given)
        x = x + delta * (_line(kept, step) if cut == "output" else velocity)
        latents.append(x)
    return latents


def _line(kept, step):
    """The straight line through the last two of ``kept``, at ``step``; on a computed step, the last."""
    before, after = ([None, *SCHEDULE.compute][: len(kept) + 1])[-2:]
    if step == after or before is None:
        return kept[-1]
    share = (step - before) / (after - before)
    return kept[-2] + share * (kept[-1] - kept[-2])
