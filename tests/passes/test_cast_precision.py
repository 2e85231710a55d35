"""Precision in the graph: which type every value has, and that rounding costs less than in a model cast as a whole.

Bundles in half precision are run in ``test_toy.py``.
"""

import functools

import pytest
import torch
from torch import fx, nn
from toy import TOKENS, WIDTH, ToyDiT, example_inputs
from toy_bundle import IO, LAST_BLOCK, split, split_toy

from cachec.compiler.graphs.capture import capture_model, named_model
from cachec.compiler.graphs.export import plan_engines
from cachec.compiler.graphs.prepare import engine, linear
from cachec.passes import CastPrecision, canonical_passes, cast_passes, run_passes
from cachec.passes.base import depends_on_inputs, fetch, outputs, placeholders
from cachec.passes.cast_precision import NARROW, SUMS, WIDE, operator_name
from cachec.runtime.abi import COMPUTE, FORECAST, MODEL, PROLOGUE

aten = torch.ops.aten
LOW = (torch.bfloat16, torch.float16)
EPSILON = {torch.bfloat16: 2**-8, torch.float16: 2**-11}


class Typed(fx.Interpreter):
    """Runs a graph and keeps the types that its floating values really have, by node."""

    def __init__(self, module):
        super().__init__(module)
        self.types = {}

    def run_node(self, node):
        value = super().run_node(node)
        values = value if isinstance(value, list | tuple) else [value]
        if node.op != "output":
            self.types[node] = {v.dtype for v in values if isinstance(v, torch.Tensor) and v.is_floating_point()}
        return value


@torch.no_grad()
def run_typed(module, inputs, dtype):
    """What the graph gives; checks the types of all of its values on the way."""
    typed = Typed(module)
    result = typed.run(*(inputs[name] for name in placeholders(module)))
    for node, types in typed.types.items():
        assert types <= {dtype, torch.float32}, node
        name = operator_name(node)
        assert not types or name not in NARROW or types == {dtype}, node
        assert not types or name not in WIDE or types == {torch.float32}, node
        if name in NARROW | WIDE:
            read = set().union(*(typed.types[value] for value in node.all_input_nodes))
            assert len(read) <= 1, (node, read)
    return result


def capture(model, inputs=None):
    return capture_model(model.eval(), example_inputs() if inputs is None else inputs)


def cast(model, dtype, inputs=None):
    """The graph of ``model`` in ``dtype``, as a module."""
    return run_passes(capture(model, inputs), [canonical_passes(), cast_passes(dtype)]).modules[MODEL]


@functools.cache
def split_whole(dtype):
    """A toy that is cast as a whole, and its graphs."""
    model = ToyDiT().eval().to(dtype)
    return model, split(model, example_inputs(), LAST_BLOCK, dtype)


@torch.no_grad()
def run_engines(graphs, inputs, dtype):
    """The compute graph behind the prologue; all samples have one timestep."""
    times = dict.fromkeys(("compute_timesteps", "forecast_timesteps"), inputs["timestep"][:1])
    prologue = graphs.modules[PROLOGUE]
    hoisted = run_typed(prologue, {name: {**inputs, **times}[name] for name in placeholders(prologue)}, dtype)
    steps = {name.removeprefix("compute_"): value[0] for name, value in hoisted.items()}
    return run_typed(graphs.modules[COMPUTE], {**inputs, **steps, "delta": torch.ones(2)}, dtype)


