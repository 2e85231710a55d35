"""What calibration and training cost, and whether some tokens do for all: ``python -m bench.fits``: bench/FITS.md.

Each part is kept in ``--work`` as soon as it is measured.

Costs: calibrating on 32 prompts, as a whole and inside the model, and what crosses the model's border for one prompt and step.

Gram: what ``compile --method gram`` takes to choose schedules of 50 steps and to fit them, the calibration made before.

Tokens: of long sequences ``cachec train`` keeps 256, in bfloat16. Here, on tiny-flux, one set of recorded runs is trained on
with all tokens and with fewer, and with another order of the prompts, which says what training alone makes different. Compared
are the held-out closed loop, and the folded rows: all that a bundle has of a predictor.
"""

import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import click
import numpy as np

from bench.gpu_fits import Counted
from cachec.compiler.calibration.graph_evaluator import GraphEvaluator
from cachec.compiler.calibration.prompts import default_prompts
from cachec.compiler.calibration.runs import (
    Subject,
    Trajectories,
    bfloat16_bits,
    record_trajectories,
    recording_here,
    some_tokens,
)
from cachec.compiler.calibration.statistics import record_statistics, save_statistics
from cachec.compiler.calibration.uses import calibration_prompts
from cachec.compiler.frontend import evaluator_of
from cachec.compiler.graphs.prepare import prepare
from cachec.compiler.methods.base import TrainingData
from cachec.compiler.methods.lesa import Lesa
from cachec.compiler.methods.lesa_training import LesaTrainer
from cachec.compiler.methods.parameters import Parameters
from cachec.compiler.models import find_model, load_model
from cachec.compiler.models.base import LoadedModel, ModelSpec, Settings
from cachec.compiler.pipeline import compile_bundle
from cachec.compiler.request import make_request
from cachec.compiler.stages import OF_A_PART
from cachec.runtime.files import write_file
from cachec.runtime.specs import Array

PAGE = Path(__file__).with_name("FITS.md")
GRAM_STEPS = 50
BUDGETS = (6, 8, 10)
PARTS = ("calibration", "gram", "tokens")
STOP = 8  # prompts that tell when to stop


@dataclass(frozen=True)
class Trained:
    """A predictor: the best held-out relative error of its latents, and its folded rows [T, …]."""

    name: str
    error: float
    rows: Array
    seconds: float


def some_of(runs: Trajectories, number: int) -> Trajectories:
    """The same runs with fewer tokens, as training keeps them of long sequences."""
    tokens = some_tokens(runs.features.shape[2], number)
    return replace(runs, features=bfloat16_bits(runs.features[:, :, tokens]), tokens=tokens)


@dataclass(frozen=True)
class Cost:
    """Seconds of a calibration, those of them inside the model, evaluations, and bytes to the host and back."""

    seconds: float
    in_model: float
    evaluations: int
    to_host: int
    to_model: int


def calibrate(subject: Subject, evaluator: GraphEvaluator, name: str) -> Cost:
    """Calibrate as ``cachec calibrate`` does, without a fine reference."""
    counted = Counted(evaluator)
    prompts = calibration_prompts(name, None).only("fit", "stop")
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        record_statistics(
            subject, recording_here(subject, counted), prompts, reference_steps=0, seed=0, work=Path(folder) / "work"
        )
        seconds = time.perf_counter() - start
    return Cost(seconds, counted.seconds, counted.samples, counted.to_host, counted.to_device)


@dataclass(frozen=True)
class Chosen:
    """Steps that were computed, and the seconds of choosing them and of fitting their rows."""

    budget: int
    steps: tuple[int, ...]
    seconds: float


