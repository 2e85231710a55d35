"""HyCa: its solvers written out, its clusters, and what its fit chooses."""

import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest
from toy_tables import SCHEDULES, SETTINGS, coded

from cachec.compiler.methods.hyca import SOLVERS, HyCa
from cachec.compiler.methods.hyca_fit import cluster_channels, describe_channels
from cachec.compiler.methods.parameters import Parameters
from cachec.compiler.tables.schedule import Schedule
from cachec.runtime.errors import InputError, PredictorError


def solved(name, values, at, step):
    """A solver on the last values (newest last) at steps ``at``."""
    if len(values) == 1:
        return values[-1]
    f, g = values[-1], (values[-1] - values[-2]) / (at[-1] - at[-2])
    h = (values[-2] - values[-3]) / (at[-2] - at[-3]) if len(values) > 2 else g
    k, w = step - at[-1], (step - at[-1]) / (at[-1] - at[-2])
    return {
        "taylor": f + k * g,
        "rk": f + k * (g + (g + w * (g - h))) / 2,
        "ab": f + k * (1.5 * g - 0.5 * h),
        "am": f + k * (5 / 12 * (1.5 * g - 0.5 * h) + 8 / 12 * g - 1 / 12 * h),
        "bdf": (1 + w) ** 2 / (1 + 2 * w) * f - w**2 / (1 + 2 * w) * values[-2] + (1 + w) / (1 + 2 * w) * k * g,
    }[name]


@pytest.mark.parametrize("name", ["interval 7 of 50", "irregular", "no warm-up", "one step"])
def test_each_cluster_goes_by_its_solver(name):
    schedule, channels = SCHEDULES[name], 7
    labels, choices = np.array([2, 0, 1, 4, 3, 0, 2]), np.array([4, 0, 2, 1, 3])
    features = np.random.default_rng(0).standard_normal((schedule.num_steps, 3, channels))
    fitted = Parameters({"clusters": labels, "solvers": choices}, {}, "a test")
    got = coded(HyCa(clusters=5), fitted, features, schedule)
    for step, forecast in got.items():
        at = [computed for computed in schedule.compute if computed < step][-3:]
        for channel in range(channels):
            solver = list(SOLVERS)[choices[labels[channel]]]
            wanted = solved(solver, list(features[at][:, :, channel]), at, step)
            np.testing.assert_allclose(forecast[:, channel], wanted, atol=1e-3, rtol=1e-4)


def data_of(features, schedule):
    return SimpleNamespace(train=SimpleNamespace(features=features), schedule=schedule, seed=0)


def test_the_fit_gives_every_cluster_the_solver_that_errs_least():
    schedule, time = Schedule(20, (0, 1, 2, 6, 10, 15)), np.arange(20.0)
    smooth = np.stack(
        [a + b * time for a, b in ((1, 0.5), (2, 0.4), (3, 0.6))], axis=1
    )  # lines: taylor is exact, as are others
    noise = np.random.default_rng(0).standard_normal((20, 3)) * 3
    features = np.concatenate([smooth, noise], axis=1)[None, :, None].astype(np.float32)
    arrays, facts = HyCa(clusters=2).fit(data_of(features, schedule))
    labels, choices = arrays["clusters"], arrays["solvers"]
    assert len(set(labels[:3])) == len(set(labels[3:])) == 1
    assert labels[0] != labels[-1]
    fitted = Parameters(arrays, {}, "a test")
    off = {s: v - features[0, s] for s, v in coded(HyCa(clusters=2), fitted, features[0], schedule).items()}
    for other in range(len(SOLVERS)):
        changed = np.where(np.arange(2) == labels[-1], other, choices)
        worse = coded(
            HyCa(clusters=2), dataclasses.replace(fitted, arrays={**arrays, "solvers": changed}), features[0], schedule
        )
        total = sum(np.square(value - features[0, step]).sum() for step, value in worse.items())
        assert total >= sum(np.square(one).sum() for one in off.values()) - 1e-3
    assert facts["solvers_by_cluster"].count(" 3") == 2


def test_clusters_are_of_channels_that_move_alike_and_the_same_for_a_seed():
    generator, time = np.random.default_rng(0), np.linspace(0, 1, 30)
    slow, fast = (np.sin(2 * np.pi * f * time)[:, None] for f in (0.5, 9))
    features = np.concatenate([np.repeat(slow, 4, 1), np.repeat(fast, 4, 1)], axis=1)[None, :, None]
    features = np.repeat(features, 5, axis=2) + 0.01 * generator.standard_normal((1, 30, 5, 8))
    described = describe_channels(features)
    labels = cluster_channels(described, 2, seed=3)
    assert len(set(labels[:4])) == len(set(labels[4:])) == 1
    assert len(set(labels)) == 2
    np.testing.assert_array_equal(labels, cluster_channels(described, 2, seed=3))
    assert set(cluster_channels(np.zeros((5, 6)), 3, seed=0)) == {0}  # alike: one cluster


def test_more_clusters_than_channels_and_other_fits_are_refused():
    with pytest.raises(InputError, match="clusters is 0"):
        HyCa(clusters=0)
    features = np.zeros((1, 10, 2, 5), np.float32)
    with pytest.raises(InputError, match="clusters is 8, above the 5 channels of a feature"):
        HyCa().fit(data_of(features, Schedule(10, (0, 1, 2, 5))))
    fitted = Parameters({"clusters": np.zeros(5, np.int64), "solvers": np.array([7])}, {}, "a test")
    with pytest.raises(PredictorError, match=r"clusters of 5 channels do not fit features of 9"):
        HyCa(clusters=1).coding((4, 9), SETTINGS, fitted)
    with pytest.raises(PredictorError, match=r"solvers \[7\] are not the numbers of taylor, rk"):
        HyCa().table(Schedule(4, (0,)), np.zeros(5), fitted)
