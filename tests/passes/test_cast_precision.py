"""Precision in the graph: which type every value has, and that rounding costs less than in a model cast as a whole."""

import copy
import functools
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import fx, nn
from toy import TOKENS, WIDTH, ToyDiT, example_inputs
from toy_bundle import LAST_BLOCK, add_predictor, split_toy, toy_program, write_bundle

import cachec
from cachec.compiler.graphs.build_engines import LooseSources
from cachec.compiler.graphs.capture import capture_model, named_model
from cachec.compiler.graphs.export import plan_engines
from cachec.compiler.graphs.forecast import engine_graphs, linear_graphs
from cachec.compiler.graphs.prepare import split_model
from cachec.compiler.methods.taylor import Taylor
from cachec.compiler.models import MODELS, load_model
from cachec.compiler.models.base import Settings
from cachec.engines import get_builder
from cachec.passes import CastPrecision, canonical_passes, run_passes, split_passes
from cachec.passes.base import depends_on_inputs, fetch, outputs, placeholders
from cachec.passes.cast_precision import NARROW, WIDE, operator_name
from cachec.runtime.abi import COMPUTE, FORECAST, MODEL, PROLOGUE
from cachec.runtime.noise import make_noise

aten = torch.ops.aten
LOW = (torch.bfloat16, torch.float16)
SETTINGS = Settings(64, 64, 16, 3.5, 4, "float32")
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
    return run_passes(capture(model, inputs), canonical_passes(dtype)).modules[MODEL]


@pytest.fixture(scope="module")
def flux():
    return load_model(MODELS["tiny-flux"])


class Loaded:
    """A model as it is, but for its transformer, which is in another precision."""

    def __init__(self, model, dtype):
        self._model, self.transformer = model, copy.deepcopy(model.transformer).to(dtype).eval()

    def __getattr__(self, name):
        return getattr(self._model, name)


@pytest.fixture(scope="module")
def loaded_flux(flux):
    """tiny-flux by the precision that it is loaded in."""
    low = {dtype: Loaded(flux, dtype) for dtype in LOW}
    return {torch.float32: flux, **low}.__getitem__


@pytest.fixture(scope="module")
def engines_of(loaded_flux):
    """Split and engine graphs of tiny-flux by the precision it is loaded in and the one it is compiled for."""

    @functools.cache
    def engines(loaded, dtype):
        model, settings = loaded_flux(loaded), replace(SETTINGS, dtype=str(dtype).removeprefix("torch."))
        split = split_model(model, settings)
        return split, engine_graphs(model, linear_graphs(model, split, settings), "all")

    return engines


@pytest.fixture(scope="module")
def plans_of(flux, engines_of):
    """Plans of tiny-flux's engines by precision."""

    @functools.cache
    def plans(dtype):
        graphs = engines_of(torch.float32, dtype)[1]
        return plan_engines(graphs, flux.example_inputs(SETTINGS), flux.io.latents, SETTINGS.steps)

    return plans


def hoist_inputs(graphs, inputs, timestep):
    """What the prologue gives the compute graph, with the model's own inputs."""
    prologue = graphs.modules[PROLOGUE]
    times = dict.fromkeys(("compute_timesteps", "forecast_timesteps"), inputs[timestep][:1])
    return {**inputs, **times}, placeholders(prologue)


@torch.no_grad()
def run_engines(graphs, inputs, timestep, dtype):
    """The compute graph behind the prologue; all samples have one timestep."""
    given, names = hoist_inputs(graphs, inputs, timestep)
    hoisted = run_typed(graphs.modules[PROLOGUE], {name: given[name] for name in names}, dtype)
    steps = {name: value[0] if len(graphs.axes[PROLOGUE][name]) > 1 else value for name, value in hoisted.items()}
    known = {**inputs, **{name.removeprefix("compute_"): value for name, value in steps.items()}, "delta": torch.ones(2)}
    return run_typed(graphs.modules[COMPUTE], known, dtype), hoisted


def flux_inputs(flux, number):
    """Real conditions, and noise of one time: a latent that a run begins with, or near."""
    time = (0.95, 0.6, 0.25)[number]
    prompts = ["a large red circle at the left on a dark background", "a blue ring above a white cross on a grey background"]
    conditions = {k: torch.from_numpy(v) for k, v in flux.encode(prompts, SETTINGS, flux.io.conditions).items()}
    generator = torch.Generator().manual_seed(number)
    return {
        "hidden_states": torch.randn(2, 64, 64, generator=generator),
        "timestep": torch.full((2,), time),
        **conditions,
    }


# --- tiny-flux


