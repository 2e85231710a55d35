"""Plain solvers as tables: what caching has to beat at the same number of evaluations.

A linear multistep solver is a lower-triangular matrix: after evaluation i the latents are x_T + sum_{j <= i} rows[i, j] v_j,
with v_j the velocities so far. x_sigma = (1 - sigma) x_0 + sigma noise, so dx / dsigma = v.

Shapes: latents [B, …]; ``K`` evaluations at noise levels sigmas[0] … sigmas[K - 1]; sigmas[K] is where the last one leads.
"""

from typing import Any

import numpy as np

from cachec.compiler.tables.sampler_probe import probe_sampler
from cachec.runtime.errors import InputError, PredictorError, unknown_name
from cachec.runtime.specs import Array

ADAMS_ORDERS = {"euler": 1, "ab2": 2, "ab3": 3}
DIFFUSERS_SOLVERS = ("dpm", "unipc")
SOLVERS = (*ADAMS_ORDERS, *DIFFUSERS_SOLVERS)

# UniPC's corrector divides by the log-SNR of the oldest node, which is infinite at noise level 1. diffusers' own
# set_timesteps lowers a first noise level of 1 by as much. DPM-Solver++ 2M needs no such thing: the ratio becomes 0.
UNIPC_FIRST_SIGMA = 1 - 1e-6


def solver_rows(name: str, sigmas: Array) -> Array:
    """Rows [K, K] of a solver of ``SOLVERS`` on ``sigmas`` [K + 1], falling from at most 1 to 0; float64, lower-triangular.

    ``euler``, ``ab2``, ``ab3``: Adams-Bashforth of order 1, 2, 3 in sigma. ``unipc``: UniPC-2 (arXiv 2302.04867), ``dpm``:
    DPM-Solver++ 2M (arXiv 2211.01095), both as diffusers has them for flows, with its defaults.

    Raises:
        InputError: there is no such solver, or ``sigmas`` do not fall to 0.
        PredictorError: diffusers' solver is not of the form above (another version of it).
    """
    if name not in SOLVERS:
        raise unknown_name("solver", name, SOLVERS)
    sigmas = np.asarray(sigmas, np.float64)
    if sigmas.ndim != 1 or len(sigmas) < 2 or not (np.diff(sigmas) < 0).all() or sigmas[0] > 1 or sigmas[-1] != 0:
        raise InputError(f"noise levels {sigmas.tolist()} must fall from at most 1 to 0")
    if name in ADAMS_ORDERS:
        return adams_bashforth(sigmas, ADAMS_ORDERS[name])
    return _diffusers_rows(name, sigmas)


def adams_bashforth(sigmas: Array, order: int) -> Array:
    """Rows [K, K] of Adams-Bashforth on ``sigmas`` [K + 1], with the true steps.

    The polynomial through the last ``order`` velocities is integrated over each step; the first steps use the fewer there
    are. Exact for velocities that are polynomials of degree ``order - 1`` in sigma, from step ``order - 1`` on.
    """
    num = len(sigmas) - 1
    steps = np.zeros((num, num))
    for i in range(num):
        nodes = np.arange(max(0, i + 1 - order), i + 1)
        length = sigmas[i + 1] - sigmas[i]
        places = (sigmas[nodes] - sigmas[i]) / length  # of the nodes, where the step is [0, 1]
        powers = np.arange(len(nodes))
        steps[i, nodes] = length * np.linalg.solve(places[None, :] ** powers[:, None], 1 / (powers + 1))
    return np.cumsum(steps, axis=0)


def _diffusers_rows(name: str, sigmas: Array) -> Array:
    """DPM-Solver++ rounds the sample to float32 at every step, so its rows are good to 1e-7."""
    rows = probe_sampler(diffusers_scheduler(name, sigmas)).rows
    if np.abs(rows[:, 0] - 1).max() > 1e-6:
        raise PredictorError(f"diffusers' {name} does not keep the noise's share at 1; is this another version of it?")
    return rows[:, 1:]


def diffusers_scheduler(name: str, sigmas: Array) -> Any:
    """The diffusers scheduler ``dpm`` or ``unipc`` for flows, at exactly ``sigmas`` [K + 1] in float64.

    They are set after ``set_timesteps``, which would shift and round them (UniPC) or takes none (DPM-Solver++). With a
    begin index its steps are counted, and its whole-number timesteps, which may repeat, are not looked at.
    """
    import torch
    from diffusers import DPMSolverMultistepScheduler, UniPCMultistepScheduler

    levels = np.array(sigmas, np.float64)
    if name == "unipc":
        levels[0] = min(levels[0], UNIPC_FIRST_SIGMA)
    kind = {"dpm": DPMSolverMultistepScheduler, "unipc": UniPCMultistepScheduler}[name]
    scheduler = kind(prediction_type="flow_prediction", use_flow_sigmas=True)
    scheduler.set_timesteps(len(levels) - 1)
    scheduler.sigmas = torch.from_numpy(levels)
    scheduler.set_begin_index(0)
    return scheduler
