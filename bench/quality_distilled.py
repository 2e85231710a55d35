"""Distilled models: fewer steps, and forecasts between those: a part of ``bench.quality``.

Which students there are of a model is looked up: pipelines of ``cachec-models`` and in ``WORK/MODEL/students`` that say so
(``distilled.json``). DisCa's predictors are those that ship, and files in ``WORK/MODEL/predictors``; nothing of either is
trained here. LESA for few steps is, in a minute or two.

Every row has two references: the student's own run with all steps (what forecasts cost), and its teacher's (what it all costs).
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from bench.quality_methods import make_method, plan, trained
from bench.quality_setting import Rows, Setting, open_model, open_setting, usual_settings
from bench.quality_tables import Found, cells, paired, table
from cachec.compiler.calibration.graph_evaluator import GraphEvaluator
from cachec.compiler.graphs.flops import run_flops
from cachec.compiler.graphs.prepare import prepare, with_blocks
from cachec.compiler.methods import get_method
from cachec.compiler.methods.base import BlockMethod
from cachec.compiler.methods.disca import LISTS
from cachec.compiler.methods.parameters import PRETRAINED, WEIGHTS, Parameters, load_predictor
from cachec.compiler.models import find_model, outline_model
from cachec.compiler.models.base import LoadedModel, ModelSpec
from cachec.compiler.models.distilled import distilled_facts
from cachec.compiler.models.distribution import installed_models, predictor_folders
from cachec.compiler.planning.goals import Goal
from cachec.compiler.tables.lower import lower_predictor, lower_uncached
from cachec.compiler.tables.schedule import Schedule
from cachec.runtime.abi import COMPUTE, FORECAST
from cachec.runtime.program import Program

DISTILLED, COSTS = "distilled", "costs"  # parts
FEWER = (20, 10, 8, 4)
TRAINING_FREE = ("reuse", "taylor:1", "taylor:2")
LARGE = "hunyuan-video"  # whose FLOPs are counted, too
KEPT = ("psnr", "ssim", "latent")


def students_of(model: LoadedModel, work: Path) -> list[tuple[ModelSpec, Mapping[str, Any]]]:
    """What was distilled of a model, and how, fewest steps first."""
    places = [*(path for _, path in installed_models()), *sorted((work / "students").glob("*"))]
    found = [(path, facts) for path in places if (facts := distilled_facts(path)) is not None]
    own = [(find_model(str(path)), facts) for path, facts in found if facts.get("teacher_sha256") == model.weights_hash]
    return sorted(own, key=lambda one: (int(one[1]["steps"]), float(one[1]["restrict"]), one[0].name))


def bench_distilled(rows: Rows, setting: Setting) -> None:
    """The model with fewer steps; its students with all of theirs, and with forecasts between."""
    students = students_of(setting.model, setting.work)
    if not students:
        return
    for steps in FEWER:
        rows.measure(DISTILLED, steps, "the model itself", setting.name, lambda n=steps: setting.measure(_plain(setting, n)))
    for spec, facts in students:
        model, settings = open_model(spec)
        student = open_setting(model, settings, setting.work / "of-students" / spec.name, num=len(setting.noise))
        label = f"{spec.name} (R = {facts['restrict']:g})"
        for steps in sorted({*FEWER, settings.steps}, reverse=True):
            rows.measure(
                DISTILLED, steps, "all steps", label, lambda s=student, n=steps: _both(s, setting, _plain(s, n))
            )  # fmt: skip
        for budget in (budget for of, budget in LISTS if of == settings.steps):
            _bench_budget(rows, student, setting, label, budget)


def _bench_budget(rows: Rows, student: Setting, teacher: Setting, label: str, budget: int) -> None:
    """Forecasts between so many of the student's steps, on DisCa's list of them; gram on steps of its own."""
    schedule = Schedule(student.num_steps, LISTS[student.num_steps, budget])

    def measure(name: str, program: Program, evaluator: GraphEvaluator | None = None) -> None:
        rows.measure(DISTILLED, budget, name, label, lambda: _both(student, teacher, program, evaluator))

    for name in TRAINING_FREE:
        measure(name, plan(student, make_method(name), Goal(schedule=schedule)))
    for name in ("gram", "gram, by pictures"):
        rows.measure(
            DISTILLED, budget, name, label,
            lambda n=name: _both(student, teacher, plan(student, make_method(n), Goal(budget=budget))),
        )  # fmt: skip
    rows.measure(DISTILLED, budget, "lesa", label, lambda: _both(student, teacher, _lesa(student, schedule)))
    for name, parameters in disca_predictors(student):
        blocks = _evaluator(student, parameters)
        rows.measure(
            DISTILLED, budget, name, label, lambda e=blocks: _both(student, teacher, _blocks_program(student, schedule), e)
        )
        rows.measure(COSTS, budget, name, label, lambda p=parameters: forecast_shares(student, p))


def _plain(setting: Setting, steps: int) -> Program:
    sampling = setting.sampling(steps)
    return lower_uncached(setting.key(sampling), sampling)


def _both(student: Setting, teacher: Setting, program: Program, evaluator: GraphEvaluator | None = None) -> dict[str, Any]:
    """A row against the teacher's run, and against the student's own (``own_psnr`` and so on)."""
    latents = student.play(program, evaluator)
    own = {f"own_{key}": value for key, value in student.compare(latents).items()}
    steps = [int(step) for step in program.compute_steps]
    return {"computed": len(steps), "of": program.num_steps, "steps": steps, **teacher.compare(latents), **own}


def _lesa(student: Setting, schedule: Schedule) -> Program:
    method = get_method("lesa").with_options({})
    return plan(student, method, Goal(schedule=schedule), trained(student, method, schedule, "lesa"))


def disca_predictors(student: Setting) -> Iterator[tuple[str, Parameters]]:
    """Predictors for a student: that which ships, and files that are of its weights, named by what they leave out."""
    for folder in (*predictor_folders(), PRETRAINED, student.work.parents[1] / "predictors"):
        for path in sorted(folder.glob("disca*.safetensors")):
            one = load_predictor(path)
            if one.facts.get(WEIGHTS) == student.model.weights_hash:
                yield disca_name(json.loads(one.facts.get("options", "{}"))), one


def disca_name(options: Mapping[str, Any]) -> str:
    """What a predictor's options leave out."""
    if options.get("depth", 2) == 0:
        return "disca, fusion without blocks"
    return "disca, squared error alone" if options.get("adversarial", 1) == 0 else "disca"


