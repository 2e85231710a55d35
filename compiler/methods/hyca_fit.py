"""Clusters of channels by how they move through a run (HyCa, arXiv 2510.04188).

Shapes: ``P`` prompts, ``T`` steps, ``N`` tokens, ``D`` channels.
"""

import numpy as np

from cachec.runtime.specs import Array

ROUNDS = 100  # of k-means, at most
TINY = 1e-12


def describe_channels(features: Array) -> Array:
    """Standardised descriptors [D, 6] of trajectories [P, T, N, D], T of at least four.

    Mean squares of the first and second difference over the channel's energy, the energy (logarithm), third over second
    differences (jerk), second over first (curvature), and the flatness of the spectrum over the steps.
    """
    x = np.asarray(features, np.float64)
    energy, *moves = ((np.square(np.diff(x, n, axis=1)).mean(axis=(0, 1, 2)) + TINY) for n in range(4))
    power = np.square(np.abs(np.fft.rfft(x - x.mean(axis=1, keepdims=True), axis=1))).mean(axis=(0, 2))[1:] + TINY
    flatness = np.exp(np.log(power).mean(axis=0)) / power.mean(axis=0)
    first, second, third = moves
    found = np.stack([first / energy, second / energy, energy, third / second, second / first, flatness], axis=1)
    logs = np.log(found + TINY)
    described: Array = (logs - logs.mean(axis=0)) / (logs.std(axis=0) + TINY)
    return described


def cluster_channels(described: Array, clusters: int, *, seed: int) -> Array:
    """Labels [D] of k-means on descriptors [D, n], numbered without gaps; there may be fewer where channels are alike."""
    generator = np.random.default_rng(seed)
    centres = _spread(described, clusters, generator)
    labels = np.zeros(len(described), np.int64)
    for _ in range(ROUNDS):
        nearest = np.square(described[:, None] - centres[None]).sum(axis=2).argmin(axis=1)
        if (nearest == labels).all() and _ > 0:
            break
        labels = nearest
        centres = np.stack(
            [described[labels == one].mean(axis=0) if (labels == one).any() else centres[one] for one in range(len(centres))]
        )
    return np.unique(labels, return_inverse=True)[1].reshape(-1)


def _spread(points: Array, count: int, generator: np.random.Generator) -> Array:
    """First centres [count, n]: points far from each other (k-means++)."""
    chosen = [points[generator.integers(len(points))]]
    for _ in range(count - 1):
        far = np.square(points[:, None] - np.stack(chosen)[None]).sum(axis=2).min(axis=1)
        share = far / far.sum() if far.sum() > 0 else None
        chosen.append(points[generator.choice(len(points), p=share)])
    return np.stack(chosen)