@pytest.mark.parametrize("dtype", LOW, ids=str)
@pytest.mark.parametrize("loaded", ["float32", "low"])
def test_types_and_errors_of_tiny_flux(flux, loaded_flux, engines_of, loaded, dtype):
    """After the split and in the engines' graphs; beside the model cast as a whole."""
    split, engines = engines_of(torch.float32 if loaded == "float32" else dtype, dtype)
    exact, plain = (named_model(t, flux.constants(SETTINGS)) for t in (flux.transformer, loaded_flux(dtype).transformer))
    errors = {"plain": [], "split": [], "engines": []}
    for number in range(3):
        inputs = flux_inputs(flux, number)
        with torch.no_grad():
            wanted, whole = exact(inputs)["velocity"], plain(inputs)["velocity"]
        computed = run_typed(split.modules[COMPUTE], inputs, dtype)
        made, _ = run_engines(engines, inputs, "timestep", dtype)
        for result in (computed, made):
            assert result["feature"].dtype == dtype
            assert result["velocity"].dtype == torch.float32
        assert made["next_latents"].dtype == torch.float32
        for name, value in (("plain", whole), ("split", computed["velocity"]), ("engines", made["velocity"])):
            errors[name].append(((value - wanted).norm() / wanted.norm()).square())
    rms = {name: torch.stack(values).mean().sqrt().item() for name, values in errors.items()}
    assert 0 < rms["split"] < rms["plain"]
    assert 0 < rms["engines"] < rms["plain"]


@pytest.mark.parametrize("dtype", LOW, ids=str)
def test_borders_of_the_engines_are_float32_but_for_what_stays_inside(plans_of, dtype):
    plans = plans_of(dtype)
    name = str(dtype).removeprefix("torch.")
    narrow = {spec.name for plan in plans for spec in (*plan.signature.inputs, *plan.signature.outputs) if spec.dtype == name}
    kept = {"feature", "features", "step_values", "compute_step_values", "forecast_step_values"}
    assert narrow == {*kept, "context_embedder", "compute_context_embedder"}
    others = {spec.dtype for plan in plans for spec in (*plan.signature.inputs, *plan.signature.outputs)} - {name}
    assert others == {"float32"}


def test_float32_is_left_alone(flux):
    before = run_passes(
        capture_model(flux.transformer, flux.example_inputs(SETTINGS), flux.constants(SETTINGS)), canonical_passes()
    )
    changed = []
    after = run_passes(
        before, [CastPrecision(torch.float32)], observers=[lambda i, one, result: changed.append(result.changed)]
    )
    assert after is before
    assert changed == [False]


@pytest.mark.parametrize("dtype", LOW, ids=str)
def test_weights_that_have_their_type_are_the_models_own(loaded_flux, engines_of, dtype):
    model, (split, _) = loaded_flux(dtype), engines_of(dtype, dtype)
    own = {id(parameter): name for name, parameter in model.transformer.named_parameters()}
    added = [name for name, parameter in split.modules[COMPUTE].named_parameters() if id(parameter) not in own]
    assert {name.rpartition(".")[2] for name in added} == {"weight_float32"}
    assert all(".norm_" in name for name in added)


def test_the_model_stays_as_it_is_and_converted_weights_are_shared():
    model = ToyDiT().eval()
    before = {name: (id(p), p.dtype) for name, p in model.named_parameters()}
    split = run_passes(capture(model), split_passes(LAST_BLOCK, torch.bfloat16))
    assert {name: (id(p), p.dtype) for name, p in model.named_parameters()} == before
    compute, forecast = (dict(split.modules[name].named_parameters()) for name in (COMPUTE, FORECAST))
    assert all(compute[name] is parameter for name, parameter in forecast.items())
    shared = forecast["model.blocks.0.modulation.weight_bfloat16"]
    torch.testing.assert_close(shared.float(), model.blocks[0].modulation.weight, rtol=2**-8, atol=0)


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
    model = Rule(body).eval()
    inputs = inputs_of_rule()
    with torch.no_grad():
        wanted = model(**inputs)
    if loaded == "low":
        model = model.to(dtype)
    module = cast(model, dtype, inputs)
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
    graphs, inputs = run_passes(capture(Rule(body), inputs_of_rule()), canonical_passes(dtype)), inputs_of_rule()
    again = run_passes(graphs, [CastPrecision(dtype)])
    before, after = graphs.modules[MODEL], again.modules[MODEL]
    assert sorted(map(described, before.graph.nodes)) == sorted(map(described, after.graph.nodes))
    with torch.no_grad():
        assert torch.equal(before(**inputs)["velocity"], after(**inputs)["velocity"])