def fit_gram(spec: ModelSpec, model: LoadedModel, budgets: Sequence[int], work: Path) -> tuple[str, float, list[Chosen]]:
    """Prompts in words, seconds of a calibration at :data:`GRAM_STEPS`, and what each of the ``budgets`` takes after it."""
    settings = Settings(spec.height, spec.width, spec.text_tokens, spec.guidance, GRAM_STEPS, "float32")
    subject, prompts = Subject.of(model, settings), calibration_prompts(spec.prompts, None, choosing=True)
    start = time.perf_counter()
    recorders = recording_here(subject, evaluator_of(model, settings))
    save_statistics(
        record_statistics(subject, recorders, prompts, reference_steps=0, seed=0, work=work / "parts"),
        work / "runs.safetensors",
    )
    seconds, made = time.perf_counter() - start, list[Chosen]()
    for budget in budgets:
        chosen = {"method": "gram", "steps": GRAM_STEPS, "budget": budget, "calibration": work / "runs.safetensors"}
        result = compile_bundle(model, make_request(spec, targets=("ort",), **chosen), work / f"{budget}.cachec")
        steps = result.bundle.program().compute_steps
        made.append(Chosen(budget, steps, result.seconds[OF_A_PART[1]]))
    return prompts.in_words, seconds, made


