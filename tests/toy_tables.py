"""What the numbers of every method are checked with: schedules, random features, and a walk through a table.

Schedules are regular, irregular, and without a warm-up; features are vectors [E].
"""

import numpy as np
import torch
from numpy.polynomial import Polynomial

from cachec.compiler.methods.l2p import l2p_schedule
from cachec.compiler.methods.spectrum import spectrum_schedule
from cachec.compiler.models.base import Settings
from cachec.compiler.tables.coefficients import ForecastTable
from cachec.compiler.tables.schedule import Schedule, interval_schedule

SIZE = 5

SCHEDULES = {
    "interval 7 of 50": interval_schedule(50, 7),
    "interval 2 of 10": interval_schedule(10, 2),
    "l2p list": l2p_schedule(50, 8),
    "growing windows": spectrum_schedule(28),
    "irregular": Schedule(20, (0, 1, 5, 6, 8, 15, 19)),
    "no warm-up": Schedule(12, (0, 4, 5)),
    "one step": Schedule(6, (0,)),
}


TWO = ("interval 2 of 10", "irregular")  # for graphs, which are captured anew for each number of steps


def sigmas_of(num_steps, shift=3.16):
    t = np.linspace(1, 0, num_steps + 1)
    return shift * t / (1 + (shift - 1) * t)


def table_of(method, schedule):
    return method.table(schedule, sigmas_of(schedule.num_steps), None)


def forecasts(table, features):
    """All forecasts of a table on computed features by step."""
    stacked = np.stack([features[step] for step in table.schedule.compute])
    return {s: table.rows[s] @ stacked + table.bias[s] for s in table.schedule.forecast}


SETTINGS = Settings(height=64, width=64, text_tokens=8, guidance=1.0, steps=10, dtype="float32")


def coded(method, parameters, features, schedule):
    """All forecasts [L, D] of a coding and its table, by step."""
    coding = method.coding(features.shape[1:], SETTINGS, parameters)
    table = method.table(schedule, sigmas_of(schedule.num_steps), parameters)
    code = coding.encode(torch.from_numpy(features[list(schedule.compute)]).float())
    parts = torch.split(code, list(coding.groups.sizes), coding.groups.axis)
    found = {}
    for step in schedule.forecast:
        rows = torch.from_numpy(table.coefficients[step]).float()
        each = zip(rows, parts, strict=True)
        summed = torch.cat([torch.tensordot(row, part, 1) for row, part in each], coding.groups.axis - 1)
        found[step] = coding.decode(summed[None])[0].numpy()
    return found


def check_exact(method, degree, needed, atol=1e-9, schedules=SCHEDULES):
    """Polynomials in the step up to ``degree`` are reproduced, from ``needed`` computed features on."""
    for schedule in map(SCHEDULES.get, schedules):
        curve = [Polynomial(c) for c in np.random.default_rng(degree).standard_normal((SIZE, degree + 1))]
        features = np.array([[p(step / schedule.num_steps) for p in curve] for step in range(schedule.num_steps)])
        for step, value in forecasts(table_of(method, schedule), features).items():
            if sum(computed < step for computed in schedule.compute) >= needed:
                np.testing.assert_allclose(value, features[step], atol=atol)


def check_recursion(method, recursion, rtol=1e-6, schedules=SCHEDULES):
    """The table is the paper's recursion, and looks only at what is computed before.

    ``recursion(method, features, schedule)`` goes straight through a run and gives the forecast features by step.
    """
    for schedule in map(SCHEDULES.get, schedules):
        features, table = np.random.default_rng(0).standard_normal((schedule.num_steps, SIZE)), table_of(method, schedule)
        got, expected = forecasts(table, features), recursion(method, features, schedule)
        assert set(got) == set(expected)
        for step, value in expected.items():
            np.testing.assert_allclose(got[step], value, rtol=rtol, atol=1e-4)
        assert isinstance(table, ForecastTable)
        assert table.coefficients.dtype == np.float64
        assert (table.coefficients[list(schedule.compute)] == 0).all()
        assert not any(table.coefficients[step, :, np.array(schedule.compute) > step].any() for step in schedule.forecast)


def differences_by_step(features, schedule, order):
    """TaylorSeer's state before every step (arXiv 2503.06923): differences, and the step that they were taken at."""
    state, at = {}, None
    for step in range(schedule.num_steps):
        yield step, state, at
        if step in schedule.compute:
            updated = {0: features[step]}
            for i in range(order):
                if i not in state or not step > 3 - 2:
                    break
                updated[i + 1] = (updated[i] - state[i]) / (step - at)
            state, at = updated, step


def sampled(schedule, sigmas, velocity_of, velocities):
    """Euler through all steps, the forecast ones with ``velocity_of(step, all earlier velocities)``; latents when computing."""
    x, used, latents = np.zeros(SIZE), [], []
    for step in range(schedule.num_steps):
        if step in schedule.compute:
            latents.append(x)
            used.append(velocities[step])
        else:
            used.append(velocity_of(step, used))
        x = x + (sigmas[step + 1] - sigmas[step]) * used[-1]
    return [*latents[1:], x]
