"""gram's schedules by pictures beside those that a search by latents finds: ``python -m bench.gram_choice``.

On tiny-flux of avatars. Rows are fitted to 32 captions, schedules chosen by 96 others, figures are of 128 captions of
combinations of attributes that no training saw. Every candidate is polished for a round, the winner and the searched schedule
for two; others, which are never chosen, are scored beside them. Writes ``bench/gram_choice.json``,
caption by caption, and prints the table that ``docs/methods.md`` has. Finished parts are kept in the work directory.
"""

import json
import logging
import math
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import click
import numpy as np

from bench.quality_setting import Extent, Setting, calibrate, open_model, uncached_latents
from bench.quality_tables import bootstrap, paired
from cachec.compiler.calibration.calibration import open_calibration
from cachec.compiler.calibration.runs import Subject
from cachec.compiler.calibration.uses import NUM_CHOOSE, NUM_FIT, UsedPrompts
from cachec.compiler.frontend import evaluator_of
from cachec.compiler.methods.gram import Gram, polish_round
from cachec.compiler.methods.gram_fit import fit_rows
from cachec.compiler.models import find_model
from cachec.compiler.planning.pictured import PictureChoice, candidates, picture_score, smooth_schedule
from cachec.compiler.planning.search import GramDomain, Steps, search_schedule, search_schedules
from cachec.compiler.tables.coefficients import AdvanceTable
from cachec.compiler.tables.schedule import Schedule
from cachec.runtime.errors import InputError
from cachec.runtime.noise import make_noise
from reference.avatars.attributes import looks, say

# Tried beside the candidates, and never chosen: schedules with shares of the sine (0 are even steps), one that is denser still
# at its beginning, and optima of the Gram domain's total with other weights and powers, the best of which is measured, too.
BLENDS, EARLY, TOTALS = (0.0, 0.5, 0.75), 1.25, ((3.0, 0.0), (3.0, 2.0), (10.0, 2.0), (3.0, 8.0))
NAMES = ("searched", "chosen", "optimum")
SEED, HELD_SEED, NUM_HELD = 515, 616, 128  # of captions: to fit on and choose by, to measure on


def captions(seed: int, num: int, *, held_out: bool) -> list[str]:
    """So many captions, each once, of combinations that are for training or held out from it."""
    rng, found = np.random.default_rng(seed + 1), dict[str, None]()
    for look in looks(seed, held_out=held_out):
        found[say(look, rng).caption] = None
        if len(found) == num:
            break
    return list(found)


def blended(num_steps: int, budget: int, share: float) -> Steps:
    """Computed steps T ((1 - w) u + w sin^2(pi u / 2)), u = i / K; w: ``share``."""
    u = np.arange(budget) / budget
    return tuple(np.rint(num_steps * ((1 - share) * u + share * np.sin(np.pi * u / 2) ** 2)).astype(int).tolist())