@pytest.mark.parametrize("dtype", LOW, ids=str)
@pytest.mark.parametrize("loaded", ["float32", "low"])
@torch.no_grad()
def test_types_and_errors_of_the_toy(loaded, dtype):
    """After the split and in the engines' graphs; beside the model cast as a whole."""
    exact, (whole, graphs) = ToyDiT().eval(), split_whole(dtype)
    if loaded == "float32":
        graphs = split_toy(dtype=dtype)
    engines = engine(linear(graphs), IO)
    errors = {"whole": [], "split": [], "engines": []}
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        inputs = {**example_inputs(), "latents": torch.randn(2, TOKENS, WIDTH, generator=generator)}
        inputs["timestep"] = torch.full((2,), (0.95, 0.6, 0.25)[seed])
        wanted, plain = (named_model(model, {})(inputs)["velocity"] for model in (exact, whole))
        computed, made = run_typed(graphs.modules[COMPUTE], inputs, dtype), run_engines(engines, inputs, dtype)
        for result in (computed, made):
            assert result["feature"].dtype == dtype
            assert result["velocity"].dtype == torch.float32
        assert made["next_latents"].dtype == torch.float32
        for name, value in (("whole", plain), ("split", computed["velocity"]), ("engines", made["velocity"])):
            errors[name].append(((value - wanted).norm() / wanted.norm()).square())
    rms = {name: torch.stack(values).mean().sqrt().item() for name, values in errors.items()}
    assert 0 < rms["split"] < 1.2 * rms["whole"]  # on a deep model it is well below
    assert 0 < rms["engines"] < 1.2 * rms["whole"]


@pytest.mark.parametrize("dtype", LOW, ids=str)
def test_borders_of_the_engines_are_float32_but_for_what_stays_inside(dtype):
    plans = plan_engines(engine(linear(split_toy(dtype=dtype)), IO), example_inputs(), "latents", 10)
    specs = [spec for plan in plans for spec in (*plan.signature.inputs, *plan.signature.outputs)]
    name = str(dtype).removeprefix("torch.")
    kept = {"feature", "features", "step_values", "compute_step_values", "forecast_step_values"}
    assert {spec.name for spec in specs if spec.dtype == name} == kept
    assert {spec.dtype for spec in specs} == {name, "float32"}


def test_float32_is_left_alone():
    before, changed = run_passes(capture(ToyDiT()), [canonical_passes()]), []
    after = run_passes(
        before, [CastPrecision(torch.float32)], observers=[lambda i, one, result: changed.append(result.changed)]
    )
    assert after is before
    assert changed == [False]


@pytest.mark.parametrize("dtype", LOW, ids=str)
def test_weights_that_have_their_type_are_the_models_own(dtype):
    model, graphs = split_whole(dtype)
    compute = graphs.modules[COMPUTE]
    own = {id(parameter) for parameter in model.parameters()}
    added = {name.removeprefix("model.") for name, parameter in compute.named_parameters() if id(parameter) not in own}
    assert added == {"norm_out.weight_float32", "norm_out.bias_float32"}


def test_the_model_stays_as_it_is_and_converted_weights_are_shared():
    model = ToyDiT().eval()
    before = {name: (id(p), p.dtype) for name, p in model.named_parameters()}
    graphs = split(model, example_inputs(), LAST_BLOCK, torch.bfloat16)
    assert {name: (id(p), p.dtype) for name, p in model.named_parameters()} == before
    compute, forecast = (dict(graphs.modules[name].named_parameters()) for name in (COMPUTE, FORECAST))
    assert all(compute[name] is parameter for name, parameter in forecast.items())
    shared = forecast["model.blocks.0.modulation.weight_bfloat16"]
    torch.testing.assert_close(shared.float(), model.blocks[0].modulation.weight, rtol=2**-8, atol=0)


def test_operators_that_are_listed_exist():
    assert [name for name in NARROW | WIDE | SUMS if not hasattr(aten, name)] == []


# --- the rules, one module of a few lines each


class Rule(nn.Module):
    """``body`` behind a linear layer and before another."""

    def __init__(self, body):
        super().__init__()
        torch.manual_seed(0)
        self.inside, self.outside = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.scale = nn.Parameter(torch.rand(WIDTH) + 0.5)
        self.norm = nn.LayerNorm(WIDTH)
        self.register_buffer("angles", torch.arange(TOKENS, dtype=torch.float64)[:, None] / 7)
        self.register_buffer("number", torch.tensor(0.5))
        self.register_buffer("numbers", torch.arange(TOKENS))
        self.register_buffer("mask", torch.full((TOKENS, TOKENS), torch.finfo(torch.float32).min).triu(1))
        self.body = body

    def forward(self, x, t):
        return self.outside(self.body(self, self.inside(x), t))


