"""What a fit or a training leaves behind, and the file of a trained predictor: safetensors, with facts as metadata."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from cachec.compiler.calibration.facts_file import FactsFile
from cachec.runtime.errors import PredictorError
from cachec.runtime.specs import Array

FILE = FactsFile("predictor", "cachec-predictor-1", "cachec train", PredictorError)
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
    """Read a predictor file.

    Raises:
        PredictorError: it is missing or no predictor file.
    """
    return Parameters(*FILE.read(path), str(path))


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
    """A predictor of a method that ships with the package and fits, if there is one.

    ``weights``: the hash of the model's, which is asked for only if everything else fits: it takes long.
    """
    for path in sorted(PRETRAINED.glob(f"{method}-*.safetensors")):
        parameters = load_predictor(path)
        fits = all(parameters.facts.get(name) == value for name, value in wanted.items())
        if fits and parameters.facts.get(WEIGHTS) == weights():
            return parameters
    return None
