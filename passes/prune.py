"""Drop what nothing uses: dead nodes, unread inputs, unreferenced parameters."""

from dataclasses import dataclass
from typing import ClassVar

from torch import fx

from cachec.passes.base import COMPUTE, GraphPass, Graphs, PassResult, copy_module, finish, placeholders


@dataclass(frozen=True)
class Prune(GraphPass):
    """The compute graph keeps all of its inputs: they are the request's interface. Other graphs lose unread ones."""

    name: ClassVar[str] = "prune"

    def run(self, graphs: Graphs) -> PassResult:
        copies = {name: copy_module(module) for name, module in graphs.modules.items()}
        changes = sum(self.edit(module) for name, module in copies.items() if name != COMPUTE)
        return PassResult(graphs.with_modules(**copies), changed=bool(changes))

    def edit(self, module: fx.GraphModule) -> int:
        finish(module)
        unread = [node for node in placeholders(module).values() if not node.users]
        for node in unread:
            module.graph.erase_node(node)
        finish(module)
        return len(unread)
