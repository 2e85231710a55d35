"""The page of ``bench.quality``: ``python -m bench.quality_report`` writes ``bench/QUALITY.md``, its charts and its data.

Rows come from ``WORK/MODEL/rows.json`` where there is one, else from ``bench/quality-MODEL.json``, which is then left as it is.
What is not measured yet is said to be missing.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
import numpy as np

from bench.quality import REFERENCE_MODELS
from bench.quality_caches import CACHES, INTERVALS
from bench.quality_charts import CACHES as GREY
from bench.quality_charts import OURS as RED
from bench.quality_charts import SOLVERS as BLUE
from bench.quality_charts import draw
from bench.quality_distilled import DISTILLED, RESTRICTS, distilled_section
from bench.quality_methods import EQUAL, LINCA_UPDATES, OURS, WHOLE_BUDGET, expected_rows
from bench.quality_setting import NUM_CHOOSE, NUM_FIT
from bench.quality_tables import MEASURES, ROUNDS, Found, ablation, cells, compared, cost, paired, table, verdict
from bench.quality_transfer import BRANCHES, MOOD, TRANSFER
from cachec.compiler.tables.samplers import SOLVERS

BUDGETS = (6, 8, 10)
FEATURES = ("reuse", "taylor:1", "taylor:2", "newton:2", "hicache", "foca", "spectrum", "freqca", "svd-cache", "hyca", "linca")
KINDS = {  # rows by methods and steps
    "trained by gradient": (("bns", "dyweight"), ("gram's",)),
    "plain solver, searched steps": (SOLVERS, ("searched",)),
    "plain solver, its own steps": (SOLVERS, ("uniform",)),
    "published feature cache, searched steps": (FEATURES, ("searched",)),
    "published feature cache, its own or even steps": (FEATURES, ("own", "uniform")),
}
GUIDED = ("tiny-qwen",)  # by two branches
APART = "lesa", "N = 7, apart"
FORMS_TOLD = (
    " LESA has one predictor for both branches of guidance; `apart` is with one for each, as in the code released for "
    "Qwen-Image, `0.4` with that code's noise level below which the third expert forecasts (0.5 for FLUX and HunyuanVideo)."
)
HEADER = ["method", "steps", "computed", "PSNR dB", "p5", "worst", "SSIM", "latent error", "its p95"]
INTRO = """# Quality: every method at equal cost

Each row is a method on given steps: {num} held-out captions (combinations of attributes that no model was trained on), seeds
from 0, against the uncached run of 50 steps from the same noise. Fits and searches saw {fit} training captions with noise of
their own; `gram, by pictures` chooses its schedule on {choose} more of these. All rows of a model have the same captions, noise
and weights, and go through the planner of `cachec compile`.

- **PSNR** of pictures (of all frames of a video): mean ± standard error; **p5** the 5th percentile and **worst** the worst
  caption, with 95 % of {bootstraps} bootstraps. **SSIM**: mean. **latent error**: relative L2 of the final latents, mean, and
  its 95th percentile.
