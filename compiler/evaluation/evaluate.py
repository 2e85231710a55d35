"""``cachec eval``: every level of a bundle beside the uncached run, other methods on its schedule, and plain solvers."""

import hashlib
import json
import statistics
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from tqdm import tqdm

from cachec.compiler.calibration.workers import Alone, Kept, Team, do_pieces
from cachec.compiler.evaluation.bench import BenchFacts, KeptPrompt, PromptResult, PromptTask, open_bench
from cachec.compiler.evaluation.error_by_step import ErrorCurve
from cachec.compiler.evaluation.probe import CaptionWords
from cachec.compiler.evaluation.summary import summarize
from cachec.compiler.models.base import LoadedModel
from cachec.runtime.bundle import Manifest
from cachec.runtime.program import Program
from cachec.runtime.session import LoadedBundle
from cachec.runtime.work import claim_work

Benches = Team[BenchFacts, PromptTask, PromptResult]


@dataclass(frozen=True, eq=False)
class Evaluation:
    """The table: one dictionary a row, and what it was measured on.

    ``programs`` by row; ``kept`` and ``errors`` (by row) only if pictures were asked for.
    """

    rows: tuple[dict[str, Any], ...]
    setting: Mapping[str, Any]
    programs: Mapping[str, Program] = field(default_factory=dict)
    kept: tuple[KeptPrompt, ...] = ()
    errors: Mapping[str, ErrorCurve] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        return {"rows": list(self.rows), "setting": dict(self.setting)}


def evaluate(
    loaded: LoadedBundle,
    model: LoadedModel,
    prompts: Sequence[str],
    *,
    seed: int,
    against: str,
    level: str | None = None,
    keep_pictures: int = 0,
    work: Path | None = None,
) -> Evaluation:
    """Measure the bundle on ``prompts``; prompt ``i`` has the noise of seed ``seed + i``.

    ``against`` names what to compare with (see :func:`parse_against`), at the number of computed steps of ``level``. The
    pictures of the first ``keep_pictures`` prompts are kept, and their error by step is measured. What was measured before an
    interruption lies in ``work``, if that is given, but for pictures.

    Raises:
        InputError: the model's weights are not those that the bundle was compiled from, or an entry cannot be compared.
    """
    with open_bench(loaded, model, against=against, level=level) as bench:
        found = measure(
            Alone(bench), loaded.manifest, prompts, seed=seed, against=against, keep_pictures=keep_pictures, work=work
        )
        return replace(found, programs=bench.programs, errors=bench.errors(found.kept))


def measure(
    benches: Benches,
    manifest: Manifest,
    prompts: Sequence[str],
    *,
    seed: int,
    against: str,
    keep_pictures: int = 0,
    work: Path | None = None,
) -> Evaluation:
    """The table of :func:`evaluate`, by benches of the bundle with this ``manifest``, wherever they are.

    Raises:
        InputError: a row gives NaN or infinity, or ``work`` holds another evaluation.
        OutputError: another process evaluates in ``work``, or it cannot be written.
        EngineError: all workers died.
    """
    of, size = benches.facts, benches.size
    tasks = [PromptTask(index, prompt, seed + index, index < keep_pictures) for index, prompt in enumerate(prompts)]
    pieces = {f"prompt-{task.index:04d}.json": task for task in tasks}
    kept = Kept(work, PromptResult.content, PromptResult.read)
    claimed = {
        "bundle": _digest([entry["sha256"] for _, entry in sorted(manifest.files.items())]),
        "prompts": _digest(prompts),
        "seed": str(seed),
        "against": against,
        "setting": json.dumps(of.setting),
        "device": of.device,
    }
    with (
        nullcontext() if work is None else claim_work(work, "evaluation", claimed),
        tqdm(total=len(prompts), desc="evaluating", unit="prompt") as bar,
    ):
        results = do_pieces(benches, pieces, kept, done=lambda _: bar.update())
    measured = {row.name: [result.rows[row.name] for result in results] for row in of.rows}
    loops = {name: statistics.median(one.loop_seconds for one in found) for name, found in measured.items()}
    table = tuple(summarize(row.name, row.kind, row.computed, measured[row.name], loops) for row in of.rows)
    setting = {
        "prompts": len(prompts),
        "seed": seed,
        **of.setting,
        "probe": None if of.words is None else _probed(of.words, prompts),
    }
    shown = tuple(result.shown for result in results if result.shown is not None)
    return Evaluation(table, setting | ({"workers": size} if size > 1 else {}), kept=shown)


def _probed(words: CaptionWords, prompts: Sequence[str]) -> dict[str, int]:
    """How many attributes the probe was asked for, and how many prompts are no captions that it can check."""
    asked = [len(stated) for stated in map(words.stated, prompts) if stated is not None]
    return {"attributes": sum(asked), "prompts_skipped": len(prompts) - len(asked)}


def _digest(lines: Sequence[str]) -> str:
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()
