"""LoRA files: what they add to a transformer's weights, read and checked before anything slow.

The names of PEFT and diffusers are read here; others (kohya's, ComfyUI's, those of a model's first publishers) are brought to
them by diffusers' own converters, where the pipeline's class has one. Shapes: weights [N, …], ``R`` the rank.
"""

import json
import logging
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from cachec.compiler.models.lora_files import LoraFile
from cachec.compiler.models.shards import Shards, Stored, Update
from cachec.runtime.errors import InputError, ModelUnavailableError, in_one_line
from cachec.runtime.files import hash_file, read_text_file

log = logging.getLogger(__name__)

SHOWN = 3  # keys that a message names
ENCODERS = ("text_encoder", "lora_te")  # how names of layers of text encoders begin
OTHER_KINDS = {  # what names of tensors tell of other kinds of adapters; the first that is found
    r"dora_scale|lora_magnitude_vector": "DoRA",
    r"\.hada_": "LoHa",
    r"\.lokr_": "LoKr",
    r"\.b?oft_": "OFT",
    r"ia3_": "IA3",
    r"vera_lambda": "VeRA",
    r"lora_mid": "LoCon with a core (Tucker)",
    r"lora_embedding": "LoRA of embeddings",
    r"\.diff(_b)?$": "whole differences of weights",
    r"\.bias$": "biases (lora_bias)",
    r"norm\.scale$": "a control LoRA, with norms",
}
PAIR = re.compile(r"(?P<layer>.+)\.(lora_(?P<side>A|B)(\.\w+)?|lora[._](?P<kohya>down|up))\.weight")
ALPHA = re.compile(r"(?P<layer>.+)\.alpha")
KNOWN = re.compile(r".*(lora_[AB](\.\w+)?\.weight|lora_(down|up)\.weight|lora\d?\.(down|up)\.weight|\.alpha)")
PREFIXES = ("transformer.", "base_model.model.")  # of the names of diffusers, and of PEFT itself
CONFIG = "adapter_config.json"  # beside a file that PEFT itself wrote


def fuse_loras(stored: Stored, files: Sequence[LoraFile], pipeline: Any, part: str) -> Stored:
    """The transformer with all ``files`` fused; ``pipeline`` is the one that it is of, as ``part``; its class converts.

    Raises:
        InputError: a file is of other layers, of a format that is not known, or damaged; or two are the same.
    """
    updates: dict[str, list[Update]] = {}
    facts: list[Mapping[str, Any]] = []
    for file in files:
        digest = hash_file(file.path)
        if twice := [one["name"] for one in facts if one["sha256"] == digest]:
            raise InputError(f"lora {file.path} is the same as {twice[0]}: give it once, with the sum of the scales")
        if file.part not in (None, part):
            raise InputError(f"lora {file.path} is for {file.part}, and {type(pipeline).__name__} has no such transformer")
        which = {} if file.part is None else {"part": part}
        facts.append({"name": file.path.name, "sha256": digest, "scale": file.scale, **which})
        for name, update in _read_updates(file, digest, stored.module, pipeline).items():
            updates.setdefault(name, []).append(update)
    return stored.fused(updates, facts)


@dataclass(frozen=True)
class _Layer:
    """What a file says of one layer."""

    down: torch.Tensor
    up: torch.Tensor
    alpha: float | None


def _read_updates(file: LoraFile, digest: str, module: nn.Module, pipeline: Any) -> dict[str, Update]:
    """By name of a weight."""
    try:
        shards = Shards.open([file.path])
        tensors = {name: shards.read(name) for name in shards.places}
        with safe_open(file.path, framework="pt") as opened:
            metadata = opened.metadata() or {}
    except (ModelUnavailableError, SafetensorError) as error:
        raise InputError(f"lora {error}") from error
    tensors = _of_transformer(file, tensors)
    _check_kinds(file, tensors)
    modules = {name for name, _ in module.named_modules()}
    if _is_plain(tensors, modules):
        config = _config(file, metadata, peft=any(name.startswith(PREFIXES[1]) for name in tensors))
    else:
        tensors, config = _converted(file, tensors, pipeline), {}
    layers = _layers(file, tensors)
    if unknown := sorted(layers.keys() - modules):
        raise InputError(f"lora {file.path} is for other layers than {type(module).__name__} has: {_some(unknown)}. "
                         "Take one for this model")  # fmt: skip
    return {
        f"{name}.weight": _update(file, digest, name, layer, module.get_submodule(name), config)
        for name, layer in sorted(layers.items())
    }


