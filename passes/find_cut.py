"""Find the value that crosses from the model's body to its tail."""

import difflib
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import fx

from cachec.passes.base import Graphs, Pass, PassResult, depends_on_inputs, outputs
from cachec.runtime.abi import MODEL, TOKENS
from cachec.runtime.errors import PassError


@dataclass(frozen=True)
class FindCut(Pass):
    """Mark the cut; change nothing.

    The cut is the one value that is computed under ``block`` (module path of the last block, as in ``named_modules``)
    and used outside of it. It is found by value, not by module set: a tail may call into a module of the body again, and
    that use stays in the tail.

    Not handled: a body that hands over several values. It is refused, with their names.
    """

    name: ClassVar[str] = "find_cut"
    block: str

    def run(self, graphs: Graphs) -> PassResult:
        module = graphs.modules[MODEL]
        varying = depends_on_inputs(module)
        inside = [n for n in module.graph.nodes if n in varying and n.op != "placeholder" and self._is_inside(n)]
        if not inside:
            raise PassError(f"no node of the graph is under block {self.block!r}.{self._suggest(module)}")
        members, end = set(inside), next(iter(reversed(module.graph.nodes)))
        kept = outputs(module).get(TOKENS)  # handed out beside what goes on to the tail
        leaves = {n: n.users.keys() - members - ({end} if n is kept else set()) for n in inside}
        crossing = [n for n in inside if isinstance(n.meta.get("val"), torch.Tensor) and leaves[n]]
        if len(crossing) != 1:
            names = ", ".join(f"{n.name} {list(n.meta['val'].shape)}" for n in crossing) or "none"
            raise PassError(f"block {self.block!r} must hand one value to the tail, it hands over: {names}")
        return PassResult(replace(graphs, cut=crossing[0].name), changed=False)

    def _is_inside(self, node: fx.Node) -> bool:
        return any(path == self.block or path.startswith(self.block + ".") for path in module_paths(node))

    def _suggest(self, module: fx.GraphModule) -> str:
        known = {path for node in module.graph.nodes for path in module_paths(node)}
        close = difflib.get_close_matches(self.block, known, n=1)
        return f" Did you mean {close[0]!r}?" if close else ""


def module_paths(node: fx.Node) -> list[str]:
    """Paths of the modules that a node was traced in, outermost first."""
    return [path for path, _ in node.meta.get("nn_module_stack", {}).values()]
