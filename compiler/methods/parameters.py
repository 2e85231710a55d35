"""What a fit or a training leaves behind, and the file of a trained predictor: safetensors, with facts as metadata."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from cachec.compiler.calibration.facts_file import FactsFile
from cachec.compiler.models.distribution import NAME, predictor_folders
from cachec.runtime.errors import PredictorError
from cachec.runtime.specs import Array

FILE = FactsFile("predictor", "cachec-predictor-1", "cachec train, or cachec import of released weights", PredictorError)
WEIGHTS = "weights_sha256"  # the fact that is the hash of a model's weights
PRETRAINED = Path(__file__).parent / "pretrained"


@dataclass(frozen=True, eq=False)
class Parameters:
    """Fitted or trained numbers of a method by name, and what they were fitted to.

    ``origin`` says where they come from, for messages.
    """

    arrays: Mapping[str, Array]
    facts: Mapping[str, str]
    origin: str


def predictor_bytes(parameters: Parameters) -> bytes:
    """The content of a predictor file."""
    return FILE.content(parameters.arrays, parameters.facts)


def load_predictor(path: Path) -> Parameters:
    """Read a predictor file; what it has in float16, as those that ship are, becomes float32.

    Raises:
        PredictorError: it is missing or no predictor file.
    """
    arrays, facts = FILE.read(path)
    return Parameters({name: _widened(array) for name, array in arrays.items()}, facts, str(path))


def _widened(array: Array) -> Array:
    return array.astype(np.float32) if array.dtype == np.float16 else array


def trained_array(parameters: Parameters | None, method: str, name: str) -> Array:
    """An array of a trained method.

    Raises:
        PredictorError: nothing was trained, or something else.
    """
    if parameters is None:
        raise PredictorError(f"{method} needs what was fitted to the model: run cachec train, or let cachec compile do it")
    if name not in parameters.arrays:
        raise PredictorError(f"{parameters.origin} holds no {name} of {method}: it has {sorted(parameters.arrays)}")
    return parameters.arrays[name]


def check_fit(parameters: Parameters, wanted: Mapping[str, str]) -> None:
    """Raise ``PredictorError`` unless the predictor was trained for what is ``wanted`` (facts by name)."""
    FILE.check(parameters.facts, wanted, parameters.origin)


def find_pretrained(method: str, wanted: Mapping[str, str], weights: Callable[[], str]) -> Parameters | None:
    """A predictor of a method that ships with cachec or with ``cachec-models`` and fits, if there is one; ``origin`` says so.

    ``weights``: the hash of the model's, which is asked for only if everything else fits: it takes long.
    """
    for ships, path in _shipped_files(method):
        parameters = load_predictor(path)
        fits = all(parameters.facts.get(name) == value for name, value in wanted.items())
        if fits and parameters.facts.get(WEIGHTS) == weights():
            return replace(parameters, origin=f"ships with {ships} ({path.name})")
    return None


def shipped_models(method: str) -> list[str]:
    """Names of the models that a predictor of a method ships for."""
    return sorted({load_predictor(path).facts.get("model", "") for _, path in _shipped_files(method)} - {""})


def _shipped_files(method: str) -> Iterator[tuple[str, Path]]:
    """(who it ships with, where it is) of each."""
    for ships, folder in (("cachec", PRETRAINED), *((NAME, folder) for folder in predictor_folders())):
        yield from ((ships, path) for path in sorted(folder.glob(f"{method}-*.safetensors")))
