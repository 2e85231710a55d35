"""Models by name, Hub id or directory."""

import importlib
import importlib.util
import json
from dataclasses import replace
from pathlib import Path

from cachec.compiler.models.base import LoadedModel, ModelSpec
from cachec.runtime.errors import InputError, ModelUnavailableError, missing_extra, unknown_name

TINY_FLUX_DIR = Path(__file__).parent / "tiny-flux"

MODELS = {
    "flux": ModelSpec("flux", "black-forest-labs/FLUX.1-dev"),
    "tiny-flux": ModelSpec(
        "tiny-flux", str(TINY_FLUX_DIR), height=64, width=64, text_tokens=16, prompts="shapes", packaged=True
    ),
}

# pipeline class in model_index.json -> the family that knows it
FAMILIES = {"FluxPipeline": "cachec.compiler.models.flux:FluxModel"}


def find_model(model: str) -> ModelSpec:
    """The spec of a short name, a Hub id (``owner/name``) or a local directory.

    Raises:
        InputError: it is none of these; with the nearest short name.
    """
    if model in MODELS:
        return MODELS[model]
    if Path(model).is_dir():
        return replace(MODELS["flux"], name=Path(model).resolve().name, source=str(Path(model).resolve()))
    if model.count("/") == 1 and not model.startswith(("/", ".")):
        return replace(MODELS["flux"], name=model, source=model)
    raise unknown_name("model", model, MODELS)


def load_model(spec: ModelSpec, *, with_transformer: bool = True) -> LoadedModel:
    """Load a model with the class of its family; without its transformer if only text and pictures are wanted.

    Raises:
        MissingExtraError: diffusers or transformers is not installed.
        ModelUnavailableError: the weights cannot be reached.
        InputError: no family knows this kind of pipeline.
    """
    for package in ("torch", "diffusers", "transformers", "accelerate"):
        if importlib.util.find_spec(package) is None:
            raise missing_extra(package, "compile", f"loading {spec.name}")
    _quiet_loading()
    directory = _directory(spec)
    index = json.loads((directory / "model_index.json").read_text())
    kind = index.get("_class_name")
    if kind not in FAMILIES:
        raise InputError(f"{spec.source} is a {kind}; cachec knows {', '.join(FAMILIES)}")
    module, _, attribute = FAMILIES[kind].partition(":")
    family = getattr(importlib.import_module(module), attribute)
    try:
        loaded: LoadedModel = family(spec, directory, with_transformer=with_transformer)
    except (OSError, ValueError) as error:
        raise ModelUnavailableError(f"{spec.source} cannot be loaded: {error}") from error
    return loaded


def _quiet_loading() -> None:
    """No progress bars for files that load in a second."""
    import diffusers
    import transformers

    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()


def _directory(spec: ModelSpec) -> Path:
    local = Path(spec.source)
    if local.is_dir():
        if not (local / "model_index.json").is_file():
            raise ModelUnavailableError(f"{local} is not a diffusers pipeline: it has no model_index.json")
        return local
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(spec.source, ignore_patterns=["*.bin", "*.ckpt", "*.gguf", "*.onnx*", "flux1-*"]))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise ModelUnavailableError(_how_to_provide(spec, error)) from error


def _how_to_provide(spec: ModelSpec, error: Exception) -> str:
    reason = str(error).strip().splitlines()[0]
    return (
        f"the weights of {spec.source} cannot be reached ({reason}). Three ways to provide them: "
        f"(a) download once, with a Hub account that accepted the licence: hf auth login && hf download {spec.source}; "
        "(b) pass a directory that holds the pipeline (model_index.json and its folders): cachec compile /path/to/model; "
        "(c) point HF_HOME at a Hugging Face cache that has it, copied from another machine"
    )
