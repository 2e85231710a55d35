"""Tables and plots from ``bench/quality.json``: ``python -m bench.quality_report`` writes ``bench/QUALITY.md``."""

import json
from pathlib import Path
from typing import Any

import click
import matplotlib as mpl
import numpy as np

mpl.use("Agg")
import matplotlib.pyplot as plt

MAIN = "50 steps"
FEW = (6, 8, 10)
SOLVERS = ("euler", "ab2", "ab3", "unipc", "dpm")
CACHES = ("reuse", "taylor:1", "taylor:2", "newton:2", "hicache", "foca", "spectrum", "adams:2", "l2p (Adam)", "l2p (closed)",
          "lesa")  # fmt: skip
HIDDEN_CACHES = ("reuse", "taylor:1", "taylor:2", "newton:2", "hicache", "foca", "spectrum", "lesa")
OURS = ("gram", "gram polished", "gram-hidden", "bns")
FINE_ROWS = (
    ("ab2", "searched"),
    ("unipc", "searched"),
    ("gram", "searched"),
    ("gram polished", "searched"),
    ("gram", "searched, to fine"),
    ("gram polished", "searched, to fine"),
)
INTRO = """# Quality: every method at every budget

PSNR in dB of the picture against the uncached run of the same noise, mean over {num} held-out captions ± standard error of the
mean. tiny-flux, 64x64, guidance 3.5; seeds 0 … {last}; fits and searches saw 32 training captions with noise of their own.
**own**: the method's published schedule with at most K computed steps (how many it has is in brackets where it has fewer);
for a plain solver the model's own sampler with K steps. **searched**: K steps found by `--schedule search`. A dash: no such
schedule. These are claims about tiny-flux.

The spread between captions is wide (for `gram` with 8 steps from {low:.0f} to {high:.0f} dB, 5th to 95th percentile), so
differences are paired, caption by caption.

Made by `python -m bench.quality && python -m bench.gram_ablation && python -m bench.quality_report --date {date}` on 2 cores
of a shared machine; every row is in `bench/quality.json`, caption by caption.
"""


class Rows:
    """The rows of one setting."""

    def __init__(self, data: dict[str, Any], setting: str) -> None:
        self._data, self.setting = data, setting

    def get(self, budget: int, method: str, schedule: str) -> dict[str, Any] | None:
        row = self._data.get(f"{self.setting}|{budget}|{method}|{schedule}")
        return None if row is None or "missing" in row else row

    def psnr(self, budget: int, method: str, schedule: str, key: str = "psnr") -> np.ndarray | None:
        row = self.get(budget, method, schedule)
        return None if row is None else np.array(row[key])

    def budgets(self) -> list[int]:
        return sorted({int(k.split("|")[1]) for k in self._data if k.startswith(f"{self.setting}|")} - {50})

    def best(self, budget: int, methods: tuple[str, ...], schedule: str) -> tuple[str, np.ndarray] | None:
        found = [(m, v) for m in methods if (v := self.psnr(budget, m, schedule)) is not None]
        return max(found, key=lambda pair: pair[1].mean()) if found else None


def cell(rows: Rows, budget: int, method: str, schedule: str, key: str = "psnr") -> str:
    row = rows.get(budget, method, schedule)
    if row is None:
        return "–"
    values = np.array(row[key])
    fewer = f" [{row['computed']}]" if row["computed"] != budget else ""
    return f"{values.mean():.2f} ± {values.std(ddof=1) / len(values) ** 0.5:.2f}{fewer}"


def table(header: list[str], lines: list[list[str]]) -> str:
    return "\n".join("| " + " | ".join(line) + " |" for line in [header, ["---"] * len(header), *lines])


def grid(rows: Rows) -> str:
    """Methods and schedules by budgets."""
    budgets, lines = rows.budgets(), []
    for method in (*SOLVERS, *CACHES, *OURS):
        for schedule in ("own", "interval", "gram's", "CEM", "LeMiCa", "searched"):
            cells = [cell(rows, budget, method, schedule) for budget in budgets]
            if any(c != "–" for c in cells):
                name = f"**{method}**" if method.startswith("gram") else method
                lines.append([name, schedule, *cells])
    return table(["method", "schedule", *(f"K = {k}" for k in budgets)], lines)


def paired(ours: np.ndarray, theirs: np.ndarray) -> str:
    change = ours - theirs
    return f"{change.mean():+.2f} ± {change.std(ddof=1) / len(change) ** 0.5:.2f}"


