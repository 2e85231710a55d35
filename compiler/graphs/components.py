"""The graphs of a pipeline's other parts: text encoders, from tokens to conditions, decoder and encoder of pictures.

All sizes are fixed, and the batch is one: a request's parts are the same whatever is asked for beside it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import fx, nn

from cachec.compiler.graphs.capture import capture_component
from cachec.compiler.graphs.costs import component_memory
from cachec.compiler.graphs.export import EnginePlan, plan_engine
from cachec.compiler.models.base import LoadedModel, Settings
from cachec.compiler.models.from_pictures import FromPictures
from cachec.compiler.models.reading import PROBE, Reading
from cachec.passes import Graphs, component_passes, run_passes
from cachec.passes.base import backward_slice, copy_module, finish, outputs, placeholders
from cachec.runtime.abi import MODEL
from cachec.runtime.errors import InputError

SEVERAL = "text_encoders"  # what graphs of several encoders are called
LATENTS, PICTURES = "latents", "pictures"
DECODER, ENCODER = "vae_decoder", "vae_encoder"


@dataclass(frozen=True, eq=False)
class ComponentGraph:
    """A graph of the component ``name``, which may have others for other sizes; ``examples`` of its inputs."""

    name: str
    module: fx.GraphModule
    examples: Mapping[str, torch.Tensor]

    def cast(self, dtype: torch.dtype) -> "ComponentGraph":
        """In the form that engines are built from, and this precision."""
        module = run_passes(Graphs({MODEL: self.module}), component_passes(dtype)).modules[MODEL]
        return ComponentGraph(self.name, module, self.examples)

    def plan(self, engine: str) -> EnginePlan:
        """What an engine of this name is built from."""
        fixed: dict[str, tuple[str, ...]] = dict.fromkeys((*self.examples, *outputs(self.module)), ())
        return plan_engine(engine, self.module, self.examples, {engine: fixed})

    @property
    def memory(self) -> dict[str, int]:
        """Bytes of weights and, at most, of activations."""
        return component_memory(self.module)

    @torch.no_grad()
    def run(self, inputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """What the graph gives for one sample; of ``inputs`` those that are its own."""
        found: dict[str, torch.Tensor] = self.module(**{name: inputs[name] for name in self.examples})
        return found


def text_graphs(reading: Reading) -> list[ComponentGraph]:
    """The graphs of a pipeline's text encoders, one for those that are looked at together.

    Raises:
        PassError: they cannot be captured.
        InputError: what the pipeline does with prompts is not known.
    """
    if reading.classes is not None:
        return []
    examples = {name: torch.from_numpy(value) for reader in reading.readers for name, value in reader.read([PROBE]).items()}
    with torch.no_grad():
        names = tuple(reading.conditions(examples))
    captured = capture_component(reading.module(), examples, names)
    parts = [_part(captured, some) for some in _groups(captured)]
    return [ComponentGraph(_encoders(part), part, {name: examples[name] for name in placeholders(part)}) for part in parts]


def decoder_graph(model: LoadedModel, settings: Settings) -> ComponentGraph:
    """The graph of a pipeline's decoder at one size.

    Raises:
        PassError: it cannot be captured.
        InputError: there is none.
    """
    if model.decoder is None:
        raise InputError(f"{model.spec.name} has no decoder")
    latents = model.example_inputs(settings)[model.io.latents][:1].float().cpu()
    module = capture_component(_Decoding(model, settings), {LATENTS: latents}, (PICTURES,))
    return ComponentGraph(DECODER, module, {LATENTS: latents})


def encoder_graph(model: FromPictures, settings: Settings) -> ComponentGraph:
    """The graph of a pipeline's encoder of pictures at one size: from a picture [1, H, W, 3] in [0, 1] to latents.

    Raises:
        PassError: it cannot be captured.
    """
    picture = torch.rand(1, settings.height, settings.width, 3, generator=torch.Generator().manual_seed(0))
    module = capture_component(_Encoding(model, settings), {PICTURES: picture}, (LATENTS,))
    return ComponentGraph(ENCODER, module, {PICTURES: picture})


class _Encoding(nn.Module):
    """The autoencoder is its part, so that its weights are its own."""

    def __init__(self, model: FromPictures, settings: Settings) -> None:
        super().__init__()
        self.encoder = model.encoder
        self._model, self._settings = model, settings

    def forward(self, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {LATENTS: self._model.encoded(inputs[PICTURES], self._settings)}


class _Decoding(nn.Module):
    """The decoder is its part, so that its weights are its own."""

    def __init__(self, model: LoadedModel, settings: Settings) -> None:
        super().__init__()
        self.decoder = model.decoder
        self._model, self._settings = model, settings

    def forward(self, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {PICTURES: self._model.pictured(inputs[LATENTS], self._settings)}


def _groups(module: fx.GraphModule) -> list[list[str]]:
    """The outputs of a graph, those together that read one weight or one input."""
    groups: list[tuple[list[str], set[str]]] = []
    for name, node in outputs(module).items():
        reads = {str(one.target) for one in backward_slice([node]) if one.op in ("placeholder", "get_attr")}
        near = [group for group in groups if group[1] & reads]
        groups = [group for group in groups if group not in near]
        groups.append(([*(one for group in near for one in group[0]), name], reads.union(*(group[1] for group in near))))
    return [names for names, _ in groups]


def _part(module: fx.GraphModule, names: Sequence[str]) -> fx.GraphModule:
    """The graph of some of the outputs, with the inputs that they need."""
    part = copy_module(module)
    end = next(iter(reversed(part.graph.nodes)))
    end.args = ({name: node for name, node in outputs(part).items() if name in names},)
    needed = backward_slice([end])
    for node in reversed(part.graph.nodes):
        if node not in needed:  # also what is random, as attention is to FX
            part.graph.erase_node(node)
    finish(part)
    return part


def _encoders(module: fx.GraphModule) -> str:
    """What a graph is called: as the one part of the pipeline whose weights it reads."""
    read = {str(node.target).split(".")[0] for node in module.graph.nodes if node.op == "get_attr"}
    parts = {name for name in read if name.startswith("text_encoder")}
    return parts.pop() if len(parts) == 1 else SEVERAL
