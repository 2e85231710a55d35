"""``make models``: what every family must do, on small random pipelines, as the table of ``docs/models.md``.

    python -m bench.models [FAMILY …] [--jobs 2] [--write]

Exits with 1 if a family fails a check. ``--write`` puts the table into the page. TensorRT for RTX builds twins (``TWINS``) only
where families are named, or the page is written.
"""

import argparse
import json
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "models.md"
BEGIN, END = "<!-- models -->", "<!-- end of models -->"
FULL_SIZE = ROOT / "bench" / "models-full.json"
SHORT = {"wan-2.1": "wan", "pixart-sigma": "pixart", "flux-2": "flux2", "flux-2-klein": "flux2-klein"}  # where names differ
TWINS = {  # of another family's transformer class and options that matter to its graphs: what builds one builds the other
    "flux-schnell": "flux",
    "flux-kontext": "flux",
    "qwen-image-edit": "qwen-image",
    "wan-2.2": "wan-2.1",
    "wan-2.2-5b": "wan-2.1",
    "flux-2-klein": "flux-2",
}
LONG = ("hunyuan-video", "hunyuan-video-1.5", "wan-2.1", "wan-2.2", "wan-2.2-5b", "wan-i2v")  # checked first, to end together
TRAINED = {"flux": "tiny-flux"}  # families of which a trained model was measured


def check_family(name: str, *, twins: bool) -> dict[str, Any]:
    """Every check of one family: what it found, and whether it passed. ``twins``: build engines of those, too."""
    import torch

    from bench.model_checks import CHECKS, RTX, Case
    from cachec.compiler.models import FAMILIES as KINDS
    from tests.families import FAMILIES
    from tests.outside import install

    torch.set_num_threads(1)
    family = next(one for one in FAMILIES if one.name == name)
    row: dict[str, Any] = {"family": name, "pipeline": family.pipeline, "checks": {}}
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        install(Path(folder) / "site")
        if family.pipeline not in KINDS:
            row["checks"] = {check: {"passed": False, "said": "no family"} for check in CHECKS}
            return row
        directory = Path(folder) / name
        family.make().save_pretrained(directory)
        case = Case(family, directory, Path(folder))
        for check, run in CHECKS.items():
            if check == RTX and name in TWINS and not twins:
                row["checks"][check] = {"passed": None, "said": f"as {TWINS[name]}"}
                continue
            try:
                found = run(case)
                row["checks"][check] = {"passed": found.passed, "said": found.said}
            except Exception as error:  # a row of the table, and an exit code
                row["checks"][check] = {"passed": False, "said": f"{type(error).__name__}: {error}".splitlines()[0]}
                row.setdefault("traces", []).append(traceback.format_exc())
    row["seconds"] = time.perf_counter() - start
    return row


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """In Markdown."""
    checks, planned = list(rows[0]["checks"]), json.loads(FULL_SIZE.read_text(encoding="utf-8"))
    titles = ["family", "pipeline", *checks, "full size planned", "trained quality", "real weights seen"]
    lines = [f"| {' | '.join(titles)} |", f"|{'---|' * len(titles)}"]
    for row in rows:
        words = {True: "yes", False: "no", None: "–"}
        cells = [f"{words[one['passed']]}: {one['said']}" for one in row["checks"].values()]
        full = planned.get(SHORT.get(row["family"], row["family"]))
        cells += ["no" if full is None else f"{full['parameters'] / 1e9:.2f} B", TRAINED.get(row["family"], "no"), "no"]
        lines.append(f"| {row['family']} | `{row['pipeline']}` | {' | '.join(cell.replace('|', '/') for cell in cells)} |")
    return "\n".join(lines)


def main() -> None:
    from tests.families import FAMILIES

    parser = argparse.ArgumentParser(prog="python -m bench.models", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("families", nargs="*")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--write", action="store_true", help="put the table into docs/models.md")
    asked = parser.parse_args()
    known = [family.name for family in FAMILIES]
    if unknown := sorted(set(asked.families) - set(known)):
        parser.error(f"there is no family {', '.join(unknown)}; known are {', '.join(known)}")
    names = asked.families or known
    os.environ.setdefault("TORCH_FAKE_TENSOR_DISPATCH_CACHE", "0")  # small graphs are captured faster without
    check = partial(check_family, twins=bool(asked.families) or asked.write)
    with ProcessPoolExecutor(asked.jobs, mp_context=get_context("spawn")) as pool:  # one that renews its processes may hang
        rows = []
        for row in pool.map(check, sorted(names, key=lambda name: name not in LONG)):
            rows.append(row)
            print(json.dumps({key: value for key, value in row.items() if key != "traces"}), flush=True)
            for trace in row.get("traces", ()):
                print(trace, file=sys.stderr, flush=True)
    made = table(sorted(rows, key=lambda row: names.index(row["family"])))
    print(made)
    if asked.write:
        before, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
        PAGE.write_text(f"{before}{BEGIN}\n\n{made}\n\n{END}{rest.partition(END)[2]}", encoding="utf-8")
    sys.exit(any(one["passed"] is False for row in rows for one in row["checks"].values()))


if __name__ == "__main__":
    main()
