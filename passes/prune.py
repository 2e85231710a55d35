"""Drop what nothing uses: dead nodes, unread inputs, unreferenced parameters."""

from dataclasses import dataclass
from typing import ClassVar

from torch import fx

from cachec.passes.base import Graphs, Pass, PassResult, copy_module, finish, placeholders
from cachec.runtime.abi import COMPUTE


@dataclass(frozen=True)
class Prune(Pass):
    """The compute graph keeps all of its inputs: they are the request's interface. Other graphs lose unread ones."""

    name: ClassVar[str] = "prune"

    def run(self, graphs: Graphs) -> PassResult:
        sizes = [len(module.graph.nodes) for module in graphs.modules.values()]
        copies = {name: copy_module(module) for name, module in graphs.modules.items()}
        for name, module in copies.items():
            finish(module)
            if name != COMPUTE:
                _drop_unread_inputs(module)
        pruned = {name: copy_module(module) for name, module in copies.items()}  # without attributes that nothing reads
        changed = [len(module.graph.nodes) for module in pruned.values()] != sizes
        return PassResult(graphs.with_modules(**pruned), changed=changed)


def _drop_unread_inputs(module: fx.GraphModule) -> None:
    for node in placeholders(module).values():
        if not node.users:
            module.graph.erase_node(node)
    finish(module)
