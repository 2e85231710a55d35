import pytest
import torch
from toy import TOKENS, WIDTH, example_inputs
from toy_bundle import SCHEDULE, SIGMAS, STEPS, add_predictor, captured, histories

from cachec.compiler.graphs.prepare import linear
from cachec.compiler.methods.lesa import LesaPredictor
from cachec.compiler.methods.predictor import Predictor
from cachec.compiler.methods.reuse import Reuse
from cachec.compiler.methods.taylor import Taylor
from cachec.passes import InlinePredictor, binding_times, fold_step, linear_passes, run_passes
from cachec.passes.base import outputs, placeholders
from cachec.runtime.abi import FORECAST
from cachec.runtime.errors import PassError, PredictorError


def random_lesa():
    torch.manual_seed(3)
    return LesaPredictor(STEPS)


PREDICTORS = {
    "reuse": (Reuse().predictor(None), 1, False),
    "taylor-1": (Taylor(1).predictor(None), 2, False),
    "taylor-2": (Taylor(2).predictor(None), 3, False),
    "lesa": (random_lesa(), 8, True),
}
every_predictor = pytest.mark.parametrize(("predictor", "window", "feeds_back"), PREDICTORS.values(), ids=PREDICTORS.keys())


def tail_inputs(module, batch):
    return {name: value for name, value in example_inputs(batch).items() if name in placeholders(module)}


def unfolded_inputs(module, past, step, history):
    schedule = {"sigmas": torch.from_numpy(SIGMAS), "step": torch.tensor(step), "history_steps": torch.tensor(history)}
    values = {
        **schedule,
        **{f"feature_{i}": value for i, value in enumerate(past)},
        **tail_inputs(module, len(past[0])),
    }
    return {name: values[name] for name in placeholders(module)}


def fold(predictor, window, feeds_back=False):
    """The row [W] and the bias of every forecast, by step."""
    parts, sigmas = binding_times(captured(predictor, window)), torch.from_numpy(SIGMAS)
    return {step: fold_step(parts, sigmas, step, past) for step, past in histories(window, feeds_back=feeds_back).items()}


def random_past(window, batch, seed):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(batch, TOKENS, WIDTH, generator=generator) for _ in range(window)]


@every_predictor
@torch.no_grad()
def test_folded_equals_unfolded(toy_split, predictor, window, feeds_back):
    rows = fold(predictor, window, feeds_back)
    unfolded = add_predictor(toy_split, predictor, window).modules[FORECAST]
    folded = linear(toy_split).modules[FORECAST]
    for step, history in histories(window, feeds_back=feeds_back).items():
        past = random_past(window, 2, seed=step)
        wanted = unfolded(**unfolded_inputs(unfolded, past, step, history))["velocity"]
        row, bias = rows[step][0].float(), torch.tensor(rows[step][1])
        got = folded(features=torch.stack(past), coefficients=row[None], bias=bias, **tail_inputs(folded, 2))["velocity"]
        torch.testing.assert_close(got, wanted, atol=1e-5, rtol=1e-5)


@every_predictor
@torch.no_grad()
def test_rows_say_what_the_predictor_does(predictor, window, feeds_back):
    rows = fold(predictor, window, feeds_back)
    for step, history in histories(window, feeds_back=feeds_back).items():
        past = random_past(window, 2, seed=step)
        wanted = predictor(past, torch.tensor(history), torch.from_numpy(SIGMAS), torch.tensor(step))
        row, bias = rows[step]
        got = torch.einsum("w,w...->...", row.float(), torch.stack(past)) + bias
        torch.testing.assert_close(got, wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("order", "row"), [(0, [1.0]), (1, [3.0, -2.0])])
def test_rows_of_taylor_are_the_published_ones(order, row):
    rows = fold(Taylor(order).predictor(None), order + 1)
    assert rows[5][0].tolist() == row  # two steps after step 3, which is one after step 2
    assert SCHEDULE.compute == (0, 2, 3, 6)


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


def test_inlining_keeps_what_the_predictor_reads_as_inputs(toy_split):
    names = placeholders(add_predictor(toy_split, Taylor(1).predictor(None), 2).modules[FORECAST])
    assert set(names) == {"feature_0", "feature_1", "history_steps", "step", "timestep", "prompt"}


def test_adding_a_predictor_leaves_the_split_alone(toy_split):
    before = list(placeholders(toy_split.modules[FORECAST]))
    graphs = add_predictor(toy_split, random_lesa(), 8)
    assert list(placeholders(toy_split.modules[FORECAST])) == before
    assert graphs.modules["compute"](**example_inputs())["velocity"].shape == (2, TOKENS, WIDTH)


class Formula(Predictor):
    def __init__(self, formula):
        super().__init__()
        self.formula = formula
        self.register_buffer("channels", torch.linspace(0.5, 1.5, WIDTH))

    def forward(self, features, history_steps, sigmas, step):
        return self.formula(self, *features)


UNFOLDABLE = {
    "square": lambda p, f0, f1: f0 * f0,
    "product": lambda p, f0, f1: f0 * f1,
    "relu": lambda p, f0, f1: torch.relu(f0),
    "norm": lambda p, f0, f1: torch.nn.functional.layer_norm(f0, (f0.shape[-1],)) + f1,
    "mean over tokens": lambda p, f0, f1: f0 + f1.mean(dim=1, keepdim=True),
    "channels reversed": lambda p, f0, f1: f0.flip(-1) + f1,
    "growing by channel": lambda p, f0, f1: f0 * torch.cumsum(torch.ones_like(f0), -1) + f1,
    "weight per channel": lambda p, f0, f1: f0 * p.channels + f1,
    "bias per channel": lambda p, f0, f1: f0 + f1 + p.channels,
}


@pytest.mark.parametrize("formula", UNFOLDABLE.values(), ids=UNFOLDABLE.keys())
def test_a_predictor_that_is_not_one_number_per_feature_is_refused(formula):
    with pytest.raises(PredictorError, match="--fold none"):
        fold(Formula(formula), 2)


@pytest.mark.parametrize("formula", UNFOLDABLE.values(), ids=UNFOLDABLE.keys())
@torch.no_grad()
def test_any_predictor_can_stay_in_the_engine(toy_split, formula):
    predictor = Formula(formula)
    graphs = add_predictor(toy_split, predictor, 2)
    past = random_past(2, 2, seed=0)
    module = graphs.modules[FORECAST]
    result = module(**unfolded_inputs(module, past, 4, (2, 1)))
    assert torch.equal(result["feature"], formula(predictor, *past))
    tail = toy_split.modules[FORECAST]
    assert torch.equal(result["velocity"], tail(feature=result["feature"], **tail_inputs(tail, 2))["velocity"])


def test_an_affine_predictor_with_a_bias_folds():
    rows = fold(Formula(lambda p, f0, f1: 1.5 * f0 - 0.5 * f1 + 0.25), 2)
    row, bias = rows[SCHEDULE.forecast[0]]
    assert row.tolist() == pytest.approx([1.5, -0.5], abs=1e-12)
    assert bias == pytest.approx(0.25, abs=1e-12)


def test_a_predictor_is_inlined_once(toy_split):
    inline = InlinePredictor(captured(Reuse().predictor(None), 1))
    with pytest.raises(PassError, match="no input 'feature'; run split_model first"):
        run_passes(toy_split, [inline, inline])
