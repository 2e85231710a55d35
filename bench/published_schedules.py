"""Schedules that papers search for on calibration runs, from inner products of the uncached velocities alone.

Shapes: ``P`` prompts, ``T`` steps; ``gram`` [P, T, T] holds <v_i, v_j> by prompt.
"""

import numpy as np

from cachec.compiler.tables.schedule import Schedule
from cachec.runtime.errors import InputError
from cachec.runtime.specs import Array


def cem_schedule(gram: Array, budget: int, *, spread: int | None = None, power: int = 0) -> Schedule:
    """CEM's ``budget`` steps (arXiv 2512.23258, released code): the least accumulated prior error along the run.

    A full step t that follows g - 1 skipped ones costs ``(g - 1)^power`` times the sum, over all steps up to t, of
    1 - cos(v_{s-g+1}, v_s), mean over prompts. The first and the last step are always full. The released code allows gaps
    within ``spread`` (1) of the mean gap, and none above 10, as far as its priors go; here all are allowed unless
    ``spread`` is given. Its features are hidden states, here velocities.

    Raises:
        InputError: no schedule has so many steps and such gaps.
    """
    num = _check(gram, budget)
    if budget == 1 and num > 1:
        raise InputError("budget is 1; CEM computes the first step and the last, so it takes 2 or more")
    errors = _accumulated_errors(gram)
    base = round(num / budget)
    least, most = (1, num - 1) if spread is None else (max(1, base - spread), base + spread)
    best, parent = np.full((budget, num), np.inf), np.zeros((budget, num), np.int64)
    best[0, 0] = 0.0
    for k in range(1, budget):
        for step in range(1, num):
            gaps = np.arange(least, min(most, step) + 1)
            if not len(gaps):
                continue
            costs = best[k - 1, step - gaps] + errors[gaps - 1, step] * (gaps - 1.0) ** power
            winner = int(np.argmin(costs))
            best[k, step], parent[k, step] = costs[winner], step - gaps[winner]
    if not np.isfinite(best[-1, -1]):
        raise InputError(f"no {budget} of {num} steps lie {least} to {most} apart from the first to the last; widen the spread")
    path = [num - 1]
    for k in range(budget - 1, 0, -1):
        path.append(int(parent[k, path[-1]]))
    return Schedule(num, tuple(reversed(path)))


def _accumulated_errors(gram: Array) -> Array:
    """[T, T]: entry (n, t) is the sum over steps s = n … t of 1 - cos(v_{s-n}, v_s), mean over prompts."""
    norms = np.sqrt(np.einsum("pii->pi", gram))
    cosines = np.mean(gram / (norms[:, :, None] * norms[:, None, :]), axis=0)
    num, errors = len(cosines), np.zeros(cosines.shape)
    for distance in range(1, num):
        errors[distance, distance:] = np.cumsum(1 - np.diagonal(cosines, distance))
    return errors


def lemica_schedule(gram: Array, sigmas: Array, budget: int) -> Schedule:
    """LeMiCa's ``budget`` steps (NeurIPS 2025): the path whose worst segment is least, then its second worst, and so on.

    The edge from computed step i to the next one j, or to the end T, is what reuse of v_i over i … j - 1 does to the
    final latents: the norm of sum_s (sigma_{s+1} - sigma_s) (v_i - v_s), mean over prompts. The paper runs the sampler for
    each edge and takes the mean absolute error; here the velocities stay those of the uncached run. Exact.

    Raises:
        InputError: ``budget`` is not from 1 to T, or ``sigmas`` are not T + 1.
    """
    edges = reuse_errors(gram, sigmas)
    num = _check(gram, budget)
    best: dict[int, tuple[list[float], tuple[int, ...]]] = {0: ([], ())}  # by node: falling edges, steps before it
    for left in range(budget - 1, -1, -1):
        last = [num] if left == 0 else range(1, num)
        reached = {}
        for node in last:
            options = [
                (sorted([*costs, float(edges[origin, node])], reverse=True), (*path, origin))
                for origin, (costs, path) in best.items()
                if origin < node
            ]
            if options:
                reached[node] = min(options)
        best = reached
    return Schedule(num, best[num][1])


def reuse_errors(gram: Array, sigmas: Array) -> Array:
    """Edges [T, T + 1] of :func:`lemica_schedule`; infinite where j <= i."""
    num = gram.shape[-1]
    steps = np.diff(np.asarray(sigmas, np.float64))
    if len(steps) != num:
        raise InputError(f"there are {len(steps) + 1} noise levels, but velocities of {num} steps take {num + 1}")
    edges = np.full((num, num + 1), np.inf)
    for start in range(num):
        shares = np.tril(np.tile(-steps[start:], (num - start, 1)))  # [J, J]: how v_s misses in segments of each length
        shares[:, 0] -= shares.sum(axis=1)
        squares = ((shares @ gram[:, start:, start:]) * shares).sum(axis=-1)
        edges[start, start + 1 :] = np.sqrt(squares.clip(min=0)).mean(axis=0)
    return edges


def _check(gram: Array, budget: int) -> int:
    num = int(gram.shape[-1])
    if not 1 <= budget <= num:
        raise InputError(f"budget is {budget}; it must lie between 1 and the number of steps, {num}")
    return num