class ChoiceBench:
    """Fits and figures by schedule; each is made once and kept in ``work``."""

    def __init__(self, work: Path, name: str) -> None:
        work.mkdir(parents=True, exist_ok=True)
        self.work = work
        self.model, self.settings = open_model(find_model(name))
        self.subject, self.evaluator = Subject.of(self.model, self.settings), evaluator_of(self.model, self.settings)
        used = UsedPrompts(
            tuple(captions(SEED, NUM_FIT + NUM_CHOOSE, held_out=False)), (*["fit"] * NUM_FIT, *["choose"] * NUM_CHOOSE)
        )
        statistics = calibrate(self.subject, self.evaluator, used, work / "calibration")
        self.known = open_calibration(statistics, self.subject, self.evaluator)
        self.fit = self.known.of("fit")
        self.choice = PictureChoice(Gram(), self.fit, self.known.of("choose"), self.decode)

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
                made = fit_rows(self.fit, Schedule(self.settings.steps, steps))
            else:
                made = polish_round(self.fit, self.table(steps, rounds - 1), rounds - 1)
            return {"rows": made.coefficients.tolist(), "told": None if made.timesteps is None else made.timesteps.tolist()}

        found = self.kept(f"rows {_text(steps)} {rounds}", make)
        told = None if found["told"] is None else np.array(found["told"])
        return AdvanceTable(Schedule(self.settings.steps, steps), np.array(found["rows"]), told)

    def optimum(self, budget: int, weight: float, power: float) -> Steps:
        """The best schedule of the Gram domain where errors at nodes have a weight and a power of their noise level."""
        domain = GramDomain(self.fit.velocity_gram().sum(axis=0), self.fit.sampling)

        def score(steps: Steps) -> float:
            return domain.total(domain.least_squares(steps), steps, weight=weight, power=power)

        return search_schedules(score, self.settings.steps, budget, seed=0)[0]

    def schedules(self, budget: int) -> dict[str, Any]:
        """The searched schedule, the chosen one, and the PSNR of all candidates on the captions to choose by."""
        searched: Steps = tuple(
            self.kept(f"searched {budget}", lambda: list(search_schedule(Gram(), self.fit, None, budget, seed=0).compute))
        )
        tried, able = dict[Steps, list[float]](), candidates(searched, self.settings.steps)

        def attempt(what: str, some: Iterable[Steps]) -> None:
            for steps in some:
                make = lambda steps=steps: self.choice.psnr(self.fit.program(self.table(steps, 1)))  # noqa: E731
                try:
                    tried[steps] = self.kept(f"tried {_text(steps)}", make)
                except InputError as error:  # its runs are not finite: as bad as can be
                    print(f"K={budget} {what} {_text(steps)}: {error}", flush=True)
                    tried[steps] = [-math.inf]
                    continue
                said = f"score {picture_score(tried[steps]):.2f}, {_line(tried[steps])}"
                print(f"K={budget} {what} {_text(steps)}: {said}", flush=True)

        attempt("candidate", able)
        chosen = max(able, key=lambda steps: picture_score(tried[steps]))
        attempt("blend", (blended(self.settings.steps, budget, share) for share in BLENDS))
        early = smooth_schedule(self.settings.steps, budget, EARLY)
        attempt(f"g = {EARLY}", [] if early is None else [early])
        optima = [self.optimum(budget, weight, power) for weight, power in TOTALS]
        for (weight, power), steps in zip(TOTALS, optima, strict=True):
            attempt(f"Gram optimum, weight {weight:g}, power {power:g}:", [steps])
        optimum = max(optima, key=lambda steps: picture_score(tried[steps]))
        kept = {_text(steps): psnr for steps, psnr in tried.items()}
        return {"searched": searched, "chosen": chosen, "optimum": optimum, "tried": kept}

    def held(self) -> Setting:
        """Runs the captions to measure on; only once all that is measured has been fitted."""
        prompts = tuple(captions(HELD_SEED, NUM_HELD, held_out=True))
        noise = np.stack([make_noise(seed, self.subject.latent_shape) for seed in range(len(prompts))])
        conditions = self.subject.encode(prompts)
        reference = uncached_latents(self.subject, self.evaluator, noise, conditions, self.work / "reference")
        extent = Extent(len(prompts), len(self.fit.index), len(self.choice.choosing.index))
        return Setting(self.model, self.settings, self.known, prompts, conditions, noise, reference, self.work, extent)

    def figures(self, held: Setting, steps: Steps, rounds: int) -> dict[str, Any]:
        """PSNR, SSIM and relative latent errors by held-out caption."""
        found = self.kept(f"held {_text(steps)} {rounds}", lambda: held.measure(self.fit.program(self.table(steps, rounds))))
        return {**found, "steps": list(steps), "rounds": rounds}


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


def compare(ours: list[float], theirs: list[float]) -> str:
    """The mean difference and its standard error, that of the 5th percentiles, and its interval by bootstrap over captions."""
    a, b, some = np.array(ours), np.array(theirs), bootstrap(len(ours))
    low, high = np.percentile(np.percentile(a[some], 5, axis=1) - np.percentile(b[some], 5, axis=1), (2.5, 97.5))
    tail = np.percentile(a, 5) - np.percentile(b, 5)
    return f"mean {paired(ours, theirs)} dB, 5th percentile {tail:+.1f} dB [{low:.1f}, {high:.1f}]"


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
        for name in NAMES:
            bench.table(of[name], Gram().polish)
    held, rows = bench.held(), {}
    for budget, of in found.items():
        for name in NAMES:
            rows[f"{budget}|{name}"] = bench.figures(held, of[name], Gram().polish)
        ours = rows[f"{budget}|chosen"]["psnr"]
        for name in ("searched", "optimum"):
            print(f"K={budget}, chosen - {name}: {compare(ours, rows[f'{budget}|{name}']['psnr'])}", flush=True)
    out.write_text(json.dumps({"tried": {k: of["tried"] for k, of in found.items()}, "rows": rows}) + "\n")
    print("\n".join(markdown(rows)))


if __name__ == "__main__":
    main()
