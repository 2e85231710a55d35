"""Dead nodes, unread inputs and unread weights go; the request's interface stays."""

from torch import nn
from toy import WIDTH

from cachec.passes import Prune, run_passes
from cachec.passes.base import copy_module, outputs, placeholders
from cachec.runtime.abi import COMPUTE, FEATURE, FORECAST, VELOCITY


def with_dead_ends(split):
    """The toy's graphs, each with an input and a weight that nothing needs."""
    made = {}
    for name, module in split.modules.items():
        made[name] = copy_module(module)
        made[name].idle = nn.Parameter(outputs(module)[VELOCITY].meta["val"].new_empty(WIDTH))
        graph = made[name].graph
        with graph.inserting_before(next(iter(graph.nodes))):
            extra, idle = graph.placeholder("extra"), graph.get_attr("idle")
        with graph.inserting_before(next(iter(reversed(graph.nodes)))):
            graph.call_function(outputs(made[name])[VELOCITY].target, (extra, idle))
    return split.with_modules(**made)


def test_what_nothing_reads_goes_but_for_inputs_of_compute_graphs(toy_split):
    pruned = run_passes(with_dead_ends(toy_split), [Prune()])
    assert "extra" in placeholders(pruned.modules[COMPUTE])
    assert set(placeholders(pruned.modules[FORECAST])) == {FEATURE, "timestep", "prompt"}
    for name, module in pruned.modules.items():
        assert "idle" not in dict(module.named_parameters())
        assert len(module.graph.nodes) == len(toy_split.modules[name].graph.nodes) + (name == COMPUTE)


def test_graphs_without_dead_ends_are_handed_on(toy_split):
    assert run_passes(toy_split, [Prune()]) is toy_split
