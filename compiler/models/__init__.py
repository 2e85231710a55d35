"""Models by name, Hub id or directory."""

import importlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from cachec.compiler.models.base import LoadedModel, ModelSpec
from cachec.runtime.errors import InputError, ModelUnavailableError, unknown_name

TINY_FLUX_DIR = Path(__file__).parent / "tiny-flux"

MODELS = {
    "flux": ModelSpec("flux", "black-forest-labs/FLUX.1-dev"),
    "tiny-flux": ModelSpec(
        "tiny-flux",
        str(TINY_FLUX_DIR),
        height=64,
        width=64,
        text_tokens=16,
        prompts="shapes",
        packaged=True,
        probe=TINY_FLUX_DIR / "probe.safetensors",
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
    if Path(model).is_absolute():
        raise ModelUnavailableError(f"there is no directory {model}: pass the right one (cachec run and eval take --model)")
    raise unknown_name("model", model, MODELS)


def load_model(spec: ModelSpec, *, with_transformer: bool = True) -> LoadedModel:
    """Load a model with the class of its family; without its transformer if only text and pictures are wanted.

    Raises:
        ModelUnavailableError: the weights cannot be reached.
        InputError: no family knows this kind of pipeline.
    """
    _quiet_loading()
    directory = _directory(spec, with_transformer=with_transformer)
    kind = _pipeline_class(directory, spec)
    family = _family(kind, spec.source)
    try:
        loaded: LoadedModel = family.load(spec, directory, with_transformer=with_transformer)
    except (OSError, ValueError, SafetensorError) as error:
        raise ModelUnavailableError(f"{spec.source} cannot be loaded: {error}") from error
    return loaded


def wrap_pipeline(pipeline: Any) -> LoadedModel:
    """A diffusers pipeline that is in memory already.

    Raises:
        InputError: no family knows this kind of pipeline.
    """
    family = _family(type(pipeline).__name__, "the pipeline")
    origin = Path(str(getattr(pipeline.config, "_name_or_path", "")) or "-")
    packaged = next((spec for spec in MODELS.values() if spec.packaged and Path(spec.source) == origin), None)
    spec = packaged or replace(MODELS["flux"], name=origin.name, source=str(origin))
    loaded: LoadedModel = family(spec, pipeline, origin if (origin / "transformer").is_dir() else None)
    return loaded


def _family(kind: str, source: str) -> Any:
    if kind not in FAMILIES:
        raise InputError(f"{source} is a {kind}; cachec knows {', '.join(FAMILIES)}")
    module, _, attribute = FAMILIES[kind].partition(":")
    return getattr(importlib.import_module(module), attribute)


def _quiet_loading() -> None:
    """No progress bars for files that load in a second."""
    import diffusers
    import transformers

    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()


def _pipeline_class(directory: Path, spec: ModelSpec) -> str:
    path = directory / "model_index.json"
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
        kind: str = index["_class_name"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelUnavailableError(
            f"{spec.source} is not a diffusers pipeline: its model_index.json is missing or unreadable ({error})"
        ) from error
    return kind


def _directory(spec: ModelSpec, *, with_transformer: bool) -> Path:
    local = Path(spec.source)
    if local.is_dir():
        return local
    from huggingface_hub import snapshot_download

    ignored = ["*.bin", "*.ckpt", "*.gguf", "*.onnx*", "flux1-*"]
    if not with_transformer:
        ignored.append("transformer/*.safetensors")  # most of the bytes
    try:
        return Path(snapshot_download(spec.source, ignore_patterns=ignored))
    except Exception as error:  # of the Hub's client, or of whatever HTTP library this version of it uses
        raise ModelUnavailableError(_how_to_provide(spec, error)) from error


def _how_to_provide(spec: ModelSpec, error: Exception) -> str:
    reason = str(error).strip().splitlines()[0]
    return (
        f"the weights of {spec.source} cannot be reached ({reason}). Three ways to provide them: "
        f"(a) download once, with a Hub account that accepted the licence: hf auth login && hf download {spec.source}; "
        "(b) pass a directory that holds the pipeline (model_index.json and its folders): cachec compile /path/to/model; "
        "(c) point HF_HOME at a Hugging Face cache that has it, copied from another machine"
    )
