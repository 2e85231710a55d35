"""What a bundle may have beside its transformer, text encoders, tokenizers, a decoder, and how pictures are made by them."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

from cachec.runtime.bundle import Manifest, Target
from cachec.runtime.errors import BundleError, InputError, shortened

FRAMES_A_SECOND = 16  # of a video, where nobody says


@dataclass(frozen=True)
class Component:
    """A part with engines of its own; ``memory``: bytes of ``weights`` and ``activations``, by engine."""

    targets: tuple[Target, ...]
    memory: Mapping[str, Mapping[str, int]]

    @property
    def weights(self) -> int:
        """Bytes of weights that its engines are over, the most that one has."""
        return max(one["weights"] for one in self.memory.values())

    @property
    def activations(self) -> int:
        """The most bytes of activations of one run."""
        return max(one["activations"] for one in self.memory.values())

    def to_json(self) -> dict[str, Any]:
        return {"targets": [target.to_json() for target in self.targets], "memory": dict(self.memory)}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        return cls(tuple(map(Target.from_json, data["targets"])), data["memory"])


@dataclass(frozen=True)
class TextFacts:
    """How prompts are read at one text length.

    ``tokens``: by tokenizer call its ``file`` and how it reads (``pictures/tokens.py``); ``graphs``: of each component whose
    engine is run on them, which one.
    """

    tokens: tuple[Mapping[str, Any], ...]
    graphs: Mapping[str, str]


@dataclass(frozen=True)
class PictureFacts:
    """How prompts become conditions and latents pictures.

    ``texts`` by number of text tokens. ``embedded``: conditions that are the guidance scale, times a factor. ``scale``: which
    setting the two branches of guidance are combined at. ``decoder``: the component whose engines are by size. ``classes``:
    what prompts are, if they are no texts (``pictures/classes.py``). ``encoder``: the component that makes latents of pictures,
    its engines by size, where the model begins with pictures as flows do: ``(1 - sigma) * latents + sigma * noise``.
    """

    texts: Mapping[str, TextFacts]
    embedded: Mapping[str, float]
    scale: str
    decoder: str
    classes: Mapping[str, Any] | None = None
    encoder: str | None = None

    def to_json(self) -> dict[str, Any]:
        texts = {length: {"tokens": list(one.tokens), "graphs": dict(one.graphs)} for length, one in self.texts.items()}
        body = {**vars(self), "texts": texts}
        return {name: value for name, value in body.items() if value is not None}

    @classmethod
    def of(cls, manifest: Manifest) -> Self:
        """Those of a bundle.

        Raises:
            InputError: it has none.
            BundleError: they are not whole.
        """
        data = manifest.pictures
        if not data:
            raise InputError(
                "the bundle has no text encoders and no decoder, so it takes conditions and gives latents: compile it with "
                "--components all, or use cachec run, which loads the pipeline's"
            )
        try:
            texts = {length: TextFacts(tuple(one["tokens"]), one["graphs"]) for length, one in data["texts"].items()}
            found = cls(texts, data["embedded"], data["scale"], data["decoder"], data.get("classes"), data.get("encoder"))
        except (KeyError, TypeError) as error:
            raise BundleError(
                f"the manifest does not say how pictures are made: {shortened(data)}. Compile it again"
            ) from error
        named = {found.decoder, found.encoder or found.decoder, *(name for one in texts.values() for name in one.graphs)}
        if missing := sorted(named - manifest.components.keys()):
            raise BundleError(f"pictures are made with {', '.join(missing)}, which the bundle lacks: compile it again")
        return found


def components_of(manifest: Manifest) -> dict[str, Component]:
    """Those of a bundle, by name."""
    return {name: Component.from_json(data) for name, data in manifest.components.items()}


def request_peaks(manifest: Manifest, weights: int, working: int, *, picture: bool = False) -> tuple[int, int]:
    """Bytes that a request of one sample takes at most, with all components kept, and with none.

    Engines keep what they took. ``weights`` and ``working``: the transformer's, and all else that it takes beside them.
    ``picture``: the request begins with one.
    """
    parts, facts = components_of(manifest), PictureFacts.of(manifest)
    decoder, encoder = parts.pop(facts.decoder), parts.pop(facts.encoder or "", None)
    coders = [decoder, encoder] if picture and encoder is not None else [decoder]
    reading = max((one.activations for one in parts.values()), default=0)
    texts = sum(one.weights for one in parts.values())
    kept = weights + texts + working + reading + sum(one.weights + one.activations for one in coders)
    phases = max(texts + reading, weights + working, *(one.weights + one.activations for one in coders))
    return kept, phases