def inputs_of_rule():
    generator = torch.Generator().manual_seed(3)
    return {"x": torch.randn(2, TOKENS, WIDTH, generator=generator), "t": torch.rand(2, generator=generator)}


@functools.cache
def canonical_rule(body, dtype):
    """Of a module that was loaded in ``dtype``."""
    return run_passes(capture(Rule(body).to(dtype), inputs_of_rule()), [canonical_passes()])


def attend_by_hand(rule, x, t):
    return (x @ x.transpose(1, 2)).softmax(-1) @ x


def attend_masked(rule, x, t):
    return nn.functional.scaled_dot_product_attention(x[:, None], x[:, None], x[:, None], attn_mask=rule.mask)[:, 0]


def normalise_by_hand(rule, x, t):
    wide = x.float()
    return (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)).to(x.dtype) * rule.scale


def rotate(rule, x, t):
    return (x * rule.angles.cos().float() + x.flip(-1) * rule.angles.sin().float()).to(x.dtype)


def rotate_in_float64(rule, x, t):
    return (x.double() * rule.angles.cos() + x.flip(-1).double() * rule.angles.sin()).to(x.dtype)


def add_positions(rule, x, t):
    return x + rule.angles.to(x.dtype)


def add_normed_branch(rule, x, t):
    return x + rule.scale.tanh() * rule.norm(x * x)


def scale_branch(rule, x, t):
    return x + rule.scale * rule.inside(x)


def modulate(rule, x, t):
    scale = rule.inside(x[:, :1])
    return rule.norm(x) * (1 + scale) + scale


def embed_time(rule, x, t):
    told = t[:, None].float()
    return x + torch.cat([(told * 9).sin(), told.cos()], -1).to(x.dtype).repeat(1, 4)[:, None]


def halve(rule, x, t):
    return x * rule.number


def cast_numbers(rule, x, t):
    return x * rule.numbers.to(x.dtype)[:, None]


def pad(rule, x, t):
    return torch.cat([x, torch.zeros(x.shape[0], 1, WIDTH, dtype=x.dtype)], 1)[:, 1:] + x


def pad_in_float64(rule, x, t):
    return torch.cat([x, torch.zeros(x.shape[0], 1, WIDTH, dtype=torch.float64)], 1)[:, 1:].to(x.dtype)


L, F = "low", "float32"
RULES = {  # operator -> types of the values that it gives, in order
    attend_by_hand: {"matmul": [L, L], "softmax": [F]},
    attend_masked: {"scaled_dot_product_attention": [L]},
    normalise_by_hand: {"pow": [F], "mean": [F], "rsqrt": [F], "mul": [F, F]},
    rotate: {"mul": [F, F], "add": [F]},
    rotate_in_float64: {"mul": [F, F], "add": [F]},
    add_positions: {"add": [L]},
    add_normed_branch: {"layer_norm": [F], "mul": [L, F], "add": [L]},
    scale_branch: {"mul": [F], "add": [L]},
    modulate: {"layer_norm": [F], "mul": [F], "add": [L, F]},
    embed_time: {"sin": [F], "cos": [F], "cat": [F], "add": [L]},
    halve: {"mul": [L]},
    cast_numbers: {"mul": [F]},
    pad: {"add": [L]},
}


@pytest.mark.parametrize("loaded", ["float32", "low"])
@pytest.mark.parametrize("dtype", LOW, ids=str)
@pytest.mark.parametrize("body", RULES, ids=lambda body: body.__name__)
def test_rules(body, dtype, loaded):
    inputs = inputs_of_rule()
    with torch.no_grad():
        wanted = Rule(body)(**inputs)
    graphs = canonical_rule(body, dtype if loaded == "low" else torch.float32)
    module = run_passes(graphs, [cast_passes(dtype)]).modules[MODEL]
    got = run_typed(module, inputs, dtype)["velocity"]
    assert got.dtype == torch.float32
    assert ((got - wanted).norm() / wanted.norm()).item() < 4 * EPSILON[dtype]
    varying = depends_on_inputs(module)
    for name, types in RULES[body].items():
        found = [node.meta["val"].dtype for node in module.graph.nodes if operator_name(node) == name and node in varying]
        told = [dtype if kind == L else torch.float32 for kind in types]
        if loaded == "float32" or name not in ("mul", "add"):  # tables in low precision are loaded so
            assert found == told, name


