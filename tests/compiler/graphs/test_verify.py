"""--verify-passes: right passes pass, and one planted wrong pass per stage and kind is caught, by numbers or by the spec."""

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from toy import ToyDiT, example_inputs
from toy_bundle import IO, LAST_BLOCK, captured
from toy_model import SETTINGS, ToyModel

from cachec.compiler.graphs.capture import capture_model
from cachec.compiler.graphs.verify import Verifier, verify_twin
from cachec.compiler.methods.taylor import Taylor
from cachec.passes import (
    Equivalence,
    Pass,
    PassList,
    PassResult,
    Prune,
    Stage,
    canonical_passes,
    cast_passes,
    engine_passes,
    inline_passes,
    linear_passes,
    run_passes,
    split_passes,
)
from cachec.passes.base import copy_module, finish, outputs
from cachec.runtime.abi import ADVANCE, COMPUTE, FEATURE, FORECAST, MODEL, NEXT_LATENTS, PROLOGUE, VELOCITY
from cachec.runtime.errors import PassError

aten = torch.ops.aten


def verifier():
    with torch.no_grad():
        return Verifier(example_inputs(), IO, {VELOCITY: ToyDiT().eval()(**example_inputs())})


@pytest.fixture(scope="module")
def graphs():
    """The toy at every stage; each way there was verified."""
    watch = [verifier()]
    stages = {Stage.CAPTURED: capture_model(ToyDiT().eval(), example_inputs())}
    lists = [canonical_passes(), cast_passes(torch.float32)]
    stages[Stage.CANONICAL] = run_passes(stages[Stage.CAPTURED], lists, observers=watch)
    stages[Stage.SPLIT] = run_passes(stages[Stage.CANONICAL], [split_passes(LAST_BLOCK)], observers=watch)
    predictor = inline_passes(captured(Taylor(1).predictor(None), 2))
    stages[Stage.INLINED] = run_passes(stages[Stage.SPLIT], [predictor], observers=watch)
    stages[Stage.LINEAR] = run_passes(stages[Stage.SPLIT], [linear_passes()], observers=watch)
    stages[Stage.ENGINE] = run_passes(stages[Stage.LINEAR], [engine_passes(IO, Stage.LINEAR)], observers=watch)
    return stages


def grown(graph, node):
    return graph.call_function(aten.mul.Tensor, (node, 1.01))


def flipped(graph, node):
    return graph.call_function(aten.flip.default, (node, [-1]))


def turned(graph, node):
    return graph.call_function(aten.transpose.int, (node, -1, -2))


def rounded(graph, node):
    low = graph.call_function(aten.to.dtype, (node, torch.bfloat16))
    return graph.call_function(aten.to.dtype, (low, torch.float32))


@dataclass(frozen=True, eq=False)
class Wrong(Pass):
    """Does something to one result of one graph that it says it does not do."""

    name: ClassVar[str] = "wrong"
    graph: str
    result: str
    change: object

    def run(self, graphs):
        module = copy_module(graphs.modules[self.graph])
        results, end = outputs(module), next(iter(reversed(module.graph.nodes)))
        with module.graph.inserting_before(end):
            new = self.change(module.graph, results[self.result])
        new.meta = dict(results[self.result].meta)
        end.args = ({**results, self.result: new},)
        finish(module)
        return PassResult(graphs.with_modules(**{**graphs.modules, self.graph: module}), changed=True)


PLACES = [
    (Stage.CAPTURED, MODEL, VELOCITY),
    (Stage.CANONICAL, MODEL, VELOCITY),
    (Stage.SPLIT, COMPUTE, VELOCITY),
    (Stage.SPLIT, COMPUTE, FEATURE),
    (Stage.SPLIT, FORECAST, VELOCITY),
    (Stage.LINEAR, FORECAST, VELOCITY),
    (Stage.INLINED, FORECAST, FEATURE),
    (Stage.INLINED, FORECAST, VELOCITY),
    (Stage.ENGINE, COMPUTE, NEXT_LATENTS),
    (Stage.ENGINE, PROLOGUE, "compute_step_values"),
    (Stage.ENGINE, FORECAST, NEXT_LATENTS),
    (Stage.ENGINE, ADVANCE, NEXT_LATENTS),
]


@pytest.mark.parametrize("change", [grown, flipped, turned, rounded], ids=lambda change: change.__name__)
@pytest.mark.parametrize(("stage", "graph", "result"), PLACES, ids=lambda value: getattr(value, "value", value))
def test_a_wrong_pass_is_caught(graphs, stage, graph, result, change):
    watch = Verifier(example_inputs(), IO, {})
    if stage == Stage.INLINED:  # whose tail is compared with that of the split graphs
        watch(0, Prune(), PassResult(graphs[Stage.SPLIT], changed=False))
    watch(0, Prune(), PassResult(graphs[stage], changed=False))
    wrong = PassList(stage, (Wrong(graph, result, change),), stage, Equivalence.EXACT)
    with pytest.raises(PassError, match=r"^pass 'wrong' \(after none\)"):
        run_passes(graphs[stage], [wrong], observers=[watch])


def test_a_pass_that_may_round_may_not_do_more(graphs):
    watch = verifier()
    watch(0, Prune(), PassResult(graphs[Stage.SPLIT], changed=False))

    class Rounding(Wrong):
        equivalence = Equivalence.ROUNDING

    def nudged(graph, node):
        return graph.call_function(aten.mul.Tensor, (node, 1 + 3e-6))

    run_passes(graphs[Stage.SPLIT], [Rounding(COMPUTE, FEATURE, nudged)], observers=[watch])
    with pytest.raises(PassError, match="allowed is 1e-05"):
        run_passes(graphs[Stage.SPLIT], [Rounding(COMPUTE, FEATURE, rounded)], observers=[watch])


def test_a_thin_twin_shows_a_pass_that_is_wrong(monkeypatch):
    verify_twin(ToyModel(), SETTINGS)
    monkeypatch.setattr(Prune, "run", lambda _, graphs: Wrong(next(iter(graphs.modules)), VELOCITY, grown).run(graphs))
    with pytest.raises(PassError, match="pass 'prune' .*: velocity differs by"):
        verify_twin(ToyModel(), SETTINGS)
