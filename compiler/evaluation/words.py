"""An evaluation in words: its table, its headline, and the notes that belong to them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cachec.compiler.evaluation.evaluate import Evaluation
from cachec.runtime.program import Program

NO_VALUE, EQUAL = "–", "equal"
HEADER = ("row", "computed", "PSNR dB", "p5", "worst", "PSNR dB vs fine", "SSIM", "p5", "latent error", "p95", "LPIPS",
          "attributes", "loop s", "request s", "× uncached", "× diffusers")  # fmt: skip
MEANINGS = (
    "PSNR dB: closeness to the uncached picture, in decibels over floats in [0, 1]; higher is better, a tenth "
    "of the squared error for every 10 dB. It says how faithful a fast run is, not how good its picture is.",
    "PSNR dB vs fine: the same against a run of many steps. The uncached run's own figure there is the error of its number of "
    "steps: rows of about that figure are as good as it.",
    "p5, worst: the 5th percentile over prompts, a value that occurred, and the worst prompt; p95 is the same for errors. A "
    "mean hides the pictures that caching spoils.",
    "Latent error: L2 distance from the uncached latents over their norm; 0 is equal.",
    "LPIPS: learned perceptual distance from the uncached picture (AlexNet); lower is better.",
    "Attributes: share of what the prompts state that a classifier reads off the picture; it judges the picture alone.",
    "Loop s: median seconds of the denoise loop; request s also encodes the prompt and decodes the picture. Rows take turns on "
    "every prompt.",
    "plain is the model's own sampler with as few steps as the level computes; ab2, ab3, unipc and dpm are other solvers with "
    "as many model evaluations: what caching has to beat.",
)


@dataclass(frozen=True, eq=False)
class Report:
    """An evaluation with the name of its bundle, and the facts of the bundle and of this machine as rows of a table."""

    name: str
    evaluation: Evaluation
    facts: Sequence[tuple[str, str]]
    environment: Sequence[tuple[str, str]]

    @property
    def headline_row(self) -> dict[str, Any]:
        """The row of the compared level."""
        level = self.evaluation.setting["level"]
        return next(row for row in self.evaluation.rows if row["kind"] == "level" and row["name"] == level)


def headline(report: Report) -> str:
    """One sentence: how fast, and how close."""
    row, setting = report.headline_row, report.evaluation.setting
    close = "with equal pictures"
    if row["psnr_db"] is not None:
        close = f"at {row['psnr_db']:.1f} dB PSNR from its pictures (worst {row['psnr_db_min']:.1f})"
    return (
        f"{row['speedup_vs_uncached']:.1f} times as fast as the uncached loop, {close}: "
        f"{row['compute_steps']} model evaluations instead of {setting['steps']}"
    )


def render_markdown(report: Report) -> str:
    """Everything but the pictures and plots."""
    parts = [f"# {report.name}", headline(report) + ".", format_table(report.evaluation)]
    schedules = [_schedule_line(name, program) for name, program in report.evaluation.programs.items()]
    parts += ["## Schedules", "\n".join(schedules)]
    facts = [f"- {name.strip()}: {value}" if name else f"  {value}" for name, value in (*report.facts, *report.environment)]
    parts += ["## Settings and environment", "\n".join(facts)]
    parts += ["## What the figures mean", "\n".join(f"- {line}" for line in MEANINGS)]
    return "\n\n".join(parts) + "\n"


def _schedule_line(name: str, program: Program) -> str:
    computed, alone = program.compute_steps, program.one_branch_steps
    every = len(computed) == program.num_steps and not alone
    steps = "all" if every else ", ".join(f"{step}{'c' * (step in alone)}" for step in computed)
    return f"- {name} computes {steps} of {program.num_steps} steps"


def table_cells(row: Mapping[str, Any]) -> list[str]:
    """The cells of one row, in the order of ``HEADER``."""
    return [
        row["name"],
        str(row["compute_steps"]),
        _with_error(row["psnr_db"], row["psnr_db_stderr"]),
        _number(row["psnr_db_p5"], ".1f", EQUAL),
        _number(row["psnr_db_min"], ".1f", EQUAL),
        _with_error(row["psnr_db_fine"], row["psnr_db_fine_stderr"]),
        f"{row['ssim']:.4f}",
        f"{row['ssim_p5']:.4f}",
        f"{row['latent_error']:.4f}",
        f"{row['latent_error_p95']:.4f}",
        _number(row["lpips"], ".4f"),
        _number(row["attribute_accuracy"], ".1%"),
        f"{row['seconds_loop']:.4f}",
        f"{row['seconds_total']:.4f}",
        f"{row['speedup_vs_uncached']:.2f}",
        f"{row['speedup_vs_eager']:.2f}",
    ]


def format_table(evaluation: Evaluation) -> str:
    """The evaluation as a Markdown table, with what it was measured on; levels of the bundle are bold."""
    lines = [_line(HEADER), _line(["---"] * len(HEADER))]
    for row in evaluation.rows:
        name, *cells = table_cells(row)
        lines.append(_line([f"**{name}**" if row["kind"] == "level" else name, *cells]))
    return "\n".join([*lines, "", *table_notes(evaluation)])


def table_notes(evaluation: Evaluation) -> list[str]:
    """What the table was measured on, and what is not in it."""
    setting = evaluation.setting
    levels = [row["name"] for row in evaluation.rows if row["kind"] == "level"]
    notes = [
        f"{_count(setting['prompts'], 'prompt')} from seed {setting['seed']}, {setting['steps']} steps, back end "
        f"{setting['backend']}; method {setting['method']}, levels of this bundle: {', '.join(levels)}.",
        f"Level {setting['level']} computes steps {', '.join(map(str, setting['schedule']))} of {setting['schedule_steps']}; "
        "methods run on these, solvers with as many evaluations.",
        f"PSNR ± standard error, against the uncached run and against {setting['fine_steps']} steps; "
        "seconds are medians; speed-ups are ratios of loop medians.",
        f"LPIPS: {setting['lpips']}.",
    ]
    if "workers" in setting:
        notes.append(f"{setting['workers']} workers measured side by side: seconds are longer where they share a machine.")
    probe = setting["probe"]
    if probe is None:
        notes.append("Attributes: not available: this model has no probe.")
    else:
        skipped = probe["prompts_skipped"]
        more = f"; {_count(skipped, 'prompt')} skipped, being no caption that it can check" if skipped else ""
        notes.append(f"Attributes: a classifier reads {_count(probe['attributes'], 'attribute')} that the prompts state{more}.")
    return notes


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


def decibels(value: float | None) -> str:
    """A PSNR; there is none of equal pictures."""
    return EQUAL if value is None else f"{value:.1f} dB"


def _number(value: float | None, form: str, none: str = NO_VALUE) -> str:
    return none if value is None else format(value, form)


def _with_error(value: float | None, error: float | None) -> str:
    if value is None:
        return EQUAL
    return f"{value:.2f}" if error is None else f"{value:.2f} ± {error:.2f}"


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
