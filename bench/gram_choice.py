"""gram's schedules by pictures beside those that a search by latents finds: ``python -m bench.gram_choice``.

On tiny-flux of avatars. Rows are fitted to 32 captions, schedules chosen by 96 others, figures are of 128 captions of
combinations of attributes that no training saw. Every candidate is polished for a round, the winner and the searched schedule
for two. Writes ``bench/gram_choice.json``, caption by caption, and prints the table that ``docs/methods.md`` has. Finished
parts are kept in the work directory.
"""

import json
import logging
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np

from cachec.compiler.calibration.calibration import open_calibration, relative_errors
from cachec.compiler.calibration.graph_evaluator import GraphEvaluator
from cachec.compiler.calibration.metrics import psnr_db, ssim
from cachec.compiler.calibration.runs import CHUNK, Subject, recording_here, run_uncached
from cachec.compiler.calibration.statistics import load_statistics, record_statistics, save_statistics
from cachec.compiler.calibration.uses import NUM_CHOOSE, NUM_FIT, UsedPrompts
from cachec.compiler.graphs.prepare import prepare
from cachec.compiler.methods.gram import Gram, polish_round
from cachec.compiler.methods.gram_fit import fit_rows
from cachec.compiler.models import find_model, load_model
from cachec.compiler.models.base import LoadedModel, Settings
from cachec.compiler.planning.pictured import PictureChoice, candidates, picture_score
from cachec.compiler.planning.search import Steps, search_schedule
from cachec.compiler.tables.coefficients import AdvanceTable
from cachec.compiler.tables.schedule import Schedule
from cachec.runtime.noise import make_noise
from reference.avatars.attributes import looks, say

STEPS, SIZE, TEXT_TOKENS, GUIDANCE = 50, 128, 24, 3.5
SEED, HELD_SEED, NUM_HELD = 515, 616, 128  # of captions: to fit on and choose by, to measure on
BOOTSTRAPS = 4000


def captions(seed: int, num: int, *, held_out: bool) -> list[str]:
    """So many captions, each once, of combinations that are for training or held out from it."""
    rng, found = np.random.default_rng(seed + 1), dict[str, None]()
    for look in looks(seed, held_out=held_out):
        found[say(look, rng).caption] = None
        if len(found) == num:
            break
    return list(found)


@dataclass(frozen=True, eq=False)
class Held:
    """The captions to measure on: their noise, conditions, and where the uncached run ends, latents and pictures."""

    noise: np.ndarray
    conditions: dict[str, np.ndarray]
    latents: np.ndarray
    pictures: np.ndarray


class ChoiceBench:
    """Fits and figures by schedule; each is made once and kept in ``work``."""

    def __init__(self, work: Path, name: str) -> None:
        work.mkdir(parents=True, exist_ok=True)
        self.work, spec = work, find_model(name)
        self.model: LoadedModel = load_model(spec)
        self.settings = Settings(SIZE, SIZE, TEXT_TOKENS, GUIDANCE, STEPS, "float32")
        self.evaluator = GraphEvaluator(prepare(self.model, self.settings), self.model.io)
        self.subject = Subject.of(self.model, self.settings)
        path = work / "calibration.safetensors"
        if not path.exists():
            prompts = captions(SEED, NUM_FIT + NUM_CHOOSE, held_out=False)
            used = UsedPrompts(tuple(prompts), (*["fit"] * NUM_FIT, *["choose"] * NUM_CHOOSE))
            recorders, parts = recording_here(self.subject, self.evaluator), work / "calibration.parts"
            save_statistics(record_statistics(self.subject, recorders, used, reference_steps=0, seed=0, work=parts), path)
        known = open_calibration(load_statistics(path), self.subject, self.evaluator)
        self.fit = known.of("fit")
        self.choice = PictureChoice(Gram(), self.fit, known.of("choose"), self.decode)

    def decode(self, latents: np.ndarray) -> np.ndarray:
        return np.asarray(self.model.decode(latents, self.settings))

    def kept(self, name: str, make: Callable[[], Any]) -> Any:
        """A JSON value, made unless it is there."""
        path = self.work / f"{name}.json"
        if not path.exists():
            path.write_text(json.dumps(make()))
        return json.loads(path.read_text())

    def table(self, steps: Steps, rounds: int) -> AdvanceTable:
        """Rows and told times after so many rounds; 0 is the closed form."""

        def make() -> dict[str, Any]:
            if rounds == 0:
                made = fit_rows(self.fit, Schedule(STEPS, steps))
            else:
                made = polish_round(self.fit, self.table(steps, rounds - 1), rounds - 1)
            return {"rows": made.coefficients.tolist(), "told": None if made.timesteps is None else made.timesteps.tolist()}

        found = self.kept(f"rows {_text(steps)} {rounds}", make)
        told = None if found["told"] is None else np.array(found["told"])
        return AdvanceTable(Schedule(STEPS, steps), np.array(found["rows"]), told)

    def schedules(self, budget: int) -> dict[str, Any]:
        """The searched schedule, the chosen one, and the PSNR of all candidates on the captions to choose by."""
        searched: Steps = tuple(
            self.kept(f"searched {budget}", lambda: list(search_schedule(Gram(), self.fit, None, budget, seed=0).compute))
        )
        tried = {}
        for steps in candidates(searched, STEPS):
            make = lambda steps=steps: self.choice.psnr(self.fit.program(self.table(steps, 1)))  # noqa: E731
            tried[steps] = self.kept(f"tried {_text(steps)}", make)
            print(
                f"K={budget} tried {_text(steps)}: score {picture_score(tried[steps]):.2f}, {_line(tried[steps])}", flush=True
            )
        chosen = max(tried, key=lambda steps: picture_score(tried[steps]))
        return {"searched": searched, "chosen": chosen, "tried": {_text(steps): psnr for steps, psnr in tried.items()}}

    def held(self) -> Held:
        """Runs the captions to measure on; only once all that is measured has been fitted."""
        prompts = captions(HELD_SEED, NUM_HELD, held_out=True)
        noise = np.stack([make_noise(seed, self.subject.latent_shape) for seed in range(len(prompts))])
        conditions, parts = self.subject.encode(prompts), []
        for at in range(0, len(noise), CHUNK):
            path = self.work / f"eval-{at:03d}.npy"
            if not path.exists():
                some = {name: value[at : at + CHUNK] for name, value in conditions.items()}
                *_, last = run_uncached(self.evaluator, self.subject.own_sampling, noise[at : at + CHUNK], some)
                np.save(path, last.latents)
            parts.append(np.load(path))
        latents = np.concatenate(parts)
        return Held(noise, conditions, latents, self._decoded(latents))

    def _decoded(self, latents: np.ndarray) -> np.ndarray:
        return np.concatenate([self.decode(latents[at : at + CHUNK]) for at in range(0, len(latents), CHUNK)])

    def figures(self, held: Held, steps: Steps, rounds: int) -> dict[str, Any]:
        """PSNR, SSIM and relative latent errors by held-out caption."""

        def make() -> dict[str, Any]:
            program, parts = self.fit.program(self.table(steps, rounds)), []
            for at in range(0, len(held.noise), CHUNK):
                some = {name: value[at : at + CHUNK] for name, value in held.conditions.items()}
                parts.append(self.evaluator.play(program, held.noise[at : at + CHUNK], some))
            latents = np.concatenate(parts)
            pairs = list(zip(self._decoded(latents), held.pictures, strict=True))
            return {
                "psnr": [round(psnr_db(a, b), 3) for a, b in pairs],
                "ssim": [round(ssim(a, b), 6) for a, b in pairs],
                "latent": relative_errors(latents, held.latents).round(6).tolist(),
            }

        return {"steps": list(steps), "rounds": rounds, **self.kept(f"held {_text(steps)} {rounds}", make)}


