"""Trained predictors as files: safetensors, with the facts of their training as metadata."""

from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save

from cachec.compiler.methods.base import Method, Parameters
from cachec.runtime.errors import PredictorError

FORMAT = "cachec-predictor-1"
PRETRAINED = Path(__file__).parent / "pretrained"


def predictor_bytes(parameters: Parameters) -> bytes:
    """The content of a predictor file."""
    tensors = {name: tensor.contiguous() for name, tensor in parameters.tensors.items()}
    content: bytes = save(tensors, {**parameters.facts, "format": FORMAT})
    return content


def load_predictor(path: Path) -> Parameters:
    """Read a predictor file.

    Raises:
        PredictorError: it is missing or no predictor file.
    """
    if not path.is_file():
        raise PredictorError(f"predictor {path} does not exist: make one with cachec train")
    try:
        with safe_open(path, "pt") as file:
            facts = dict(file.metadata() or {})
        tensors = load_file(path)
    except (SafetensorError, OSError) as error:
        raise PredictorError(f"{path} is not a safetensors file, or is damaged: {error}") from error
    if facts.get("format") != FORMAT:
        raise PredictorError(f"{path} is not a predictor file of this cachec ({FORMAT}): make one with cachec train")
    return Parameters(tensors, facts, str(path))


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


def find_pretrained(method: type[Method], wanted: Mapping[str, str]) -> Parameters | None:
    """A predictor that ships with the package and fits, if there is one."""
    for path in sorted(PRETRAINED.glob(f"{method.name}-*.safetensors")):
        parameters = load_predictor(path)
        if all(parameters.facts.get(name) == value for name, value in wanted.items()):
            return parameters
    return None


def _short(value: str | None) -> str:
    if value is None:
        return "unknown"
    return value if len(value) <= 60 else f"{value[:12]}…"
