"""What a fit or a training leaves behind, and the file of a trained predictor: safetensors, with facts as metadata."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.numpy import load_file, save

from cachec.runtime.errors import PredictorError
from cachec.runtime.specs import Array

FORMAT = "cachec-predictor-1"
PRETRAINED = Path(__file__).parent / "pretrained"


@dataclass(frozen=True)
class Parameters:
    """Fitted or trained numbers of a method by name, and what they were fitted to.

    ``origin`` says where they come from, for messages.
    """

    arrays: Mapping[str, Array]
    facts: Mapping[str, str]
    origin: str


def predictor_bytes(parameters: Parameters) -> bytes:
    """The content of a predictor file."""
    content: bytes = save(dict(parameters.arrays), {**parameters.facts, "format": FORMAT})
    return content


def load_predictor(path: Path) -> Parameters:
    """Read a predictor file.

    Raises:
        PredictorError: it is missing or no predictor file.
    """
    if not path.is_file():
        raise PredictorError(f"predictor {path} does not exist: make one with cachec train")
    try:
        with safe_open(path, "np") as file:
            facts = dict(file.metadata() or {})
        arrays = load_file(path)
    except (SafetensorError, OSError) as error:
        raise PredictorError(f"{path} is not a safetensors file, or is damaged: {error}") from error
    if facts.get("format") != FORMAT:
        raise PredictorError(f"{path} is not a predictor file of this cachec ({FORMAT}): make one with cachec train")
    return Parameters(arrays, facts, str(path))


def check_fit(parameters: Parameters, wanted: Mapping[str, str]) -> None:
    """Raise ``PredictorError`` unless the predictor was trained for what is ``wanted`` (facts by name)."""
    reasons = [
        f"{name} is {_short(parameters.facts.get(name))}, wanted {_short(value)}"
        for name, value in wanted.items()
        if parameters.facts.get(name) != value
    ]
    if reasons:
        raise PredictorError(
            f"predictor {parameters.origin} was trained for something else: {'; '.join(reasons)}. "
            "Train one for these settings with cachec train"
        )


def find_pretrained(method: str, wanted: Mapping[str, str]) -> Parameters | None:
    """A predictor of a method that ships with the package and fits, if there is one."""
    for path in sorted(PRETRAINED.glob(f"{method}-*.safetensors")):
        parameters = load_predictor(path)
        if all(parameters.facts.get(name) == value for name, value in wanted.items()):
            return parameters
    return None


def _short(value: str | None) -> str:
    if value is None:
        return "unknown"
    return value if len(value) <= 60 else f"{value[:12]}…"
