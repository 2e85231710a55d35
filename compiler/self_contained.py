"""Text encoders, tokenizers, decoder and encoder of pictures as components of a bundle, so that it makes pictures by itself.

All of it is compared with the pipeline before anything is built: tokens, conditions, pictures, latents of pictures.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from cachec.compiler.graphs.build_engines import build_targets, planned_sources
from cachec.compiler.graphs.components import (
    DECODER,
    ENCODER,
    LATENTS,
    PICTURES,
    ComponentGraph,
    decoder_graph,
    encoder_graph,
    text_graphs,
)
from cachec.compiler.models.base import LoadedModel, Settings
from cachec.compiler.models.from_pictures import FromPictures
from cachec.compiler.models.reading import PROBE, Reading
from cachec.compiler.request import Request
from cachec.engines.onnx_files import only_errors
from cachec.engines.targets import TargetName
from cachec.pictures.classes import Classes
from cachec.pictures.tokens import TokenReader
from cachec.runtime.bundle import Target
from cachec.runtime.components import Component, PictureFacts, TextFacts
from cachec.runtime.errors import InputError, PassError
from cachec.runtime.noise import make_noise
from cachec.runtime.specs import Array
from cachec.runtime.write import BundleWriter

log = logging.getLogger(__name__)

TOLERANCE = 1e-4  # of conditions, relative to the largest, and of pictures in [0, 1]
TRIED = (PROBE, "", "a red circle above " * 400)  # prompts on which the parts are compared with the pipeline
TALKING = ("cachec.compiler.models.lost_text", "transformers.tokenization_utils_base")  # of prompts that nobody asked for
SCALES = (1.5, 4.0)  # of guidance, at which conditions that are it are told
ONLY_SIZE = "any"  # what engines of components are named by in files, beside their own names


@dataclass(frozen=True, eq=False)
class Parts:
    """The graphs of a pipeline's parts: by component and engine. ``readers`` by text length."""

    graphs: Mapping[str, Mapping[str, ComponentGraph]]
    readers: Mapping[str, Sequence[TokenReader]]
    texts: Mapping[str, Mapping[str, str]]
    embedded: Mapping[str, float]
    scale: str
    tokenizers: Mapping[str, str]
    classes: Classes | None


def capture_parts(model: LoadedModel, request: Request) -> Parts | None:
    """The graphs of text encoders and decoder at all sizes of a request, if they are wanted.

    Raises:
        InputError: this model's cannot be captured, or do not give what the pipeline does; with the reason.
    """
    if not request.whole:
        return None
    try:
        return _capture(model, [one[0].settings for one in request.by_size.values()])
    except (InputError, PassError) as error:
        raise InputError(f"--components all: {error}. Compile with --components transformer; cachec run then loads the "
                         "pipeline's text encoders and decoder") from error  # fmt: skip


def _capture(model: LoadedModel, sizes: Sequence[Settings]) -> Parts:
    graphs: dict[str, dict[str, ComponentGraph]] = {}
    readers, texts, tokenizers = dict[str, Sequence[TokenReader]](), dict[str, dict[str, str]](), dict[str, str]()
    embedded: Mapping[str, float] = {}
    classes: Classes | None = None
    for settings in {one.text_tokens: one for one in reversed(sizes)}.values():
        length = str(settings.text_tokens)
        reading = model.reading(settings)
        some, classes = text_graphs(reading), reading.classes
        embedded = _check_texts(model, reading, some, settings)
        readers[length], texts[length] = reading.readers, {one.name: length for one in some}
        tokenizers |= {reader.facts.tokenizer: reading.file(reader.facts.tokenizer) for reader in reading.readers}
        for one in some:
            graphs.setdefault(one.name, {})[length] = one.cast(getattr(torch, settings.dtype))
    model.release_text_encoders()
    for settings in sizes:
        graph = decoder_graph(model, settings)
        _check_pictures(model, graph, settings)
        graphs.setdefault(DECODER, {})[settings.size] = graph.cast(getattr(torch, settings.dtype))
        if isinstance(model, FromPictures) and model.mixes(settings):
            graph = encoder_graph(model, settings)
            _check_latents(model, graph, settings)
            graphs.setdefault(ENCODER, {})[settings.size] = graph.cast(getattr(torch, settings.dtype))
    return Parts(graphs, readers, texts, embedded, model.branch_setting, tokenizers, classes)