- **steps**: `own` the published rule with at most K computed steps (**computed** says how many it has), `uniform` even ones (of
  a plain solver: the model's sampler with K steps), `searched` those of `--schedule search`, `gram's` those that were searched
  for gram, `pictures` those that pictures choose, gram's default. `gram, free times` is on these, told times fitted with the
  rows before the polish (`--set times=free`).
- Cost is counted in computed steps. A forecast is a run of the model's tail; those of the output cut (`gram`, `dyweight`,
  `bns`, `adams`, solvers) run nothing. No times are measured here: they are in [`RESULTS.md`](RESULTS.md).
- LESA and DisCa are trained beforehand (`cachec train`), LinCa here, with {linca} updates a network instead of 2,000, to save
  time: it may gain by more.
- At K = {whole} all rows are measured, at the others those that come near the best somewhere. `make quality` runs two models
  at a time, on one thread each.

These are claims about three small models. `python -m bench.quality && python -m bench.quality_report --date {date}`
(`make quality`) on a shared machine of 2 cores and, where a model's section says so, on a GPU; every row, caption by caption,
is in `bench/quality-MODEL.json`, with the commit that it was measured at (`and changes`: of the code, not committed yet).
"""


def equal_rows(found: Found, budget: int) -> list[tuple[str, str, dict[str, Any]]]:
    """Method, steps and row of what is measured at a budget, best mean first."""
    return sorted(found.of(EQUAL, budget), key=lambda one: -np.mean(one[2]["psnr"]))


def comparisons(found: Found) -> str:
    """Ours beside the best of the others, by each measure."""
    lines = []
    for budget in BUDGETS:
        rows = equal_rows(found, budget)
        others = [one for one in rows if one[0] not in OURS]
        for name, steps in (
            ("gram", "searched"),
            ("gram, by pictures", "pictures"),
            ("gram, free times", "pictures"),
            ("gram, closed form", "searched"),
        ):
            ours = found.get(EQUAL, budget, name, steps)
            if ours is not None and others:
                lines += [[str(budget), name, *compared(ours, others, measure)] for measure in MEASURES]
    if not lines:
        return "Not measured yet.\n"
    header = ["K", "ours", "measure", "best other by it", "its value", "ours", "difference", ""]
    return table(header, lines) + "\n"


def by_kind(found: Found) -> str:
    """The best of every kind at each budget by its mean, and how far above it gram, as it is by default, is."""
    lines = []
    for budget in BUDGETS:
        rows, ours = equal_rows(found, budget), found.get(EQUAL, budget, "gram, by pictures", "pictures")
        for kind, (names, steps) in KINDS.items():
            one = next((one for one in rows if one[0] in names and one[1] in steps), None)
            if one is not None and ours is not None:
                mean, low, worst, *_ = cells(one[2])
                lines.append([str(budget), kind, one[0], mean, low, worst, paired(ours["psnr"], one[2]["psnr"])])
    if not lines:
        return ""
    header = ["K", "kind", "the best of it", "PSNR dB", "p5", "worst", "gram, by pictures, against it"]
    return f"\n### The best of every kind\n\n{table(header, lines)}\n"


def left_out(found: Found, budget: int) -> str:
    """What is planned for a budget and neither measured nor known not to exist."""
    known = {(name, steps) for name, steps, _ in found.of(EQUAL, budget)}
    known |= {tuple(key.split(", ", 1)[1].rsplit(", ", 1)) for key, _ in found.missing(EQUAL) if key.startswith(f"{budget}, ")}
    left = [f"{name} ({steps})" for name, steps in expected_rows(budget) if (name, steps) not in known]
    return f"\nNot measured yet: {'; '.join(left)}. {command(found, f'equal-{budget}')} does it.\n" if left else ""


def command(found: Found, part: str) -> str:
    """What measures a part."""
    return f"`python -m bench.quality --model {found.name} --part {part}`"


def unmeasured(found: Found, part: str) -> str:
    return f"Not measured yet. {command(found, part)} does it.\n"


def all_rows(found: Found) -> str:
    parts = []
    for budget in BUDGETS:
        rows = equal_rows(found, budget)
        if rows:
            lines = [[f"**{name}**" if name in OURS else name, steps, cost(row), *cells(row)] for name, steps, row in rows]
            told = f"### {budget} of {found.steps} steps\n\n{command(found, f'equal-{budget}')}\n\n"
            parts.append(f"{told}{table(HEADER, lines)}\n{left_out(found, budget)}")
        else:
            parts.append(f"### {budget} of {found.steps} steps\n\n{unmeasured(found, f'equal-{budget}')}")
    return "\n".join(parts) + not_there(found, EQUAL)


def caches(found: Found) -> str:
    """The table like that of LESA's paper, and what of its claims holds."""
    rows = found.of_part(CACHES)
    if not rows:
        return unmeasured(found, CACHES) + not_there(found, CACHES)
    names = {"taylor:1": "TaylorSeer O1", "taylor:2": "TaylorSeer O2", "reuse": "FORA", "lesa": "LESA"}
    lines = []
    for budget in sorted({budget for budget, *_ in rows}, reverse=True):
        some = [(names.get(name, name), steps, row) for b, name, steps, row in rows if b == budget]
        plain = found.get(EQUAL, budget, "euler", "uniform")
        if plain is not None:
            some.append(("fewer steps", "uniform", plain))
        for name, steps in (("ab2", "uniform"), ("gram", "searched"), ("gram, by pictures", "pictures")):
            row = found.get(EQUAL, budget, name, steps)
            if row is not None:
                some.append((f"**{name}**" if name in OURS else name, steps, row))
        some.sort(key=lambda one: -np.mean(one[2]["psnr"]))
        for name, steps, row in some:
            with_threshold = f"{steps} {row['threshold']:.3f}" if "threshold" in row else steps
            lines.append([name, with_threshold, cost(row), f"{row['work']:.1f}", *cells(row)])
    header = [*HEADER[:3], "runs of the model", *HEADER[3:]]
    return table(header, lines) + "\n\n" + claims(found) + not_there(found, CACHES)


def not_there(found: Found, part: str) -> str:
    """What of a part could not be measured, and why, or which command makes what it lacks."""
    lines = [f"- {key}: {why}" for key, why in found.missing(part)]
    return "\nWhat there is not:\n\n" + "\n".join(lines) + "\n" if lines else ""


def claims(found: Found) -> str:
    """Sentences on what the paper says of LESA, made of the figures."""
    lines = []
    for interval, budget in zip(INTERVALS, sorted({b for b, *_ in found.of_part(CACHES)}, reverse=True), strict=False):
        ours = found.get(CACHES, budget, "lesa", f"N = {interval}")
        if ours is None:
            lines.append(f"- LESA for N = {interval} is not measured yet on this model, so nothing is said of it.")
            continue
        for text, other in (
            ("TaylorSeer O1 of the same interval", found.get(CACHES, budget, "taylor:1", f"N = {interval}")),
            ("TaylorSeer O2 of the same interval", found.get(CACHES, budget, "taylor:2", f"N = {interval}")),
            ("FORA of the same interval", found.get(CACHES, budget, "reuse", f"N = {interval}")),
            (f"SeaCache with about {budget} computed steps", found.get(CACHES, budget, "SeaCache", "threshold")),
            (f"FirstBlockCache with about {budget} computed steps", found.get(CACHES, budget, "FirstBlockCache", "threshold")),
            (f"plain sampling with {budget} steps", found.get(EQUAL, budget, "euler", "uniform")),
            (f"AB2 with {budget} steps", found.get(EQUAL, budget, "ab2", "uniform")),
            (f"gram with {budget} steps", found.get(EQUAL, budget, "gram", "searched")),
            ("a predictor for each branch of guidance", found.get(CACHES, budget, "lesa", f"N = {interval}, apart")),
            ("the same with the released bound 0.4", found.get(CACHES, budget, "lesa", f"N = {interval}, apart, 0.4")),
        ):
            if other is not None:
                change = paired(ours["psnr"], other["psnr"])
                lines.append(
                    f"- LESA, N = {interval} ({cost(ours)} computed), against {text}: {change} dB; {verdict(ours, other)}."
                )
    return "\n".join(lines) + "\n"


def transfer(found: Found) -> str:
    usual, rows = found.get(EQUAL, WHOLE_BUDGET, "gram, closed form", "searched"), found.of_part(TRANSFER)
    if usual is None or not rows:
        return unmeasured(found, TRANSFER)
    lines = [["the usual setting", *cells(usual), ""]]
    lines += [[name, *cells(row), paired(row["psnr"], usual["psnr"])] for _, _, name, row in rows]
    told = (
        f"Rows of `gram` in closed form, {WHOLE_BUDGET} of {found.steps} steps, on the steps searched in the usual setting: "
        f"fitted in another one, used in the usual one. `{MOOD} only`: to captions that say so. `other noise`: the same "
        "captions "
        "again, which says how much of a difference is chance.\n\n"
    )
    header = ["fitted at", *HEADER[3:], "PSNR, change"]
    return told + table(header, lines) + "\n" + not_there(found, TRANSFER)


def branches(found: Found) -> str:
    rows = found.of_part(BRANCHES)
    if not rows:
        return f"\n#### Steps of one branch of guidance\n\n{unmeasured(found, BRANCHES)}" if found.name in GUIDED else ""
    lines = [[name, steps, f"`{row['text']}`", f"{row['work']:g}", *cells(row)] for _, name, steps, row in rows]
    told = "\n#### Steps of one branch of guidance\n\nA step with a `c` runs the positive branch alone, half the work.\n\n"
    told += f"{command(found, BRANCHES)}\n\n"
    return told + table(["method", "one branch at", "schedule", "work", *HEADER[3:]], lines) + "\n"


def chart(found: Found, path: Path) -> bool:
    groups = {}
    for budget in BUDGETS:
        rows = equal_rows(found, budget)
        if rows:
            groups[budget] = [
                (f"{name}, {steps}", RED if name in OURS else BLUE if name in SOLVERS else GREY, row)
                for name, steps, row in rows
            ]
    if groups:
        draw(groups, path, f"{found.name}, {found.steps} steps")
    return bool(groups)


def summary(found: Sequence[Found]) -> str:
    """Ours beside the best other method by the mean, for every model and budget."""
    lines = []
    for one in found:
        for budget in BUDGETS:
            rows = equal_rows(one, budget)
            ours = [row for row in rows if row[0] in ("gram", "gram, by pictures", "gram, free times")]
            others = [row for row in rows if row[0] not in OURS]
            for name, steps, row in [*ours, *others[:1]]:
                told = f"**{name}**" if name in OURS else f"{name}, {steps}"
                change = paired(row["psnr"], others[0][2]["psnr"]) if name in OURS and others else ""
                lines.append([one.name, str(budget), told, *cells(row), change])
    if not lines:
        return ""
    header = ["model", "K", "method", *HEADER[3:], "against that other"]
    return (
        "\n## In short\n\nOurs, and the other method with the best mean, on whatever steps it does best.\n\n"
        + table(header, lines) + "\n"
    )  # fmt: skip


def model_section(found: Found, out: Path) -> str:
    """All that there is of a model."""
    picture = f"quality-{found.name}.png"
    drawn = chart(found, out.with_name(picture))
    facts = found.facts
    size = "x".join(facts[name] for name in ("width", "height", "frames") if name in facts)
    brief = "**A brief look: rows are fitted and trained on next to nothing, and say only that all runs.**\n"
    parts = [
        f"\n## {found.name}\n",
        brief if facts.get("brief") else "",
        f"{size}, {facts['steps']} steps, guidance {facts['guidance']}; {facts['captions']} captions; rows took "
        f"{found.seconds / 60:.0f} minutes of one processor in all, in float32: "
        f"{', '.join(f'{count} on {device}' for device, count in found.devices.items())}.\n",
        f"![{found.name}: PSNR by method]({picture})\n" if drawn else "",
        "### The comparisons that count\n\nOurs beside the best of all others by each measure; paired, ± standard error "
        "for means, "
        "with 95 % of paired bootstraps for the tail. *not shown*: less than two standard errors, or both signs among "
        "these 95 %.\n",
        comparisons(found),
        by_kind(found),
        all_rows(found),
        "### LESA and caches that need no training\n\nSteps of the methods' own rule; `SeaCache` and `FirstBlockCache` as "
        "diffusers "
        "has them, with the threshold at which they compute as many steps of training captions as LESA does. SeaCache "
        "stands for "
        "TeaCache, which diffusers has not: it accumulates relative L1 changes, too. A run of the model is all its blocks "
        "once: "
        "FirstBlockCache runs the first one in every step." + (FORMS_TOLD if found.get(CACHES, 10, *APART) else "") + "\n",
        f"{command(found, CACHES)}\n",
        caches(found),
        "### Fitted in one setting, used in another\n",
        f"{command(found, TRANSFER)}\n",
        transfer(found),
        branches(found),
        "\n### Distilled\n",
        f"{command(found, DISTILLED)}\n" if found.name in RESTRICTS else "",
        distilled_section(found),
    ]
    return "\n".join(part for part in parts if part)


def collect(name: str, work: Path, out: Path) -> Found | None:
    """The rows of a model; those of a work directory are copied beside the page."""
    source, kept = work / name / "rows.json", out.with_name(f"quality-{name}.json")
    if source.exists():
        kept.write_text(source.read_text(encoding="utf-8") + "\n", encoding="utf-8")
    return Found(json.loads(kept.read_text(encoding="utf-8"))) if kept.exists() else None


def page(models: Sequence[str], work: Path, out: Path, ablation_data: Path, date: str) -> str:
    found = {name: collect(name, work, out) for name in models}
    captions = next((one.facts["captions"] for one in found.values() if one is not None), 0)
    parts = [
        INTRO.format(
            num=captions,
            fit=NUM_FIT,
            choose=NUM_CHOOSE,
            bootstraps=f"{ROUNDS:,}",
            whole=WHOLE_BUDGET,
            date=date,
            linca=LINCA_UPDATES,
        )
    ]
    parts.append(summary([one for one in found.values() if one is not None]))
    for name, one in found.items():
        todo = f"Not measured yet. `python -m bench.quality --model {name}` does it.\n"
        parts.append(f"\n## {name}\n\n{todo}" if one is None else model_section(one, out))
    if ablation_data.exists():
        parts.append(ablation(ablation_data))
    return "\n".join(parts)


@click.command()
@click.option("--work", type=click.Path(path_type=Path), default=Path("build/quality"), show_default=True)
@click.option("--ablation-data", type=click.Path(path_type=Path), default=Path("bench/gram_ablation.json"), show_default=True)
@click.option("--out", type=click.Path(path_type=Path), default=Path("bench/QUALITY.md"), show_default=True)
@click.option("--date", required=True, help="Day of the measurement, as 2026-11-20.")
def main(work: Path, ablation_data: Path, out: Path, date: str) -> None:
    out.write_text(page(REFERENCE_MODELS, work, out, ablation_data, date), encoding="utf-8")


if __name__ == "__main__":
    main()
