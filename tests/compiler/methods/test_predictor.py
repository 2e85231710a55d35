"""Rows of predictors that are folded, against the predictors themselves."""

import numpy as np
import pytest
import torch
from toy_lesa import random_lesa, sigmas_of

from cachec.compiler.methods import predictor as module
from cachec.compiler.methods.lesa import Lesa
from cachec.compiler.methods.predictor import fold_rows
from cachec.compiler.methods.taylor import Taylor


@pytest.fixture(autouse=True)
def nothing_known():
    for cache in (module._captured, module._folded_step):
        cache.cache_clear()
    yield
    for cache in (module._captured, module._folded_step):  # of predictors that stand for others
        cache.cache_clear()


@pytest.mark.parametrize("method", [Taylor(3), Lesa()], ids=["taylor", "lesa"])
@torch.no_grad()
def test_rows_are_what_the_predictor_does(method, monkeypatch):
    graph = random_lesa(20) if isinstance(method, Lesa) else method.predictor(None)
    monkeypatch.setattr(type(method), "predictor", lambda self, parameters: graph)
    histories, sigmas = method.histories(method.interval(20, 5)), sigmas_of(20)
    rows, bias = fold_rows(method, None, histories, sigmas)
    computed = sorted(set(range(20)) - histories.keys())
    assert not rows[computed].any()
    assert not bias[computed].any()
    for step, history in histories.items():
        past = [torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(i)) for i in range(method.window)]
        wanted = graph(past, torch.tensor(history), torch.from_numpy(sigmas).float(), torch.tensor(step))
        got = np.einsum("w,w...->...", rows[step], torch.stack(past).numpy()) + bias[step]
        np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=1e-4)


def test_a_predictor_is_captured_once_for_all_its_rows_and_each_is_folded_once(monkeypatch):
    captures, real = [], module.capture_predictor
    monkeypatch.setattr(module, "capture_predictor", lambda *given: captures.append(given) or real(*given))
    method = Taylor(1)
    rows = [method.row(step, (step - 1, step - 2), sigmas_of(20), None) for step in (3, 4, 9)]
    assert len(captures) == 1
    assert module._folded_step.cache_info().currsize == 3
    monkeypatch.setattr(module, "fold_step", None)  # would fail
    again = [method.row(step, (step - 1, step - 2), sigmas_of(20), None) for step in (3, 4, 9)]
    np.testing.assert_array_equal(again, rows)
    np.testing.assert_allclose(rows, [[2, -1]] * 3, atol=1e-6)
