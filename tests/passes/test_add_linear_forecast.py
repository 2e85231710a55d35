"""The forecast as a sum over slots, whose weights are inputs."""

import torch
from toy import TOKENS, WIDTH, example_inputs
from toy_runs import random_past, tail_inputs

from cachec.compiler.graphs.prepare import linear
from cachec.passes import linear_passes, run_passes
from cachec.passes.base import outputs, placeholders
from cachec.runtime.abi import FORECAST


@torch.no_grad()
def test_the_linear_forecast_takes_any_batch_and_any_number_of_slots(toy_split):
    forecast = linear(toy_split).modules[FORECAST]
    for batch, slots in ((1, 1), (5, 4)):
        features = torch.stack(random_past(slots, batch, seed=0))
        inputs = {"features": features, "coefficients": torch.full((1, slots), 1 / slots), "bias": torch.tensor(0.1)}
        assert forecast(**inputs, **tail_inputs(forecast, batch))["velocity"].shape == (batch, TOKENS, WIDTH)


def test_the_linear_forecast_holds_the_tails_weights_and_nothing_else(toy_split):
    forecast = linear(toy_split).modules[FORECAST]
    assert {id(p) for p in forecast.parameters()} == {id(p) for p in toy_split.modules[FORECAST].parameters()}
    assert set(placeholders(forecast)) == {"features", "coefficients", "bias", "timestep", "prompt"}


class Scaled(torch.nn.Module):
    """A graph from feature to feature."""

    def __init__(self, factor):
        super().__init__()
        self.factor = torch.nn.Parameter(torch.full((WIDTH,), factor))

    def forward(self, feature):
        return {"feature": feature * self.factor}


@torch.no_grad()
def test_features_are_kept_in_a_code_and_decoded_behind_the_sum(toy_split):
    encode, decode = (torch.fx.symbolic_trace(Scaled(factor)) for factor in (4.0, 0.25))
    for graph in (encode, decode):
        feature = toy_split.modules["compute"].graph
        (value,) = [n.meta["val"] for n in feature.nodes if n is outputs(toy_split.modules["compute"])["feature"]]
        next(iter(graph.graph.nodes)).meta["val"] = value
        outputs(graph)["feature"].meta["val"] = value
    coded, plain = (run_passes(toy_split, [passes]) for passes in (linear_passes(encode, decode), linear_passes()))
    inputs = example_inputs()
    kept, feature = (graphs.modules["compute"](**inputs)["feature"] for graphs in (coded, plain))
    assert torch.equal(kept, 4 * feature)
    row = {"coefficients": torch.tensor([[0.5]]), "bias": torch.tensor(0.0)}
    forecasts = [
        graphs.modules[FORECAST](features=value[None], **row, **tail_inputs(graphs.modules[FORECAST], 2))["velocity"]
        for graphs, value in ((coded, kept), (plain, feature))
    ]
    assert torch.equal(*forecasts)
    assert {"encode_factor"} <= {name for name, _ in coded.modules["compute"].named_parameters()}
