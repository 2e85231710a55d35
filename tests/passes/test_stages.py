"""What is wrong at a stage is said, with its place; what is right is let through."""

from dataclasses import replace

import pytest
import torch
from torch import nn
from toy import TOKENS, WIDTH, ToyDiT, example_inputs
from toy_bundle import IO

from cachec.compiler.graphs.capture import capture_model
from cachec.compiler.graphs.prepare import compute_only, engine, linear
from cachec.passes import Stage, check_stage
from cachec.passes.base import copy_module, finish, outputs, placeholders
from cachec.runtime.abi import ADVANCE, COMPUTE, FEATURE, FORECAST, MODEL, VELOCITY
from cachec.runtime.errors import PassError

aten = torch.ops.aten


@pytest.fixture(scope="module")
def engines(toy_split):
    return engine(linear(toy_split), IO)


def changed(graphs, name, edit):
    module = copy_module(graphs.modules[name])
    edit(module)
    module.recompile()
    return graphs.with_modules(**{**graphs.modules, name: module})


def test_stages_of_the_toy_are_as_they_should(toy_split, engines):
    check_stage(toy_split, Stage.SPLIT)
    check_stage(compute_only(toy_split), Stage.SPLIT)
    check_stage(linear(toy_split), Stage.LINEAR)
    check_stage(engines, Stage.ENGINE)


def test_another_stage_is_refused(toy_split):
    with pytest.raises(PassError, match="the graphs are not linear after these: they are split"):
        check_stage(toy_split, Stage.LINEAR, after="these")


def test_asserts_and_writes_are_not_canonical():
    model = replace(capture_model(ToyDiT().eval(), example_inputs()), stage=Stage.CANONICAL)
    with pytest.raises(PassError, match="not canonical: model: _assert_tensor_metadata.* only checks"):
        check_stage(model, Stage.CANONICAL)


def test_graphs_that_are_missing_or_too_many_are_named(toy_split, engines):
    with pytest.raises(PassError, match="there is a graph 'advance'"):
        check_stage(toy_split.with_modules(**toy_split.modules, advance=engines.modules[ADVANCE]), Stage.SPLIT)
    with pytest.raises(PassError, match="there is no graph 'compute'"):
        check_stage(toy_split.with_modules(forecast=toy_split.modules[FORECAST]), Stage.SPLIT)


def test_results_are_named(toy_split):
    def drop(module):
        end = next(iter(reversed(module.graph.nodes)))
        end.args = ({VELOCITY: outputs(module)[VELOCITY]},)

    with pytest.raises(PassError, match="compute does not give 'feature'"):
        check_stage(changed(toy_split, COMPUTE, drop), Stage.SPLIT)


@pytest.mark.parametrize(("dtype", "message"), [(torch.float16, "velocity is torch.float16"), (torch.complex64, "complex")])
def test_types_are_checked(toy_split, dtype, message):
    def cast(module):
        value = outputs(module)[VELOCITY]
        value.meta = {**value.meta, "val": value.meta["val"].to(dtype)}

    with pytest.raises(PassError, match=message):
        check_stage(changed(toy_split, COMPUTE, cast), Stage.SPLIT)


def test_the_tail_reads_what_the_body_gives_and_shares_its_weights(toy_split):
    def widen(module):
        node = placeholders(module)[FEATURE]
        node.meta = {"val": torch.empty(2, TOKENS, 2 * WIDTH)}

    def own(module):
        name = next(name for name, _ in module.named_parameters())
        owner, _, last = name.rpartition(".")
        setattr(module.get_submodule(owner), last, nn.Parameter(torch.zeros(1)))

    with pytest.raises(PassError, match=r"compute gives a feature \[6, 8\] torch.float32, forecast reads \[6, 16\]"):
        check_stage(changed(toy_split, FORECAST, widen), Stage.SPLIT)
    alone = copy_module(toy_split.modules[FORECAST])
    alone = torch.fx.GraphModule({n: nn.Parameter(p.clone()) for n, p in alone.named_parameters()}, alone.graph)
    with pytest.raises(PassError, match="forecast holds .* for itself"):
        check_stage(toy_split.with_modules(**{**toy_split.modules, FORECAST: alone}), Stage.SPLIT)


def test_unread_inputs_of_engines_are_named(engines):
    def add(module):
        with module.graph.inserting_before(next(iter(module.graph.nodes))):
            module.graph.placeholder("idle")

    with pytest.raises(PassError, match="advance does not read idle"):
        check_stage(changed(engines, ADVANCE, add), Stage.ENGINE)


def test_the_sum_of_a_linear_forecast_is_marked(toy_split):
    with pytest.raises(PassError, match="the forecast feature is not marked: cut is None"):
        check_stage(replace(linear(toy_split), cut=None), Stage.LINEAR)


def test_a_model_in_several_low_types_is_refused(toy_split):
    model = capture_model(nn.Sequential(nn.Linear(WIDTH, WIDTH)).eval(), {"input": example_inputs()["latents"]})

    def mix(module):
        nodes = [node for node in module.graph.nodes if node.op == "get_attr"]
        for node, dtype in zip(nodes, (torch.float16, torch.bfloat16), strict=True):
            node.meta = {"val": node.meta["val"].to(dtype)}
        for node in [node for node in module.graph.nodes if "assert" in node.name]:
            module.graph.erase_node(node)

    broken = replace(changed(model, MODEL, mix), stage=Stage.CANONICAL)
    with pytest.raises(PassError, match=r"values of torch.bfloat16 and torch.float16 are mixed"):
        check_stage(broken, Stage.CANONICAL)
    finish(broken.modules[MODEL])