@pytest.mark.parametrize("dtype", LOW, ids=str)
@pytest.mark.parametrize("body", RULES, ids=lambda body: body.__name__)
def test_casting_again_changes_nothing(body, dtype):
    inputs = inputs_of_rule()
    graphs = run_passes(canonical_rule(body, torch.float32), [cast_passes(dtype)])
    again = run_passes(graphs, [CastPrecision(dtype)])
    before, after = graphs.modules[MODEL], again.modules[MODEL]
    assert sorted(map(described, before.graph.nodes)) == sorted(map(described, after.graph.nodes))
    with torch.no_grad():
        assert torch.equal(before(**inputs)["velocity"], after(**inputs)["velocity"])


def described(node):
    value = node.meta.get("val")
    return str(node.target), str(value.dtype) if isinstance(value, torch.Tensor) else ""


def test_a_type_that_the_model_names_stays_wide():
    module = cast(Rule(pad), torch.bfloat16, inputs_of_rule())
    (zeros,) = (node for node in module.graph.nodes if operator_name(node) == "zeros")
    assert (zeros.kwargs["dtype"], zeros.meta["val"].dtype) == (torch.float32, torch.float32)


@pytest.mark.parametrize("body", [rotate_in_float64, pad_in_float64], ids=lambda body: body.__name__)
def test_float64_becomes_float32_also_where_nothing_else_changes(body):
    inputs = inputs_of_rule()
    module = cast(Rule(body), torch.float32, inputs)
    assert {aten.to.dtype, aten._to_copy.default}.isdisjoint(node.target for node in module.graph.nodes)
    got = run_typed(module, inputs, torch.float32)["velocity"]
    torch.testing.assert_close(got, Rule(body)(**inputs), rtol=1e-5, atol=1e-6)


def outgrow(rule, x, t):
    return rule.norm(x * 30000 + x * 30000)


@torch.no_grad()
def test_float16_saturates_where_the_residual_stream_outgrows_it():
    inputs = {**inputs_of_rule(), "x": 5 * torch.randn(2, TOKENS, WIDTH, generator=torch.Generator().manual_seed(0))}
    assert not Rule(outgrow).half()(*(value.half() for value in inputs.values())).isfinite().all()
    for dtype in LOW:
        module = cast(Rule(outgrow), dtype, inputs)
        assert run_typed(module, inputs, dtype)["velocity"].isfinite().all()
        assert (aten.clamp.default in {node.target for node in module.graph.nodes}) == (dtype == torch.float16)


def test_masks_stay_finite_in_float16():
    module = cast(Rule(attend_masked), torch.float16, inputs_of_rule())
    (mask,) = [fetch(module, node.target) for node in module.graph.nodes if str(node.target).endswith("mask_float16")]
    assert mask.min() == torch.finfo(torch.float16).min


def test_the_last_block_hands_over_one_value_in_low_precision():
    """Though the tail reads it in float32, and reads a value that the block reads too."""
    for dtype in LOW:
        graphs = split_toy(dtype=dtype)
        assert outputs(graphs.modules[COMPUTE])["feature"].meta["val"].dtype == dtype
        assert placeholders(graphs.modules[FORECAST])["feature"].meta["val"].dtype == dtype


@torch.no_grad()
def test_values_are_noted_as_a_run_gives_them_also_where_calls_repeat():
    module, inputs = cast(ToyDiT(), torch.bfloat16), example_inputs()

    class Compared(fx.Interpreter):
        def run_node(self, n):
            value, noted = super().run_node(n), n.meta.get("val")
            if isinstance(value, torch.Tensor) and n.op == "call_function":
                sizes = [len(value) if isinstance(size, torch.SymInt) else size for size in noted.shape]
                assert (noted.dtype, sizes) == (value.dtype, list(value.shape)), n
            return value

    Compared(module).run(*(inputs[name] for name in placeholders(module)))