def _of_transformer(file: LoraFile, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Without those of text encoders."""
    of_encoders = sorted(name for name in tensors if name.startswith(ENCODERS))
    rest = {name: tensor for name, tensor in tensors.items() if not name.startswith(ENCODERS)}
    if not rest:
        what = f"is for text encoders only ({_some(of_encoders)})" if of_encoders else "is empty"
        raise InputError(f"lora {file.path} {what}, and the transformer is what is compiled: leave it out")
    if of_encoders:
        log.warning(
            "lora %s: %d tensors of text encoders are not used (%s), prompts are encoded by the model's own",
            file.path.name, len(of_encoders), _some(of_encoders),
        )  # fmt: skip
    return rest


def _check_kinds(file: LoraFile, tensors: Mapping[str, torch.Tensor]) -> None:
    for mark, kind in OTHER_KINDS.items():
        if found := sorted(name for name in tensors if re.search(mark, name)):
            raise InputError(f"lora {file.path} holds {kind}, not only pairs of matrices ({_some(found)}): fuse it with the "
                             "tool that made it, and compile that model")  # fmt: skip
    if unknown := sorted(name for name in tensors if not KNOWN.fullmatch(name)):
        raise InputError(f"lora {file.path} is of an unknown format: {_some(unknown)}. Save it as diffusers does, with "
                         "transformer.LAYER.lora_A.weight and lora_B.weight")  # fmt: skip
    for name, tensor in tensors.items():
        if not tensor.isfinite().all():
            raise InputError(f"lora {file.path} holds NaN or infinity, in {name}: download it again")


def _is_plain(tensors: Mapping[str, torch.Tensor], modules: set[str]) -> bool:
    """Are these the names of diffusers or PEFT? Without the prefix of diffusers only if all are the transformer's."""
    if all(name.startswith(PREFIXES[0]) for name in tensors):
        return True
    found = [PAIR.fullmatch(_bare(name)) or ALPHA.fullmatch(_bare(name)) for name in tensors]
    return all(match is not None and match["layer"] in modules for match in found)


def _bare(name: str) -> str:
    for prefix in PREFIXES[::-1]:
        name = name.removeprefix(prefix)
    return name


def _converted(file: LoraFile, tensors: Mapping[str, torch.Tensor], pipeline: Any) -> dict[str, torch.Tensor]:
    """By the names of diffusers. Its converters multiply by alpha and drop it."""
    kind, known = type(pipeline), getattr(pipeline, "lora_state_dict", None)
    wrong = f"lora {file.path} is of a format that is not known for {kind.__name__} ({_some(sorted(tensors))}"
    heads = {"lora_unet_" if name.startswith("lora_unet_") else name.partition(".")[0] for name in tensors}
    if known is None or ("lora_unet_" in heads and len(heads) > 1):  # a converter passes over names that begin otherwise
        raise InputError(f"{wrong}): take one for this model, or save it as diffusers does")
    try:
        made: dict[str, torch.Tensor] = known(dict(tensors))
    except (ValueError, KeyError, IndexError, AssertionError, NotImplementedError, RuntimeError, TypeError) as error:
        raise InputError(f"{wrong}; diffusers: {in_one_line(error) or type(error).__name__}): take one for this model, or "
                         "save it as diffusers does") from error  # fmt: skip
    if not made:
        raise InputError(f"{wrong}): diffusers finds nothing in it that is for the transformer")
    return made


def _layers(file: LoraFile, tensors: Mapping[str, torch.Tensor]) -> dict[str, _Layer]:
    sides: dict[str, dict[str, torch.Tensor]] = {"down": {}, "up": {}, "alpha": {}}
    for name, tensor in tensors.items():
        if (found := PAIR.fullmatch(_bare(name))) is not None:
            side = found["kohya"] or {"A": "down", "B": "up"}[found["side"]]
        elif (found := ALPHA.fullmatch(_bare(name))) is not None:
            side = "alpha"
        else:
            raise InputError(f"lora {file.path} is of an unknown format: {name}")
        if found["layer"] in sides[side]:
            raise InputError(f"lora {file.path} holds several adapters, {found['layer']} twice: save one alone")
        sides[side][found["layer"]] = tensor
    down, up, alpha = sides.values()
    if several := sorted(name for name, value in alpha.items() if value.numel() != 1):
        raise InputError(f"lora {file.path} has more than one alpha for {_some(several)}: download it again")
    if alone := sorted((down.keys() ^ up.keys()) | (alpha.keys() - down.keys())):
        raise InputError(f"lora {file.path} is not whole: {_some(alone)} has not both matrices. Download it again")
    return {name: _Layer(down[name], up[name], float(alpha[name]) if name in alpha else None) for name in down}


def _update(file: LoraFile, digest: str, name: str, layer: _Layer, module: nn.Module, config: Mapping[str, Any]) -> Update:
    weight, down, up = getattr(module, "weight", None), tuple(layer.down.shape), tuple(layer.up.shape)
    shape: tuple[int, ...] = () if weight is None else tuple(weight.shape)
    rank = down[0] if down else 0
    if not rank or len(shape) < 2 or (up[:2], math.prod(up[2:]), down[1:]) != ((shape[0], rank), 1, shape[1:]):
        raise InputError(f"lora {file.path}: {name} has matrices {list(up)} and {list(down)}, which do not multiply to the "
                         f"weight {list(shape)}: it is of another model, or not whole")  # fmt: skip
    try:
        says = _by_pattern(config.get("rank_pattern"), name, config.get("r"))
        says = rank if says is None else int(says)
        alpha = layer.alpha
        if alpha is None:
            alpha = float(_by_pattern(config.get("alpha_pattern"), name, config.get("lora_alpha", rank)))
    except (ValueError, TypeError, AttributeError, re.error) as error:
        raise InputError(f"lora {file.path}: what it says of {name}'s rank and scale cannot be read ({in_one_line(error)}): "
                         "download it again") from error  # fmt: skip
    if says != rank:
        raise InputError(f"lora {file.path}: {name} is of rank {rank}, and the file says {says}: download it again")
    own = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
    scale = file.scale * own
    return Update(layer.down, layer.up, scale, (digest, name, scale))


def _by_pattern(patterns: Mapping[str, Any] | None, name: str, usual: Any) -> Any:
    """As PEFT chooses: a pattern is of the end of a layer's name."""
    for pattern, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", name):
            return value
    return usual


def _config(file: LoraFile, metadata: Mapping[str, str], *, peft: bool) -> dict[str, Any]:
    """What a file that diffusers or PEFT wrote says of its scale: diffusers in its metadata, PEFT in a file beside it.

    Raises:
        InputError: it cannot be read, or is of another kind than LoRA.
    """
    text, where = metadata.get("lora_adapter_metadata"), "its metadata"
    if text is None and peft:
        beside = file.path.with_name(CONFIG)
        if not beside.is_file():
            raise InputError(f"lora {file.path} was written by PEFT, which writes its scale to {CONFIG}: put that beside it")
        text, where = read_text_file(beside, "PEFT's configuration"), str(beside)
    try:
        said = json.loads(text or "{}")
        config = {str(name).removeprefix(PREFIXES[0]): value for name, value in said.items()}
    except (ValueError, AttributeError) as error:
        raise InputError(f"lora {file.path}: {where} cannot be read ({in_one_line(error)}): download it again") from error
    if config.get("use_dora") or config.get("peft_type", "LORA") != "LORA":
        kind = "DoRA" if config.get("use_dora") else config["peft_type"]
        raise InputError(f"lora {file.path} is {kind}, by {where}: fuse it with PEFT, and compile that model")
    return config


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return f"{', '.join(names[:SHOWN])}{more}"