def train_on(runs: Trajectories, subject: Subject, evaluator: GraphEvaluator, wish: "Wish") -> list[Trained]:
    """Predictors from all tokens, from all in another order of the prompts, and from fewer and fewer tokens."""
    method = Lesa(max_rounds=wish.rounds)
    schedule = method.interval(wish.steps, wish.interval)
    parts = np.arange(STOP, wish.prompts), np.arange(STOP)

    def train(name: str, kept: Trajectories, seed: int) -> Trained:
        start = time.perf_counter()
        with tempfile.TemporaryDirectory() as folder:
            train, stop = (kept.select(part) for part in parts)
            data = TrainingData(evaluator, subject.own_sampling, train, stop, schedule, seed, Path(folder))
            trainer = LesaTrainer(data, max_rounds=wish.rounds)
            parameters = Parameters(trainer.run(), {"steps": str(wish.steps)}, name)
        table = method.table(schedule, subject.own_sampling.sigmas, parameters)
        return Trained(name, trainer.state.best, table.coefficients, time.perf_counter() - start)

    count = runs.features.shape[2]
    made = [train(f"all {count} tokens", runs, 0), train(f"all {count} tokens, prompts in another order", runs, 1)]
    some = [count // part for part in (2, 4, 16)]
    return made + [train(f"{number} tokens, bfloat16", some_of(runs, number), 0) for number in some]


@dataclass(frozen=True)
class Wish:
    """Prompts that runs are recorded of, steps, LESA's N, and rounds of each phase at most; computed steps of gram."""

    prompts: int
    steps: int
    interval: int
    rounds: int
    budgets: Sequence[int]


@click.command()
@click.option(
    "--part", "parts", multiple=True, type=click.Choice(PARTS), help="Only these, anew; by default those that are missing."
)
@click.option("--work", type=click.Path(path_type=Path), default=Path("build/fits"), show_default=True)
@click.option("--prompts", default=32, show_default=True)
@click.option("--steps", default=28, show_default=True)
@click.option("--interval", default=7, show_default=True)
@click.option("--rounds", default=10, show_default=True, help="Of each phase, at most.")
@click.option("--budget", "budgets", multiple=True, default=BUDGETS, show_default=True, help="Computed steps of gram.")
def main(
    parts: tuple[str, ...], work: Path, prompts: int, steps: int, interval: int, rounds: int, budgets: tuple[int, ...]
) -> None:
    work.mkdir(parents=True, exist_ok=True)
    wish = Wish(prompts, steps, interval, rounds, budgets)
    model = load_model(find_model("tiny-flux"))
    for part in parts or [part for part in PARTS if not (work / f"{part}.md").exists()]:
        print(part, flush=True)
        write_file(work / f"{part}.md", "\n".join(measure(part, model, wish)).encode())
    found = [work / f"{part}.md" for part in PARTS]
    lines = [path.read_text(encoding="utf-8") if path.exists() else f"Not measured yet: {path.stem}.\n" for path in found]
    head = ["# Calibration and training", "", "tiny-flux on the CPU, float32, two cores (`make fits`).", ""]
    write_file(PAGE, "\n".join([*head, *lines]).encode())


def measure(part: str, model: LoadedModel, wish: Wish) -> list[str]:
    """Lines of a part of the page, dated."""
    spec, today = model.spec, time.strftime("%Y-%m-%d")
    if part == "gram":
        with tempfile.TemporaryDirectory() as folder:
            return gram_lines(*fit_gram(spec, model, wish.budgets, Path(folder)), today)
    settings = Settings(spec.height, spec.width, spec.text_tokens, spec.guidance, wish.steps, "float32")
    subject, evaluator = Subject.of(model, settings), GraphEvaluator(prepare(model, settings), model.io)
    if part == "calibration":
        calibrate(subject, evaluator, spec.prompts)  # text encoders are loaded, memory is there
        return cost_lines([calibrate(subject, evaluator, spec.prompts) for _ in range(3)], wish, today)
    used = default_prompts(spec.prompts, "train")[: wish.prompts]
    with tempfile.TemporaryDirectory() as folder:
        runs = record_trajectories(subject, recording_here(subject, evaluator), used, seed=0, work=Path(folder))
    return token_lines(train_on(runs, subject, evaluator, wish), wish, today)


def gram_lines(prompts: str, seconds: float, made: Sequence[Chosen], date: str) -> list[str]:
    """What schedules and rows take."""
    return [
        "## gram: choosing a schedule and fitting it",
        "",
        f"{GRAM_STEPS} steps; {date}; calibrated on {prompts} ({seconds:.0f} s).",
        "*s*: the search, each candidate's first round of polish and its pictures of the prompts to choose by, and the "
        "winner's second round.",
        "",
        "| computed | steps | s |",
        "| --- | --- | --- |",
        *(f"| {one.budget} | {', '.join(map(str, one.steps))} | {one.seconds:.0f} |" for one in made),
        "",
    ]


def cost_lines(costs: Sequence[Cost], wish: Wish, date: str) -> list[str]:
    """What calibration takes."""
    over = [one.seconds / one.in_model - 1 for one in costs]
    cost = costs[0]
    return [
        "## Calibration",
        "",
        f"{wish.steps} steps; {date}. Calibrating on {cost.evaluations // wish.steps} prompts takes "
        f"{100 * statistics.median(over):.1f} % "
        f"({100 * min(over):.1f} to {100 * max(over):.1f} % in {len(costs)} runs) longer than the model's own "
        f"{statistics.median(one.in_model for one in costs):.1f} s. For one prompt and step "
        f"{cost.to_host / cost.evaluations / 1e3:.1f} kB leave the model (velocity and feature) and "
        f"{cost.to_model / cost.evaluations / 1e3:.1f} kB go to it (latents and conditions).",
        "",
    ]


def token_lines(made: Sequence[Trained], wish: Wish, date: str) -> list[str]:
    """What training on some of the tokens comes to."""
    lines = [
        "## LESA from some of the tokens",
        "",
        f"N = {wish.interval}, {wish.steps} steps, {date}; {wish.prompts - STOP} prompts to train on, {STOP} held out, "
        f"{wish.rounds} rounds a phase.",
        "*error*: of held-out latents, relative L2, of the best weights; *rows*: relative L2 distance of the folded rows from",
        "those of the first line.",
        "",
        "| trained on | error | rows | s |",
        "| --- | --- | --- | --- |",
    ]
    first = made[0].rows
    for one in made:
        apart = float(np.linalg.norm(one.rows - first) / np.linalg.norm(first))
        lines.append(f"| {one.name} | {one.error:.4f} | {apart:.4f} | {one.seconds:.0f} |")
    return [*lines, ""]


if __name__ == "__main__":
    main()