def described(node):
    value = node.meta.get("val")
    return str(node.target), str(value.dtype) if isinstance(value, torch.Tensor) else ""


def test_float64_becomes_float32_also_where_nothing_else_changes():
    inputs = inputs_of_rule()
    module = cast(Rule(rotate_in_float64), torch.float32, inputs)
    assert {aten.to.dtype, aten._to_copy.default}.isdisjoint(node.target for node in module.graph.nodes)
    got = run_typed(module, inputs, torch.float32)["velocity"]
    torch.testing.assert_close(got, Rule(rotate_in_float64)(**inputs), rtol=1e-5, atol=1e-6)


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
        split = split_toy(dtype=dtype)
        assert outputs(split.modules[COMPUTE])["feature"].meta["val"].dtype == dtype
        assert placeholders(split.modules[FORECAST])["feature"].meta["val"].dtype == dtype


# --- engines


def noise(*seeds):
    return np.stack([make_noise(seed, (TOKENS, WIDTH)) for seed in seeds])


@pytest.mark.parametrize(
    ("backend", "dtype", "distance"),
    [("eager", torch.bfloat16, 2e-2), ("eager", torch.float16, 2e-3), ("ort", torch.float16, 2e-3)],
)
def test_bundles_follow_eager_float32(tmp_path, backend, dtype, distance):
    method, latents = Taylor(order=1), []
    conditions = {"prompt": np.stack([make_noise(100 + seed, (WIDTH,)) for seed in (1, 2)])}
    for name, precision, engine in (("wanted", None, "eager"), ("low", dtype, backend)):
        graphs = add_predictor(split_toy(head_axis=True, dtype=precision), method.predictor(None), method.window)
        out = write_bundle(graphs, toy_program(graphs), method, tmp_path / name, engine)
        with cachec.load(out) as bundle:
            latents.append([bundle.denoise(conditions, [1, 2], level=level) for level in ("default", "uncached")])
    for got, wanted in zip(latents[1], latents[0], strict=True):
        assert 0 < np.linalg.norm(got - wanted) < distance * np.linalg.norm(wanted)


@torch.no_grad()
@pytest.mark.parametrize("dtype", LOW, ids=str)
def test_onnx_files_of_tiny_flux(tmp_path, flux, engines_of, plans_of, dtype):
    """They pass the checker; in float16, which ONNX Runtime has kernels for, they give what eager gives."""
    onnx = pytest.importorskip("onnx")
    graphs, plans, ort = engines_of(torch.float32, dtype)[1], plans_of(dtype), get_builder("ort")
    signatures = {plan.name: plan.signature for plan in plans}
    files = ort.build(LooseSources(plans, tmp_path), tmp_path)
    for path in files.values():
        onnx.checker.check_model(str(path), full_check=True)
    if dtype == torch.bfloat16:
        return
    inputs = flux_inputs(flux, 0)
    made, hoisted = run_engines(graphs, inputs, "timestep", dtype)
    engines = ort.engine.load(files, signatures)
    given, names = hoist_inputs(graphs, inputs, "timestep")
    got = call(engines["prologue"], {name: given[name] for name in names}, hoisted)
    check_near(got, hoisted)
    steps = {n.removeprefix("compute_"): v[0] if len(graphs.axes[PROLOGUE][n]) > 1 else v for n, v in hoisted.items()}
    known = {**inputs, **steps, "delta": torch.ones(2)}
    names = [spec.name for spec in signatures["compute"].inputs]
    check_near(call(engines["compute"], {name: known[name] for name in names}, made), made)
    tail = {
        "features": torch.stack([made["feature"], -made["feature"]]),
        "coefficients": torch.tensor([[[1.0, 0.25]], [[0.5, 0.25]]]),
        "bias": torch.tensor([0.1, 0.2]),
        "deltas": torch.tensor([-0.1, -0.2]),
        "hidden_states": inputs["hidden_states"],
        "step_values": hoisted["forecast_step_values"].expand(2, -1, -1).contiguous(),
    }
    wanted = graphs.modules[FORECAST](**tail)
    check_near(call(engines["forecast"], tail, wanted), wanted)


def call(engine, inputs, like):
    """What an engine gives for tensors, in buffers like those given."""
    results = {name: np.empty(tuple(value.shape), str(value.dtype).removeprefix("torch.")) for name, value in like.items()}
    engine.context().bind({name: value.contiguous().numpy() for name, value in inputs.items()}, results).run()
    return {name: torch.from_numpy(value) for name, value in results.items()}


def check_near(got, wanted):
    for name, value in wanted.items():
        assert got[name].dtype == value.dtype
        assert (got[name].float() - value.float()).norm() < 3e-3 * value.float().norm(), name