def build_parts(
    parts: Parts | None, request: Request, writer: BundleWriter, beside: Sequence[Target], options: Any
) -> dict[str, Any]:
    """Build the engines of all parts; returns what the manifest says of them: ``components`` and ``pictures``.

    ``beside``: the targets of the transformer, which are theirs, too.
    """
    if parts is None:
        return {}
    targets = [TargetName(beside[0].backend)] if request.auto else request.targets
    components = {}
    for name, graphs in parts.graphs.items():
        plans = [graph.plan(engine) for engine, graph in graphs.items()]
        (sources,) = planned_sources({ONLY_SIZE: plans}, writer, request.settings.dtype, folder=f"components/{name}")
        built = build_targets(targets, sources, writer, request.device, options, late=request.late)
        components[name] = Component(built, {engine: graph.memory for engine, graph in graphs.items()}).to_json()
    files = {
        name: writer.add_bytes(f"components/{name}/tokenizer.json", text.encode()) for name, text in parts.tokenizers.items()
    }
    texts = {
        length: TextFacts(
            tuple({**reader.facts.to_json(), "file": files[reader.facts.tokenizer]} for reader in readers), parts.texts[length]
        )
        for length, readers in parts.readers.items()
    }
    classes = None if parts.classes is None else parts.classes.to_json()
    encoder = ENCODER if ENCODER in parts.graphs else None
    facts = PictureFacts(texts, parts.embedded, parts.scale, DECODER, classes, encoder)
    return {"components": components, "pictures": facts.to_json()}


def _check_texts(
    model: LoadedModel, reading: Reading, graphs: Sequence[ComponentGraph], settings: Settings
) -> Mapping[str, float]:
    """Compare the conditions of some prompts with the pipeline's; returns the factors of those that are the guidance scale."""
    names, made = model.io.conditions, dict[str, Array]()
    if reading.classes is not None:
        return {name: _factor(model, name, settings) for name in names if name != reading.classes.condition}
    for prompt in TRIED:
        made = _conditions(reading.readers, graphs, prompt)
        with only_errors(*TALKING):
            wanted = model.encode([prompt], settings, names)
        for name, value in made.items():
            _check_near(f"the condition {name} of {prompt[:40]!r}", value, wanted[name])
    return {name: _factor(model, name, settings) for name in names if name not in made}


def _conditions(readers: Sequence[TokenReader], graphs: Sequence[ComponentGraph], prompt: str) -> dict[str, Array]:
    tokens = {name: torch.from_numpy(array) for reader in readers for name, array in reader.read([prompt]).items()}
    return {name: value.cpu().numpy() for graph in graphs for name, value in graph.run(tokens).items()}


def _factor(model: LoadedModel, name: str, settings: Settings) -> float:
    """What a condition is times the guidance scale."""
    found = []
    for scale in SCALES:
        value = model.encode([PROBE], replace(settings, guidance=scale), [name])[name]
        found.append(float(value.reshape(-1)[0]) / scale if value.size == 1 else float("nan"))
    if not abs(found[0] - found[1]) <= 1e-6 * abs(found[0]):
        raise InputError(f"{model.spec.name} takes {name}, which is neither made of the prompt alone nor the guidance scale")
    return found[0]


def _check_pictures(model: LoadedModel, graph: ComponentGraph, settings: Settings) -> None:
    latents = make_noise(0, tuple(graph.examples[LATENTS].shape[1:]))[None]
    made = graph.run({LATENTS: torch.from_numpy(latents)})[PICTURES].cpu().numpy()
    _check_near("a picture", made, model.decode(latents, settings))


def _check_latents(model: FromPictures, graph: ComponentGraph, settings: Settings) -> None:
    made = graph.run(graph.examples)[LATENTS].cpu().numpy()
    _check_near("the latents of a picture", made, model.encode_pictures(graph.examples[PICTURES].numpy(), settings))


def _check_near(what: str, made: Array, wanted: Array) -> None:
    if made.shape != wanted.shape or made.dtype != wanted.dtype:
        raise InputError(f"{what} is {made.dtype}{list(made.shape)}, the pipeline's {wanted.dtype}{list(wanted.shape)}")
    error = float(np.abs(made.astype(np.float64) - wanted).max(initial=0.0))
    if not error <= TOLERANCE * max(1.0, float(np.abs(wanted).max(initial=0.0))):
        raise InputError(f"{what} is not the pipeline's: it differs by up to {error:.1e}")
