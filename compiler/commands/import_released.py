"""``cachec import``: weights that others released, as a predictor file of ours."""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

from cachec.compiler.methods import METHODS, get_method
from cachec.compiler.methods.parameters import Parameters, predictor_bytes
from cachec.compiler.methods.released import IMPORTED, LICENSE, NO_LICENSE, is_non_commercial
from cachec.runtime.errors import InputError
from cachec.runtime.files import check_file, write_file
from cachec.runtime.hashing import hashing
from cachec.runtime.version import VERSION

log = logging.getLogger(__name__)


def import_to_file(
    method: str,
    paths: Sequence[Path],
    out: Path,
    *,
    options: Mapping[str, str] | None = None,
    license_text: str | None = None,
    force: bool = False,
) -> list[tuple[str, str]]:
    """Write what the files at ``paths`` hold of a method to ``out``, for ``--predictor``. Returns the rows of a short table.

    ``options`` say what the files do not; ``license_text``, under which licence they are.

    Raises:
        InputError: nothing was released of the method.
        PredictorError: a file is pickled, damaged, or of something else.
        OutputError: ``out`` exists and ``force`` is not given, or it cannot be written.
    """
    kind = get_method(method)
    if kind.released is None:
        others = ", ".join(name for name in METHODS if get_method(name).released is not None)
        raise InputError(f"no weights of {method} are known to be released: cachec import reads those of {others}")
    check_file(out, force=force)
    found = kind.read_released(paths, options or {})
    with hashing(paths) as digests:
        known = [f"{path.name} (sha256 {digest})" for path, digest in zip(paths, digests(), strict=True)]
    stated = license_text or found.license
    facts = {
        **found.facts,
        "method": method,
        IMPORTED: ", ".join(known),
        LICENSE: stated,
        "made_by": f"cachec {VERSION}",
    }
    if stated == NO_LICENSE:
        log.warning("no licence is stated for these weights: ask their authors before you use them; --license notes one")
    elif is_non_commercial(stated):
        log.warning("these weights are not for commercial use (%s), and so is every bundle that is compiled with them", stated)
    write_file(out, predictor_bytes(Parameters(found.arrays, facts, str(out))))
    return [("predictor", str(out)), *((name, text) for name, text in facts.items() if name != "made_by")]