def _evaluator(student: Setting, parameters: Parameters) -> GraphEvaluator:
    method = get_method("disca").with_options({})
    assert isinstance(method, BlockMethod)
    blocks = with_blocks(student.model, student.settings, method.blocks(student.model, parameters))
    return GraphEvaluator(prepare(student.model, student.settings), student.model.io, blocks)


def _blocks_program(student: Setting, schedule: Schedule) -> Program:
    own = student.calibration.sampling
    return lower_predictor(schedule, 1, feeds_back=False, key=student.key(own), sampling=own)


def forecast_shares(student: Setting, parameters: Parameters) -> dict[str, Any]:
    """A forecast's FLOPs over a computed step's: of the small model's own graphs, and of the large one's, without weights."""
    method = get_method("disca").with_options({"depth": str(json.loads(parameters.facts.get("options", "{}")).get("depth", 2))})
    assert isinstance(method, BlockMethod)
    large = outline_model(LARGE)
    small = with_blocks(student.model, student.settings, method.blocks(student.model, parameters))
    whole = with_blocks(large, usual_settings(large.spec), method.outlined(large))
    shares = {}
    for name, graphs in (("small", small), ("large", whole)):
        shares[name] = run_flops(graphs.modules[FORECAST]) / run_flops(graphs.modules[COMPUTE])
    return {"shares": shares, "large": LARGE}


def distilled_section(found: Found) -> str:
    """Tables of what there is; sentences on what there is not."""
    rows = found.of_part(DISTILLED)
    if not rows:
        return "There is no student of this model yet, so nothing of DisCa's table is measured: `cachec distill` makes one.\n"
    base = [(budget, row) for budget, name, _, row in rows if name == "the model itself"]
    lines = [["the model itself", str(budget), *cells(row), ""] for budget, row in base]
    for label in dict.fromkeys(label for _, name, label, _ in rows if name != "the model itself"):
        some = [one for one in rows if one[2] == label]
        lines += [[f"{label}: {name}", f"{row['computed']} of {row['of']}", *cells(row), _own(row)] for _, name, _, row in some]
    header = [
        "row",
        "computed",
        "PSNR dB",
        "p5",
        "worst",
        "SSIM",
        "latent error",
        "its p95",
        "PSNR against the student's own run",
    ]
    told = "Against the 50-step run of the model that was distilled.\n\n"
    return told + table(header, lines) + "\n\n" + _equal_cost(found) + _costs(found) + _lacking(found)


def _own(row: Mapping[str, Any]) -> str:
    own = {key: row[f"own_{key}"] for key in KEPT}
    return "equal" if max(own["latent"]) == 0 else cells(own)[0]


def _equal_cost(found: Found) -> str:
    """DisCa beside all others at as many computed steps."""
    lines = []
    for budget, name, label, row in found.of_part(DISTILLED):
        ours = found.get(DISTILLED, budget, "disca", label)
        if ours is not None and name not in ("disca", "the model itself"):
            lines.append([label, str(budget), name, paired(ours["psnr"], row["psnr"])])
    if not lines:
        return ""
    return (
        "DisCa against the others, paired:\n\n"
        + table(["student", "computed", "against", "PSNR, change in dB"], lines)
        + "\n\n"
    )


def _costs(found: Found) -> str:
    lines = [
        f"- {label}, {name}: a forecast has {row['shares']['small']:.0%} of a computed step's FLOPs on this model, and "
        f"{row['shares']['large']:.1%} on {row['large']}; both counted in the graphs."
        for _, name, label, row in found.of_part(COSTS)
    ]
    return "\n".join(dict.fromkeys(lines)) + ("\n" if lines else "")


def _lacking(found: Found) -> str:
    """Which rows of the plan are not there, for want of trained files."""
    rows = found.of_part(DISTILLED)
    names, labels = {name for _, name, _, _ in rows}, {label for _, _, label, _ in rows}
    lacks = [name for name in ("disca", "disca, squared error alone", "disca, fusion without blocks") if name not in names]
    lacks += [f"a student with R = {r}" for r in ("0.2", "1") if not any(f"R = {r})" in label for label in labels)]
    return f"\nNot trained yet for this model, so left out: {', '.join(lacks)}.\n" if lacks else ""
