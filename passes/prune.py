"""Drop what nothing uses: dead nodes, unread inputs, unreferenced parameters."""

from dataclasses import dataclass
from typing import ClassVar

from torch import fx

from cachec.passes.base import Graphs, Pass, PassResult, compute_graphs, finish, is_live, placeholders, writable
from cachec.runtime.abi import MODEL


@dataclass(frozen=True)
class Prune(Pass):
    """The model and compute graphs keep all of their inputs: they are the request's interface. Others lose unread ones."""

    name: ClassVar[str] = "prune"

    def run(self, graphs: Graphs) -> PassResult:
        pruned = dict[str, fx.GraphModule]()
        for name, module in graphs.modules.items():
            keeps_inputs = name == MODEL or name in compute_graphs(graphs)
            if all(map(is_live, module.graph.nodes)) and (keeps_inputs or not _unread(module)):
                continue
            pruned[name], _ = writable(graphs, name)
            pruned[name].graph.eliminate_dead_code()
            for node in [] if keeps_inputs else _unread(pruned[name]):
                pruned[name].graph.erase_node(node)
            finish(pruned[name])
        return PassResult(graphs.with_modules(**{**graphs.modules, **pruned}) if pruned else graphs, changed=bool(pruned))


def _unread(module: fx.GraphModule) -> list[fx.Node]:
    return [node for node in placeholders(module).values() if not node.users]
