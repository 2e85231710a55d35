"""Models by name, Hub id or directory, and the families that know how to load them."""

import inspect
import json
from collections.abc import Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from cachec.compiler.models.base import Family, LoadedModel, ModelSpec
from cachec.compiler.models.distilled import DISTILLED, as_distilled
from cachec.compiler.models.distribution import installed_models, located
from cachec.compiler.models.lora_files import LoraFile
from cachec.compiler.models.named import MODELS, PUBLISHED, TINY_FLUX_DIR
from cachec.runtime.errors import InputError, ModelUnavailableError, unknown_name
from cachec.runtime.registry import Registry

__all__ = [
    "FAMILIES",
    "MODELS",
    "TINY_FLUX_DIR",
    "find_directory",
    "find_model",
    "load_model",
    "outline_model",
    "wrap_pipeline",
]

INDEX = "model_index.json"

# by the class of the pipeline, which model_index.json names; cachec.register_family adds to them
FAMILIES = Registry(
    "kind of pipeline",
    "cachec.families",
    {
        "DiTPipeline": "cachec.compiler.models.dit:DiTModel",
        "Flux2KleinPipeline": "cachec.compiler.models.flux2:Flux2KleinModel",
        "Flux2Pipeline": "cachec.compiler.models.flux2:Flux2Model",
        "FluxKontextPipeline": "cachec.compiler.models.flux:FluxKontextModel",
        "FluxPipeline": "cachec.compiler.models.flux:FluxModel",
        "HunyuanVideo15Pipeline": "cachec.compiler.models.hunyuan_video_15:HunyuanVideo15Model",
        "HunyuanVideoPipeline": "cachec.compiler.models.hunyuan_video:HunyuanVideoModel",
        "PixArtSigmaPipeline": "cachec.compiler.models.pixart:PixArtModel",
        "QwenImageEditPipeline": "cachec.compiler.models.qwen_image:QwenImageEditModel",
        "QwenImagePipeline": "cachec.compiler.models.qwen_image:QwenImageModel",
        "StableDiffusion3Pipeline": "cachec.compiler.models.sd3:StableDiffusion3Model",
        "WanImageToVideoPipeline": "cachec.compiler.models.wan_image:WanImageModel",
        "WanPipeline": "cachec.compiler.models.wan:WanModel",
        "ZImagePipeline": "cachec.compiler.models.z_image:ZImageModel",
    },
)


def find_model(model: str) -> ModelSpec:
    """The spec of a short name, a local directory, or a Hub id (``owner/name``), with the defaults of its family.

    Short names are those of ``MODELS``, and of the pipelines in the distribution ``cachec-models``.

    Raises:
        InputError: it is none of these, with the nearest short name; or no family knows this kind of pipeline.
        ModelUnavailableError: the directory is missing or no pipeline, the Hub cannot be reached, or the model comes with
            ``cachec-models``, which is not installed.
    """
    if model in MODELS:
        return located(MODELS[model])
    if Path(model).is_dir():
        return _spec_of(Path(model).resolve(), model)
    if (shipped := dict(installed_models()).get(model)) is not None:
        return replace(_spec_of(shipped, model), packaged=True)
    if model.count("/") == 1 and not model.startswith(("/", ".")):
        directory = _download(model, allow_patterns=[INDEX, DISTILLED])
        return as_distilled(_find_family(directory, model).make_spec(model, model), directory)
    if Path(model).is_absolute():
        raise ModelUnavailableError(f"there is no directory {model}: pass the right one (cachec run and eval take --model)")
    raise unknown_name("model", model, [*MODELS, *dict(installed_models())])


def _spec_of(directory: Path, model: str) -> ModelSpec:
    return as_distilled(_find_family(directory, model).make_spec(directory.name, str(directory)), directory)


def load_model(spec: ModelSpec, *, with_transformer: bool = True, loras: Sequence[LoraFile] = ()) -> LoadedModel:
    """Load a model with the class of its family; without its transformer if only text and pictures are wanted.

    ``loras`` are fused with its weights.

    Raises:
        ModelUnavailableError: the weights cannot be reached, or are damaged.
        InputError: no family knows this kind of pipeline, or a LoRA does not fit.
    """
    directory = find_directory(spec, with_transformer=with_transformer)
    family = _find_family(directory, spec.source)
    try:
        model = family.load(spec, directory, with_transformer=with_transformer)
    except (OSError, ValueError, SafetensorError) as error:
        raise ModelUnavailableError(f"{spec.source} cannot be loaded: {error}") from error
    if loras:
        model.fuse(loras)
    return model


