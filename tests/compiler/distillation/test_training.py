"""Distillation of a small FLUX: the best is kept, it goes on as if nothing had happened, and stops where nothing is left."""

import logging
from dataclasses import replace

import numpy as np
import pytest
import torch

from cachec.compiler.calibration.evaluator import Evaluator
from cachec.compiler.calibration.runs import run_uncached
from cachec.compiler.calibration.uses import UsedPrompts
from cachec.compiler.distillation.distil import check_teacher
from cachec.compiler.distillation.meanflow import Distilling
from cachec.compiler.distillation.training import DistillationData, Distiller
from cachec.compiler.models import find_model, load_model
from cachec.runtime.errors import InputError
from tests.families import FAMILIES
from tests.family_settings import SETTINGS, settings_for

ASKED = Distilling(steps=2, restrict=1.0, updates=6, batch=2, rate=1e-4)
SMALL = replace(SETTINGS, width=32, text_tokens=4)
RUNS, HELD_OUT = 6, 2


class Eager(Evaluator):
    """The transformer itself."""

    def __init__(self, model, settings):
        self._model, self._constants = model, model.constants(settings)

    @torch.no_grad()
    def evaluate(self, x, t, conditions):
        told = torch.as_tensor(t, dtype=torch.float32).expand(len(x))
        given = {name: torch.from_numpy(value) for name, value in conditions.items()}
        made = self._model.transformer(hidden_states=torch.from_numpy(x), timestep=told, **given, **self._constants)[0]
        return made.numpy(), made.numpy()

    def tail(self, feature, t, conditions):
        raise NotImplementedError

    def play(self, program, noise, conditions, **numbers):
        raise NotImplementedError


@pytest.fixture(scope="module")
def recorded(saved_family):
    model = load_model(find_model(str(saved_family("flux"))))
    evaluator, sampling = Eager(model, SMALL), model.sampling(SMALL)
    inputs = model.example_inputs(SMALL, batch=RUNS)
    conditions = {name: inputs[name].numpy() for name in model.io.conditions}
    noise = inputs[model.io.latents].numpy()
    *_, last = run_uncached(evaluator, sampling, noise, conditions)
    return DistillationData(
        model,
        SMALL,
        evaluator,
        sampling,
        model.sampling(SMALL.with_steps(2)),
        noise,
        last.latents,
        conditions,
        HELD_OUT,
        0,
        None,
    )


def in_(recorded, work):
    return replace(recorded, work=work)


def test_the_best_is_kept_and_the_teacher_left_alone(recorded, tmp_path):
    before = {name: value.clone() for name, value in recorded.model.transformer.state_dict().items()}
    distiller = Distiller(in_(recorded, tmp_path), ASKED)
    kept = {name: value.clone() for name, value in distiller.run().state_dict().items()}
    curve = [point["held_out"] for point in distiller.state.curve]
    assert [point["update"] for point in distiller.state.curve] == list(range(7))
    assert distiller.state.best == min(curve) == curve[distiller.state.best_update]
    distiller._evaluate()
    assert distiller.state.curve[-1]["held_out"] == distiller.state.best
    assert all(torch.equal(value, kept[name]) for name, value in distiller._best.items())
    assert all(torch.equal(value, before[name]) for name, value in recorded.model.transformer.state_dict().items())


def test_it_begins_where_the_teacher_takes_as_few_steps(recorded, tmp_path):
    """Told where its steps end, it is still the teacher on average: (time_in(t) + time_in(r)) / 2, near enough."""
    distiller = Distiller(in_(recorded, tmp_path), ASKED)
    conditions = {name: value[-HELD_OUT:] for name, value in recorded.conditions.items()}
    *_, plain = run_uncached(recorded.evaluator, recorded.few, recorded.noise[-HELD_OUT:], conditions)
    distiller._evaluate()
    of_plain = np.linalg.norm(plain.latents - recorded.final[-HELD_OUT:]) / np.linalg.norm(recorded.final[-HELD_OUT:])
    assert abs(distiller.state.best - of_plain) < 0.5 * of_plain


def test_an_interrupted_one_gives_the_same_weights(recorded, tmp_path):
    whole = Distiller(in_(recorded, tmp_path / "whole"), ASKED).run().state_dict()
    Distiller(in_(recorded, tmp_path / "parts"), ASKED).run(until=3)
    again = Distiller(in_(recorded, tmp_path / "parts"), ASKED)
    assert again.state.update == 3
    parts = again.run().state_dict()
    assert all(torch.equal(value, parts[name]) for name, value in whole.items())


def test_one_that_explodes_keeps_the_best_and_says_so(recorded, tmp_path, caplog):
    distiller = Distiller(in_(recorded, tmp_path), replace(ASKED, rate=0.9))
    start = {name: value.clone() for name, value in distiller.student.transformer.state_dict().items()}
    with caplog.at_level(logging.WARNING):
        kept = distiller.run().state_dict()
    assert distiller.state.update < ASKED.updates
    assert "the distillation diverged: held-out runs are off by" in caplog.text
    assert f"The weights of update {distiller.state.best_update} are kept" in caplog.text
    if distiller.state.best_update == 0:
        assert all(torch.equal(value, start[name]) for name, value in kept.items())
    done = Distiller(in_(recorded, tmp_path), replace(ASKED, rate=0.9))
    done.run()  # it does not go on
    assert done.state == distiller.state


def test_a_loss_that_is_no_number_ends_it(recorded, tmp_path):
    distiller = Distiller(in_(recorded, tmp_path), replace(ASKED, updates=100))
    distiller._evaluate()
    with torch.no_grad():
        distiller.student.transformer.proj_out.bias.fill_(float("nan"))
    distiller._update()
    assert distiller.state.diverged.startswith("the loss is nan at update 0")
    assert not torch.isnan(distiller.run().proj_out.bias).any()


PROMPTS = UsedPrompts(("a circle", "a ring"), ("stop", "fit"))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("dit", "a DiTTransformer2DModel has no second time input that is known"),
        ("wan-2.2", "has two transformers"),
    ],
)
def test_what_cannot_be_distilled_is_refused(name, message, saved_family):
    family = next(family for family in FAMILIES if family.name == name)
    with pytest.raises(InputError, match=message):
        check_teacher(load_model(find_model(str(saved_family(name)))), settings_for(family), PROMPTS)


def test_a_sampler_that_is_no_flow_is_refused(recorded, saved_family, monkeypatch):
    model = load_model(find_model(str(saved_family("flux"))))
    sampling = model.sampling(SMALL)
    monkeypatch.setattr(model, "sampling", lambda settings: replace(sampling, timesteps=sampling.timesteps**2))
    with pytest.raises(InputError, match=r"is no model of flow matching as its sampler has it \(flow Euler|FlowMatch"):
        check_teacher(model, SMALL, PROMPTS)
    with pytest.raises(InputError, match="1 prompts are too few"):
        check_teacher(recorded.model, SMALL, UsedPrompts(("a circle",), ("fit",)))
