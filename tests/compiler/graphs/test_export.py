"""Plans of engines: which graphs get one, and for which inputs."""

import torch
from toy import example_inputs
from toy_bundle import IO, STEPS, add_predictor

from cachec.compiler.graphs.export import plan_engines
from cachec.compiler.graphs.prepare import engine, linear
from cachec.compiler.methods.predictor import Predictor
from cachec.passes.base import copy_module
from cachec.runtime.abi import ADVANCE, COMPUTE, FORECAST, PROLOGUE

UNGUIDED = f"{COMPUTE}_unguided"


@torch.no_grad()
def test_every_compute_graph_is_planned_with_what_left_it(toy_split):
    twice = toy_split.with_modules(**toy_split.modules, **{UNGUIDED: copy_module(toy_split.modules[COMPUTE])})
    graphs = engine(linear(twice), IO)
    plans = {plan.name: plan for plan in plan_engines(graphs, example_inputs(), "latents", STEPS)}
    assert list(plans) == [PROLOGUE, COMPUTE, UNGUIDED, FORECAST, ADVANCE]
    compute, unguided = plans[COMPUTE], plans[UNGUIDED]
    assert unguided.signature == compute.signature
    assert {"step_values", "delta"} <= {spec.name for spec in unguided.signature.inputs}
    given = compute.program.example_inputs[1]
    wanted, got = (plan.program.module()(**given)["velocity"] for plan in (compute, unguided))
    assert torch.equal(got, wanted)


class Skips(Predictor):
    """Does not read the second newest feature."""

    def forward(self, features, history_steps, sigmas, step):
        return features[0] * history_steps[2] - features[2]


def test_a_predictor_need_not_read_every_feature(toy_split):
    graphs = engine(add_predictor(toy_split, Skips(), 3), IO)
    (plan,) = [plan for plan in plan_engines(graphs, example_inputs(), "latents", STEPS) if plan.name == FORECAST]
    given = {spec.name: spec.shape for spec in plan.signature.inputs}
    assert {"feature_0", "feature_2"} <= given.keys()
    assert "feature_1" not in given
    assert given["history_steps"] == (3,)
