"""Lists of passes: graphs are copied only if they are edited, and once; contracts and stages are checked around each."""

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from toy import ToyDiT, example_inputs

from cachec.compiler.graphs.capture import capture_model
from cachec.passes import (
    DropAsserts,
    Equivalence,
    GraphPass,
    MergeLinears,
    PassList,
    Prune,
    SimplifyShapes,
    Stage,
    canonical_passes,
    dump_to,
    graph_text,
    run_passes,
    split_passes,
)
from cachec.passes.base import compute_graphs
from cachec.runtime.abi import COMPUTE, FORECAST, MODEL
from cachec.runtime.errors import PassError


@pytest.fixture(scope="module")
def captured():
    return capture_model(ToyDiT().eval(), example_inputs())


@pytest.fixture
def copies(monkeypatch):
    """How often a graph was copied."""
    made, real = [], torch.fx.Graph.graph_copy
    monkeypatch.setattr(torch.fx.Graph, "graph_copy", lambda *given: made.append(given) or real(*given))
    return made


def test_a_list_copies_a_graph_once_though_many_passes_edit_it(captured, copies):
    before = graph_text(captured.modules[MODEL])
    seen = []
    run_passes(captured, [canonical_passes()], observers=[lambda i, one, result: seen.append(result.changed)])
    assert sum(seen) > 1
    assert len(copies) == 1
    assert graph_text(captured.modules[MODEL]) == before


def test_what_nothing_changes_is_not_copied(captured, copies):
    graphs = run_passes(captured, [DropAsserts(), SimplifyShapes()])
    copies.clear()
    assert run_passes(graphs, [DropAsserts(), SimplifyShapes(), Prune()]) is graphs
    assert copies == []


@dataclass(frozen=True)
class Breaks(GraphPass):
    """Reads a node before it is made."""

    name: ClassVar[str] = "breaks"

    def places(self, module):
        return [next(node for node in module.graph.nodes if node.op == "call_function")]

    def edit(self, module, places):
        places[0].args = (next(iter(reversed(module.graph.nodes))).prev,)


def test_a_graph_that_is_not_one_any_more_is_refused_with_the_pass(captured):
    with pytest.raises(PassError, match=r"^pass 'breaks' \(after drop_asserts\): .*used before it has been defined"):
        run_passes(captured, [DropAsserts(), Breaks()])


def test_a_list_begins_and_ends_at_its_stages(captured):
    with pytest.raises(PassError, match="the graphs are not canonical: they are captured"):
        run_passes(captured, [split_passes("blocks.2")])
    graphs = run_passes(captured, [canonical_passes(), split_passes("blocks.2")])
    assert graphs.stage == Stage.SPLIT
    assert compute_graphs(graphs) == (COMPUTE,)
    lazy = PassList(Stage.CAPTURED, (SimplifyShapes(),), Stage.CANONICAL, Equivalence.ROUNDING)
    with pytest.raises(PassError, match="the graphs are not canonical after simplify_shapes: model: _assert"):
        run_passes(captured, [lazy])


def test_a_list_is_not_stricter_than_its_passes():
    with pytest.raises(PassError, match="a list that is exact holds merge_linears"):
        PassList(Stage.LINEAR, (Prune(), MergeLinears()), Stage.LINEAR, Equivalence.EXACT)


def test_dumps_are_numbered_through_all_lists(captured, tmp_path):
    watch = [dump_to(tmp_path)]
    graphs = run_passes(captured, [DropAsserts()], observers=watch)
    run_passes(run_passes(graphs, [canonical_passes()]), [split_passes("blocks.2")], observers=watch)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names[:2] == ["00-drop_asserts.model.txt", "01-find_cut.model.txt"]
    assert names[-1] == f"03-prune.{FORECAST}.txt"


def test_graphs_are_written_a_node_a_line_with_shapes():
    graph = torch.fx.Graph()
    value = graph.placeholder("x")
    value.meta["val"] = torch.empty(2, 3)
    graph.output(graph.call_function(torch.ops.aten.add.Tensor, (value, 1), {"alpha": 2}))
    assert graph_text(torch.fx.GraphModule({}, graph)).splitlines() == [
        "placeholder x = x() : [2, 3] float32",
        "call_function add_tensor = aten.add.Tensor(x, 1, alpha=2)",
        "output output = output(add_tensor)",
    ]


def test_an_error_names_the_failing_pass_and_those_before(captured):
    before = ", ".join(one.name for one in canonical_passes())
    with pytest.raises(PassError, match=rf"^pass 'find_cut' \(after {before}\): no node"):
        run_passes(captured, [canonical_passes(), split_passes("nowhere")])