def outline_model(model: str) -> LoadedModel:
    """A model from its configuration alone: a short name, a directory, or a Hub id whose configuration ships. No network.

    Raises:
        InputError: it is none of these, with the nearest name; or no family knows this kind of pipeline.
        ModelUnavailableError: a configuration is missing or damaged.
    """
    named = find_model(model) if model in MODELS or model in dict(installed_models()) else None
    source = model if named is None else named.source
    directory = PUBLISHED.get(source, Path(source))
    if not directory.is_dir():
        raise unknown_name("model", model, [*MODELS, *PUBLISHED, "or a directory with its configuration files"])
    family = _find_family(directory, model)
    name = source if source in PUBLISHED else directory.resolve().name
    spec = named or as_distilled(family.make_spec(name, source if source in PUBLISHED else str(directory.resolve())), directory)
    try:
        return family.outline(spec, directory)
    except (OSError, ValueError, KeyError, AttributeError, SafetensorError) as error:
        raise ModelUnavailableError(f"the configuration of {model} cannot be read: {error}") from error


def wrap_pipeline(pipeline: Any) -> LoadedModel:
    """A pipeline that is in memory already.

    Raises:
        InputError: no family knows this kind of pipeline.
    """
    family = _family(type(pipeline).__name__, "the pipeline")
    origin = Path(str(getattr(pipeline.config, "_name_or_path", "")) or "-")
    spec = _packaged_at(origin) or as_distilled(family.make_spec(origin.name, str(origin)), origin)
    return family.wrap(spec, pipeline, origin if (origin / "transformer").is_dir() else None)


def _packaged_at(origin: Path) -> ModelSpec | None:
    """The model that ships in this directory, if one does."""
    own = (name for name, spec in MODELS.items() if spec.packaged and Path(spec.source) == origin)
    shipped = (name for name, directory in installed_models() if directory == origin)
    name = next(chain(own, shipped), None)
    return None if name is None else find_model(name)


def _find_family(directory: Path, source: str) -> type[Family]:
    try:
        index = json.loads((directory / INDEX).read_text(encoding="utf-8-sig"))
        kind: str = index["_class_name"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelUnavailableError(
            f"{source} is not a diffusers pipeline: its {INDEX} is missing or unreadable ({error})"
        ) from error
    return _family(kind, source)


def _family(kind: str, source: str) -> type[Family]:
    if kind not in FAMILIES and _is_of_diffusers(kind):
        from cachec.compiler.models.generic import GenericModel

        return GenericModel
    if kind not in FAMILIES:
        raise InputError(
            f"{source} is a {kind}; cachec knows {', '.join(FAMILIES)}, and pipelines of diffusers with a transformer"
        )
    family: type[Family] = FAMILIES[kind]
    return family


def _is_of_diffusers(kind: str) -> bool:
    """Is this a pipeline of diffusers around one transformer?"""
    import diffusers

    found = getattr(diffusers, kind, None)
    return found is not None and "transformer" in inspect.signature(found.__init__).parameters


def find_directory(spec: ModelSpec, *, with_transformer: bool = True) -> Path:
    """Where its files are, downloaded if need be. Raises as :func:`load_model`."""
    local = Path(located(spec).source)
    if local.is_dir():
        return local
    ignored = ["*.bin", "*.ckpt", "*.gguf", "*.onnx*", "flux1-*"]
    if not with_transformer:
        ignored.append("transformer/*.safetensors")  # most of the bytes
    return _download(spec.source, ignore_patterns=ignored)


def _download(source: str, **patterns: list[str]) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(source, **patterns))
    except Exception as error:  # of the Hub's client, or of whatever HTTP library this version of it uses
        raise ModelUnavailableError(_how_to_provide(source, error)) from error


def _how_to_provide(source: str, error: Exception) -> str:
    reason = str(error).strip().splitlines()[0]
    return (
        f"the weights of {source} cannot be reached ({reason}). Three ways to provide them: "
        f"(a) download once, with a Hub account that accepted the licence: hf auth login && hf download {source}; "
        "(b) pass a directory that holds the pipeline (model_index.json and its folders): cachec compile /path/to/model; "
        "(c) point HF_HOME at a Hugging Face cache that has it, copied from another machine"
    )