def verdicts(rows: Rows) -> str:
    """What the issue asks, paired."""
    lines = []
    for budget in FEW:
        ours = rows.psnr(budget, "gram polished", "searched")
        closed = rows.psnr(budget, "gram", "searched")
        if ours is None or closed is None:
            continue
        for label, methods, schedule, goal in (
            ("best plain solver, its own time steps", SOLVERS, "own", "+5"),
            ("best plain solver, searched time steps", SOLVERS, "searched", "+3"),
            ("best published feature cache, its own schedule", HIDDEN_CACHES, "own", "+8"),
            ("best published feature cache, searched schedule", HIDDEN_CACHES, "searched", ""),
            ("best output-cut method, its own schedule", ("adams:2", "l2p (Adam)", "l2p (closed)"), "own", ""),
            ("BNS, the same time steps", ("bns",), "gram's", "-1 closed, above polished"),
            ("LESA with 10", ("no row",), "own", "> 0"),
        ):
            best = rows.best(budget, methods, schedule)
            if budget == 6 and label.startswith("LESA"):
                best = rows.best(10, ("lesa",), "own")
            if best is not None:
                name, theirs = best
                lines.append([str(budget), f"{label}: {name}", f"{theirs.mean():.2f}", paired(closed, theirs),
                              paired(ours, theirs), goal])  # fmt: skip
    header = ["K", "compared with", "its PSNR", "gram (closed form)", "gram (polished)", "asked"]
    return table(header, lines)


def times(rows: Rows) -> str:
    lines = []
    for budget in FEW:
        for method, schedule in (("gram", "searched"), ("gram polished", "searched"), ("bns", "gram's")):
            row = rows.get(budget, method, schedule)
            if row is not None:
                search = f"{row['search_s']:.1f}" if "search_s" in row else "gram's"
                lines.append([str(budget), method, search, f"{row['fit_s']:.1f}", f"{np.mean(row['psnr']):.2f}"])  # fmt: skip
    return table(["K", "method", "search s", "fit s", "PSNR dB"], lines)


def fine_table(rows: Rows) -> str:
    """Against 200 steps."""
    full = rows.psnr(50, "uncached", "own", "psnr_fine")
    lines = [] if full is None else [["uncached, 50 steps", "50", cell(rows, 50, "uncached", "own", "psnr_fine"), ""]]
    for budget in FEW:
        for method, schedule in FINE_ROWS:
            values = rows.psnr(budget, method, schedule, "psnr_fine")
            if values is not None and full is not None:
                lines.append([f"{method}, {schedule}", str(budget), cell(rows, budget, method, schedule, "psnr_fine"),
                              paired(values, full)])  # fmt: skip
    return table(["row", "K", "PSNR dB against 200 steps", "against the 50-step run"], lines)


def prompts_table(rows: Rows) -> str:
    counts = (1, 2, 4, 8, 16, 32, 64)
    lines = [[str(n), cell(rows, 8, "gram", f"{n} prompts"), cell(rows, 8, "gram polished", f"{n} prompts")] for n in counts]
    return table(["prompts", "closed form", "polished"], lines)


def ablation(path: Path) -> str:
    """The variants of the closed form, and calibration on other captions."""
    data = json.loads(path.read_text())
    variants = data["variants"]
    lines = []
    for name in next(iter(variants.values())):
        cells = []
        for entry in variants.values():
            row = entry.get(name)
            if row is None:
                cells.append("–")
                continue
            cells.append(f"{row['db']:.2f}" if name == "closed form" else f"{row['change']:+.2f} ± {row['stderr']:.2f}")
        lines.append([name, *cells])
    captions = data["captions"]
    shift = (
        f"Calibrated on 32 captions of the same colours, shapes and places: {captions['same']['db']:.2f} dB. On 32 captions "
        f"that share none of them: {captions['disjoint']['db']:.2f} dB, {captions['disjoint']['change']:+.2f} ± "
        f"{captions['disjoint']['stderr']:.2f} (latents, 8 steps, closed form, 32 other captions)."
    )
    return table(["variant", *(f"K = {k}" for k in variants)], lines) + "\n\n" + shift


