"""The input of a model that takes more than the state, put together in its graph."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from cachec.passes.base import Graphs, Pass, PassResult, emit, finish, outputs, placeholders, writable
from cachec.runtime.abi import MODEL, VELOCITY
from cachec.runtime.errors import PassError
from cachec.runtime.model_io import ModelIO

aten = torch.ops.aten


@dataclass(frozen=True)
class AssembleInput(Pass):
    """Join the state and ``io.parts`` along ``io.axis`` in front of the model; keep what of its output moves the state.

    The model was captured with the whole as its input, references included (Kontext, Edit, image to video). Afterwards that
    input is the state alone, and the parts are inputs of their own, conditions like others. ``sizes``: of the state and of
    each part along the axis.
    """

    name: ClassVar[str] = "assemble_input"
    io: ModelIO
    sizes: tuple[int, ...] = ()

    def requires(self, graphs: Graphs) -> None:
        names = placeholders(graphs.modules[MODEL])
        if not self.io.parts:
            return
        if self.io.latents not in names:
            raise PassError(f"the model has no input {self.io.latents!r}; it has {', '.join(names)}")
        if taken := names.keys() & set(self.io.parts):
            raise PassError(f"the model takes {', '.join(sorted(taken))} by itself: it is not a part of {self.io.latents}")
        whole = int(names[self.io.latents].meta["val"].shape[self.io.axis])
        if len(self.sizes) != 1 + len(self.io.parts) or sum(self.sizes) != whole:
            raise PassError(f"{self.io.latents} is {whole} long, its {1 + len(self.io.parts)} parts are {self.sizes}")

    def run(self, graphs: Graphs) -> PassResult:
        if not self.io.parts and self.io.output is None:
            return PassResult(graphs, changed=False)
        module, _ = writable(graphs, MODEL)
        if self.io.parts:
            self._join(module)
        if self.io.output is not None:
            self._keep(module, *self.io.output)
        finish(module)
        return PassResult(graphs.with_modules(**{**graphs.modules, MODEL: module}), changed=True)

    def ensures(self, graphs: Graphs) -> None:
        moved, state = (graphs_node.meta["val"].shape for graphs_node in self._ends(graphs.modules[MODEL]))
        if self.io.output is not None and moved[self.io.axis] != state[self.io.axis]:
            raise PassError(f"the output that is kept is {moved[self.io.axis]} long, {self.io.latents} {state[self.io.axis]}")

    def _ends(self, module: fx.GraphModule) -> tuple[fx.Node, fx.Node]:
        return outputs(module)[VELOCITY], placeholders(module)[self.io.latents]

    def _join(self, module: fx.GraphModule) -> None:
        graph, state = module.graph, placeholders(module)[self.io.latents]
        readers = list(state.users)
        parts: list[fx.Node] = [state]
        for name in self.io.parts:
            with graph.inserting_after(parts[-1]):
                parts.append(graph.placeholder(name))
        for node, value in zip(parts, state.meta["val"].split_with_sizes(self.sizes, self.io.axis), strict=True):
            node.meta = {**state.meta, "val": value}
        first = next(node for node in graph.nodes if node.op not in ("placeholder", "get_attr"))
        with graph.inserting_before(first):
            whole = emit(state, aten.cat.default, parts, self.io.axis)
        for reader in readers:
            reader.replace_input_with(state, whole)

    def _keep(self, module: fx.GraphModule, begin: int, end: int) -> None:
        results, last = outputs(module), next(iter(reversed(module.graph.nodes)))
        with module.graph.inserting_before(last):
            kept = emit(results[VELOCITY], aten.slice.Tensor, results[VELOCITY], self.io.axis, begin, end)
        last.args = ({**results, VELOCITY: kept},)
