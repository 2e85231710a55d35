"""The parts of a pipeline on disk, one by one: a folder each, of the class that ``model_index.json`` names."""

import importlib
import inspect
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import transformers
from accelerate import init_empty_weights
from diffusers.models.model_loading_utils import _fetch_remapped_cls_from_config
from safetensors import SafetensorError
from torch import nn

from cachec.compiler.models.shards import Stored, weight_files
from cachec.runtime.errors import ModelUnavailableError

INDEX = "model_index.json"
LAZY = ("transformer", "vae", "text_encoder", "image_encoder", "processor")  # begin of the names of what is loaded when wanted
AGAIN = "download the model again"


@dataclass(frozen=True)
class Components:
    """A pipeline's ``directory``; ``source`` names it in messages."""

    source: str
    directory: Path

    @property
    def index(self) -> dict[str, Any]:
        """What the pipeline is made of: of each component the library and the class; ``_class_name`` is its own."""
        index: dict[str, Any] = json.loads((self.directory / INDEX).read_text(encoding="utf-8-sig"))
        return index

    def has(self, name: str) -> bool:
        """Is there a component of this name? Pipelines can do without some."""
        entry = self.index.get(name)
        return isinstance(entry, list) and entry[0] is not None

    def kind(self, name: str) -> Any:
        """The class of a component.

        Raises:
            ModelUnavailableError: there is no such component or class.
        """
        entry = self.index.get(name)
        if not isinstance(entry, list) or len(entry) != 2 or not all(isinstance(part, str) for part in entry):
            raise ModelUnavailableError(f"{self.directory / INDEX} names no {name} ({entry!r}): {AGAIN}")
        try:
            return self._renamed(name, getattr(importlib.import_module(entry[0]), entry[1]))
        except (ImportError, AttributeError) as error:
            raise ModelUnavailableError(f"{name} of {self.source} is a {'.'.join(entry)}, which is not installed: another "
                                        "version of that library may have it") from error  # fmt: skip

    def _renamed(self, name: str, kind: Any) -> Any:
        """Older models name a class that diffusers has split up: PixArt and DiT were ``Transformer2DModel``."""
        if kind is not diffusers.Transformer2DModel:
            return kind
        return _fetch_remapped_cls_from_config(kind.load_config(self._folder(name), local_files_only=True), kind)

    def load(self, name: str) -> Any:
        """A component; a module with its weights, on the CPU, for evaluation.

        Raises:
            ModelUnavailableError: it is missing or damaged.
        """
        _quiet_loading()
        try:
            made = self.kind(name).from_pretrained(self._folder(name), local_files_only=True)
        except (OSError, ValueError, ImportError, SafetensorError) as error:  # Qwen's processor wants torchvision
            raise ModelUnavailableError(f"{name} of {self.source} cannot be loaded: {error}") from error
        return made.eval() if isinstance(made, nn.Module) else made

    def config(self, name: str) -> dict[str, Any] | None:
        """The configuration of a component of diffusers, if there is one."""
        if not (self.directory / name / "config.json").is_file():
            return None
        config: dict[str, Any] = self.kind(name).load_config(self.directory / name, local_files_only=True)
        return config

    def describe(self, name: str) -> nn.Module:
        """A component of diffusers as its configuration has it, with random weights."""
        kind, folder = self.kind(name), self._folder(name)
        module: nn.Module = kind.from_config(kind.load_config(folder, local_files_only=True))
        return module

    def count(self, name: str) -> int | None:
        """Parameters of a component, by its configuration, of an autoencoder those that decode; ``None``: it is not there."""
        folder = self.directory / name
        if not (folder / "config.json").is_file():
            return None
        kind = self.kind(name)
        with init_empty_weights():
            ours = hasattr(kind, "load_config")
            module = self.describe(name) if ours else kind(kind.config_class.from_pretrained(folder, local_files_only=True))
        return sum(one.numel() for one in getattr(module, "decoder", module).parameters())

    def open(self, name: str) -> Stored:
        """A component of diffusers whose weights stay on disk.

        Raises:
            ModelUnavailableError: a file is missing or damaged, or does not fit the configuration.
        """
        folder = self._folder(name)
        return Stored.open(lambda: self.describe(name), weight_files(self.source, folder), folder / "config.json")

    def pipeline(self, shown: Sequence[str], known: Mapping[str, nn.Module]) -> Any:
        """The pipeline with its scheduler and tokenizers alone; its constructor sees those ``shown``, without values.

        ``known``: those of them that are there already.
        """
        _quiet_loading()
        for name in self.index:
            if self.has(name):
                self._folder(name)  # which is asked for before anything slow, also of what is wanted later only
        kind, parts = self.pipeline_kind(), self._lazy(shown, known)
        made = kind.from_pretrained(self.directory, local_files_only=True, **parts)
        made.register_modules(**dict.fromkeys(parts))
        return made

    def outline(self, shown: Sequence[str], known: Mapping[str, nn.Module]) -> Any:
        """The pipeline with its scheduler alone, for what its configuration tells."""
        kind, index, parts = self.pipeline_kind(), self.index, self._lazy(shown, known)
        given: dict[str, Any] = {}
        for name, parameter in list(inspect.signature(kind.__init__).parameters.items())[1:]:
            entry = index.get(name)
            if name == "scheduler":
                given[name] = self.kind(name).from_pretrained(self._folder(name), local_files_only=True)
            elif entry is not None and not isinstance(entry, list):
                given[name] = entry  # an option
            elif parameter.default is parameter.empty or name in parts:
                given[name] = parts.get(name)
        made = kind(**given)
        made.register_modules(**dict.fromkeys(parts))
        return made

    def pipeline_kind(self) -> Any:
        """The pipeline's own class."""
        return getattr(diffusers, self.index["_class_name"])

    def _lazy(self, shown: Sequence[str], known: Mapping[str, nn.Module]) -> dict[str, Any]:
        """``None`` for what is loaded when it is wanted; those of ``shown`` whose configuration is there, without values."""
        named = [name for name, entry in self.index.items() if isinstance(entry, list)]
        parts: dict[str, Any] = {name: None for name in named if name.startswith(LAZY)}
        for name in shown:
            if name in known:
                parts[name] = known[name]
            elif name in parts and (self.directory / name / "config.json").is_file():
                with init_empty_weights():
                    parts[name] = self.describe(name)
        return parts

    def _folder(self, name: str) -> Path:
        folder = self.directory / name
        if not folder.is_dir():
            raise ModelUnavailableError(f"{self.source} is incomplete: {folder} is missing. {AGAIN.capitalize()}")
        return folder


def _quiet_loading() -> None:
    """No progress bars for files that load in a second."""
    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()