def plot(rows: Rows, path: Path) -> None:
    figure, axes = plt.subplots(figsize=(8, 4.6), layout="constrained")
    shown = (("gram polished", "searched", "C3", "-"), ("gram", "searched", "C3", "--"), ("bns", "gram's", "C5", ":"),
             ("ab2", "searched", "C0", "-"), ("unipc", "searched", "C9", "-"), ("unipc", "own", "C9", ":"),
             ("ab2", "own", "C0", ":"), ("taylor:1", "searched", "C2", "-"), ("taylor:1", "own", "C2", ":"),
             ("l2p (Adam)", "own", "C4", ":"), ("spectrum", "own", "C1", ":"), ("lesa", "own", "k", ""))  # fmt: skip
    for method, schedule, colour, style in shown:
        points = [(rows.get(k, method, schedule), k) for k in rows.budgets()]
        found = [(row["computed"], row["psnr"]) for row, _ in points if row is not None]
        if found:
            x = [k for k, _ in found]
            y = [np.mean(v) for _, v in found]
            error = [np.std(v, ddof=1) / len(v) ** 0.5 for _, v in found]
            label = f"{method}, {schedule}"
            axes.errorbar(x, y, error, color=colour, ls=style or "none", marker="o", ms=4, lw=1.4, capsize=2, label=label)
    axes.set(xlabel="computed steps of 50", ylabel="PSNR dB against the uncached run", xscale="log")
    axes.set_xticks(rows.budgets(), [str(k) for k in rows.budgets()])
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
    figure.savefig(path, dpi=110)


def plot_prompts(rows: Rows, path: Path) -> None:
    figure, axes = plt.subplots(figsize=(5.4, 3.2), layout="constrained")
    for method, colour in (("gram", "C3"), ("gram polished", "C1")):
        found = [(n, v) for n in (1, 2, 4, 8, 16, 32, 64) if (v := rows.psnr(8, method, f"{n} prompts")) is not None]
        if found:
            error = [v.std(ddof=1) / len(v) ** 0.5 for _, v in found]
            axes.errorbar([n for n, _ in found], [v.mean() for _, v in found], error, color=colour, marker="o", ms=4, capsize=2,
                          label="closed form" if method == "gram" else "polished")  # fmt: skip
    axes.set(xlabel="calibration prompts", ylabel="PSNR dB, 8 of 50 steps", xscale="log")
    axes.set_xticks([1, 2, 4, 8, 16, 32, 64], ["1", "2", "4", "8", "16", "32", "64"])
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=110)


@click.command()
@click.option("--data", type=click.Path(path_type=Path), default=Path("bench/quality.json"), show_default=True)
@click.option("--ablation-data", type=click.Path(path_type=Path), default=Path("bench/gram_ablation.json"), show_default=True)
@click.option("--out", type=click.Path(path_type=Path), default=Path("bench/QUALITY.md"), show_default=True)
@click.option("--date", required=True, help="Day of the measurement, as 2026-11-20.")
def main(data: Path, ablation_data: Path, out: Path, date: str) -> None:
    content = json.loads(data.read_text())["rows"]
    rows = Rows(content, MAIN)
    spread = rows.psnr(8, "gram", "searched")
    assert spread is not None
    low, high = np.percentile(spread, [5, 95])
    parts = [
        INTRO.format(num=len(spread), last=len(spread) - 1, low=low, high=high, date=date),
        "![PSNR by computed steps](quality.png)\n",
        "## The comparisons that count\n\nPaired differences, ours minus theirs, in dB ± standard error.\n",
        verdicts(rows),
        "\n## All rows, 50 steps\n",
        grid(rows),
        "\nAt K = 6, 8, 10 every search ends with closed-loop runs on 8 prompts; at the other budgets only those of `gram` do, "
        "and nothing above 10 steps is polished (a Jacobian takes a cubic number of model evaluations).\n",
        "\n## Fitting time\n\nSeconds on one core beside another job; 32 prompts (BNS: 120 updates of 8).\n",
        times(rows),
        "\n## Against the fine reference\n\n`to fine`: fitted to 200 steps, nodes on their grid.\n",
        fine_table(rows),
        "\n## How many prompts\n\n8 of 50 steps, gram's schedule (which was searched with 32).\n\n"
        "![PSNR by prompts](quality-prompts.png)\n",
        prompts_table(rows),
    ]
    if ablation_data.exists():
        text = (
            "\n## What helps `gram`\n\nRelative L2 error of the final latents in dB on 32 prompts that no fit saw, and paired "
            "changes from the closed form; the searched schedules of the table above.\n"
        )
        parts += [text, ablation(ablation_data)]
    for name in ("28 steps", "shift 1.6"):
        other = Rows(content, name)
        if other.budgets():
            parts += [f"\n## Another setting: {name}\n\n32 captions.\n", grid(other)]
    out.write_text("\n".join(parts) + "\n")
    plot(rows, out.with_name("quality.png"))
    plot_prompts(rows, out.with_name("quality-prompts.png"))


if __name__ == "__main__":
    main()
