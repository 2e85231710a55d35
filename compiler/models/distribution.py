"""``cachec-models``, the second distribution: trained models and predictors that the wheel has no room for.

A checkout has it in ``reference/models``. It is looked for when something in it is asked for, and never imported.
"""

import importlib.util
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from cachec.compiler.models.base import ModelSpec
from cachec.runtime.errors import ModelUnavailableError

PACKAGE, NAME = "cachec_models", "cachec-models"
INSTALL = "pip install ./reference/models, in a checkout of cachec"
INDEX = "model_index.json"
SOURCE = f"{NAME}:"  # begin of the source of a model that is in it
PREDICTORS = "predictors"


def models_folder() -> Path | None:
    """Where it is installed; ``None``: it is not."""
    found = importlib.util.find_spec(PACKAGE)
    places = () if found is None else tuple(found.submodule_search_locations or ())
    return Path(places[0]) if places else None


def installed_models() -> Iterator[tuple[str, Path]]:
    """Names and directories of the pipelines in it."""
    folder = models_folder()
    for index in sorted(() if folder is None else folder.glob(f"*/{INDEX}")):
        yield index.parent.name, index.parent


def located(spec: ModelSpec) -> ModelSpec:
    """The spec of a model in the distribution with its directory as the source; any other as it is.

    Raises:
        ModelUnavailableError: it is not installed; with the command that does.
    """
    if not spec.source.startswith(SOURCE):
        return spec
    name = spec.source.removeprefix(SOURCE)
    if (directory := dict(installed_models()).get(name)) is None:
        raise ModelUnavailableError(f"{spec.name} comes with {NAME}, {_absent()}")
    return replace(spec, source=str(directory))


def predictor_folders() -> tuple[Path, ...]:
    """Where predictors are that it ships."""
    folder = models_folder()
    return () if folder is None else (folder / PREDICTORS,)


def _absent() -> str:
    folder = models_folder()
    return f"which is not installed: {INSTALL}" if folder is None else f"which is installed without it ({folder}): {INSTALL}"
