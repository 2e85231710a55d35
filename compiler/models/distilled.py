"""Distilled models on disk: pipelines in Hugging Face layout, with another transformer than that which they were made of.

A file beside ``model_index.json`` says their steps, their guidance, and how they were made.
"""

import json
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from cachec.compiler.models.base import ModelSpec
from cachec.compiler.models.named import MODELS
from cachec.runtime.errors import ModelUnavailableError, OutputError
from cachec.runtime.files import writing
from cachec.runtime.work import fresh_folder

DISTILLED = "distilled.json"
INDEX = "model_index.json"
TRANSFORMER = "transformer"


def as_distilled(spec: ModelSpec, directory: Path) -> ModelSpec:
    """The spec with the steps, the guidance scale and the sizes that the model in ``directory`` was distilled for, if it was.

    What its teacher learned from is credited, and its pictures are read as the teacher's are, if that has a short name.

    Raises:
        ModelUnavailableError: the file that says so is damaged.
    """
    if (facts := distilled_facts(directory)) is None:
        return spec
    names = ("steps", "guidance", "height", "width", "frames", "text_tokens", "prompts")
    kinds = {"guidance": float, "prompts": str}
    teacher = MODELS.get(str(facts.get("teacher")), spec)
    try:
        return replace(
            spec,
            sizes=(),
            credit=teacher.credit,
            probe=teacher.probe,
            **{name: kinds.get(name, int)(facts[name]) for name in names},
        )
    except (KeyError, TypeError, ValueError) as error:
        raise ModelUnavailableError(f"{directory / DISTILLED} is damaged ({error!r}): download or distil it again") from error


def distilled_facts(directory: Path) -> Mapping[str, Any] | None:
    """What the file says; ``None``: there is none.

    Raises:
        ModelUnavailableError: it is damaged.
    """
    path = directory / DISTILLED
    if not path.is_file():
        return None
    try:
        facts = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelUnavailableError(f"{path} is damaged ({error}): download or distil it again") from error
    return facts if isinstance(facts, Mapping) else {}


def check_place(out: Path, *, force: bool) -> None:
    """Raise ``OutputError`` if ``out`` is there already and may not be replaced."""
    with writing(out):
        if not out.exists() or (out.is_dir() and not any(out.iterdir())):
            return
    if not (out / DISTILLED).is_file():
        raise OutputError(f"{out} is there, and no distilled model, so it will not be replaced: choose another place with -o")
    if not force:
        raise OutputError(f"{out} is a distilled model already: pass --force to replace it, or choose another place with -o")


def write_distilled(
    source: Path, out: Path, transformer: Any, kind: tuple[str, str], facts: Mapping[str, Any], *, force: bool
) -> None:
    """Write the pipeline of the directory ``source`` with another ``transformer`` to ``out``: whole, or not at all.

    ``kind``: the transformer's module and class, as ``model_index.json`` is to name it.

    Raises:
        OutputError: ``out`` cannot be written, or is there already and may not be replaced.
    """

    def without(folder: str, names: list[str]) -> list[str]:
        return [name for name in names if name.startswith(".") or (name == TRANSFORMER and Path(folder) == source)]

    with fresh_folder(out.absolute().parent, f".{out.name}-") as folder, writing(out):
        made = folder / "whole"
        shutil.copytree(source, made, ignore=without)
        transformer.register_to_config(_name_or_path="")  # else it names a folder of the machine where it was made
        transformer.save_pretrained(made / TRANSFORMER)
        index = json.loads((made / INDEX).read_text(encoding="utf-8-sig"))
        (made / INDEX).write_text(json.dumps({**index, TRANSFORMER: list(kind)}, indent=2) + "\n", encoding="utf-8")
        (made / DISTILLED).write_text(json.dumps(dict(facts), indent=1) + "\n", encoding="utf-8")
        check_place(out, force=force)
        if out.exists():
            out.replace(folder / "replaced")
        made.replace(out)