def _text(steps: Steps) -> str:
    return ",".join(map(str, steps))


def _line(psnr: list[float]) -> str:
    return f"{np.mean(psnr):.2f} / {np.percentile(psnr, 5):.1f} / {np.min(psnr):.1f}"


def markdown(rows: dict[str, dict[str, Any]]) -> list[str]:
    """The table of ``docs/methods.md``."""
    lines = ["| K | schedule | steps | PSNR | SSIM | latents: mean, 95 % |", "|---|---|---|---|---|---|"]
    for name, row in rows.items():
        errors = row["latent"]
        lines.append(
            f"| {name.replace('|', ' | ')} | {_text(row['steps']).replace(',', ', ')} | {_line(row['psnr'])} "
            f"| {np.mean(row['ssim']):.5f} | {np.mean(errors):.4f}, {np.percentile(errors, 95):.4f} |"
        )
    return lines


def paired(ours: list[float], theirs: list[float]) -> str:
    """The mean difference and its standard error, that of the 5th percentiles, and its interval by bootstrap over captions."""
    a, b = np.array(ours), np.array(theirs)
    some = np.random.default_rng(0).integers(0, len(a), (BOOTSTRAPS, len(a)))
    tails = np.percentile(a[some], 5, axis=1) - np.percentile(b[some], 5, axis=1)
    low, high = np.percentile(tails, (2.5, 97.5))
    mean, error = (a - b).mean(), (a - b).std(ddof=1) / len(a) ** 0.5
    tail = np.percentile(a, 5) - np.percentile(b, 5)
    return f"mean {mean:+.2f} ± {error:.2f} dB, 5th percentile {tail:+.1f} dB [{low:.1f}, {high:.1f}]"


@click.command()
@click.option("--model", default="tiny-flux", show_default=True, help="A model of avatars.")
@click.option("--budget", "budgets", type=int, multiple=True, default=(6, 8, 10), show_default=True)
@click.option("--work", type=click.Path(path_type=Path), default=Path("build/gram-choice"), show_default=True)
@click.option("--out", type=click.Path(path_type=Path), default=Path("bench/gram_choice.json"), show_default=True)
def main(model: str, budgets: tuple[int, ...], work: Path, out: Path) -> None:
    warnings.filterwarnings("ignore")
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    bench = ChoiceBench(work, model)
    found = {budget: bench.schedules(budget) for budget in budgets}
    for of in found.values():
        for name in ("searched", "chosen"):
            bench.table(of[name], Gram().polish)
    held, rows = bench.held(), {}
    for budget, of in found.items():
        for name in ("searched", "chosen"):
            rows[f"{budget}|{name}"] = bench.figures(held, of[name], Gram().polish)
        ours, theirs = (rows[f"{budget}|{name}"]["psnr"] for name in ("chosen", "searched"))
        print(f"K={budget}, chosen - searched: {paired(ours, theirs)}", flush=True)
    out.write_text(json.dumps({"tried": {k: of["tried"] for k, of in found.items()}, "rows": rows}) + "\n")
    print("\n".join(markdown(rows)))


if __name__ == "__main__":
    main()
