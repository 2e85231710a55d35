"""Weights that others released: read safely, checked by name and shape, with their licences.

Only safetensors and, where an author released one, plain text are read. A pickled file runs code when it is opened, so it is
refused, with the line that converts it.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from cachec.compiler.methods.parameters import Parameters, check_fit, load_predictor
from cachec.runtime.errors import PredictorError, shortened
from cachec.runtime.specs import Array

log = logging.getLogger(__name__)

IMPORTED = "imported_from"  # the fact that tells imported parameters from fitted ones: file names with their hashes
LICENSE = "license"
NO_LICENSE = "none stated"
PICKLES = (b"PK\x03\x04", b"\x80")  # how files of torch.save begin
CONVERT = (
    'python -c "import sys, torch; from safetensors.torch import save_file; '
    "d = torch.load(sys.argv[1], map_location='cpu', weights_only=True); save_file({k: v.contiguous() for k, v in d.items() "
    "if torch.is_tensor(v)}, sys.argv[1] + '.safetensors')\" "
)
NON_COMMERCIAL = ("non-commercial", "noncommercial", "-nc", "by-nc")


@dataclass(frozen=True, eq=False)
class Released:
    """What a file held, as the method names it: ``arrays``, and ``facts`` (at least ``steps`` where they are of so many).

    ``license`` as far as it is known; a file's own metadata, and the user, know better.
    """

    arrays: Mapping[str, Array]
    facts: Mapping[str, str]
    license: str = NO_LICENSE


def load_given(path: Path, method: str, steps: int) -> Parameters:
    """A predictor file that is given. Of an imported one nothing but the method and the steps is known, and checked here.

    Raises:
        PredictorError: it is of another method; or imported, and of another number of steps.
    """
    if path.is_file():
        check_no_pickle(path)
    parameters = load_predictor(path)
    check_fit(parameters, {"method": method})
    if IMPORTED in parameters.facts:
        check_fit(parameters, {"steps": str(steps)} if "steps" in parameters.facts else {})
        log.warning("%s: from %s; licence: %s", path, parameters.facts[IMPORTED], parameters.facts.get(LICENSE, NO_LICENSE))
    return parameters


def is_non_commercial(license_text: str) -> bool:
    """Does a licence, by its usual names, not allow commercial use?"""
    return any(mark in license_text.lower() for mark in NON_COMMERCIAL)


def check_no_pickle(path: Path) -> None:
    """Raise ``PredictorError`` unless there is a file that is not pickled."""
    if not path.is_file():
        raise PredictorError(f"{path} does not exist, or is no file")
    with path.open("rb") as file:
        begin = file.read(4)
    if begin.startswith(PICKLES):
        raise PredictorError(
            f"{path} is pickled, which can run any code when it is read: convert it first, with {CONVERT}{path}"
        )


def read_tensors(path: Path) -> tuple[dict[str, Array], dict[str, str]]:
    """Tensors by name, in float32 or as whole numbers, and the metadata of a safetensors file.

    Raises:
        PredictorError: it is pickled, damaged or something else, or holds NaN or infinity.
    """
    check_no_pickle(path)
    try:
        with safe_open(path, "pt" if _has_bfloat16(path) else "np") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no mapping
            metadata = dict(file.metadata() or {})
    except (SafetensorError, OSError) as error:
        raise PredictorError(f"{path} is not a safetensors file, or is damaged ({error!r})") from error
    arrays = {name: _array(value) for name, value in tensors.items()}
    if bad := sorted(name for name, value in arrays.items() if not np.isfinite(value).all()):
        raise PredictorError(f"{path}: {bad[0]} holds NaN or infinity")
    return arrays, metadata


def _has_bfloat16(path: Path) -> bool:
    with safe_open(path, "np") as file:
        return any(file.get_slice(name).get_dtype() == "BF16" for name in file.keys())  # noqa: SIM118


def _array(value: Any) -> Array:
    """Numpy has no bfloat16, so tensors of such files come from torch."""
    if isinstance(value, np.ndarray):
        array: Array = value
    else:
        array = (value.float() if value.is_floating_point() else value).numpy()
    return array.astype(np.float32) if array.dtype.kind == "f" else array


def check_names(path: Path, found: Mapping[str, Array], wanted: Mapping[str, tuple[int, ...]]) -> None:
    """Raise ``PredictorError``, with what is missing, surplus or of another shape, unless a file holds what is ``wanted``."""
    wrong = [f"{name} is missing" for name in sorted(wanted.keys() - found.keys())]
    wrong += [f"{name} is surplus" for name in sorted(found.keys() - wanted.keys())]
    wrong += [
        f"{name} is {list(found[name].shape)}, expected {list(shape)}"
        for name, shape in wanted.items()
        if name in found and found[name].shape != shape
    ]
    if wrong:
        more = f", and {len(wrong) - 4} more" if len(wrong) > 4 else ""
        raise PredictorError(f"{path} does not fit: {'; '.join(wrong[:4])}{more}. Give the released file as it is")


def one_file(paths: Sequence[Path], method: str) -> Path:
    """Raise ``PredictorError`` unless there is one file."""
    if len(paths) != 1:
        raise PredictorError(
            f"{method} is released as one file, and {len(paths)} are given: {shortened(list(map(str, paths)))}"
        )
    return paths[0]
