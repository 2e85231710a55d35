"""Running an evaluation from the command line, and its table."""

from pathlib import Path
from typing import Any

from cachec.compiler.calibration.evaluate import Evaluation, evaluate
from cachec.compiler.calibration.prompts import default_prompts, read_prompts
from cachec.compiler.models import find_model, load_model
from cachec.compiler.models.base import check_prompts
from cachec.engines import open_bundle
from cachec.runtime.errors import InputError
from cachec.runtime.noise import check_seed


def evaluate_bundle(bundle: Path, *, file: Path | None, num: int, seed: int, source: str | None) -> Evaluation:
    """Evaluate a bundle on the first ``num`` prompts of ``file``, or of the list that ships for its model.

    Raises:
        InputError: there are fewer prompts than asked for.
    """
    if num < 1:
        raise InputError(f"num is {num}; it must be at least 1")
    check_seed(seed)
    with open_bundle(bundle) as loaded:
        spec = find_model(source or loaded.manifest.model["source"])
        prompts = read_prompts(file) if file else default_prompts(loaded.manifest.settings["prompts"], "eval")
        check_prompts(prompts)
        if num > len(prompts):
            raise InputError(f"num is {num}, but there are only {len(prompts)} prompts: give more with --prompts")
        return evaluate(loaded, load_model(spec), prompts[:num], seed=seed)


def format_table(evaluation: Evaluation) -> str:
    """The evaluation as a Markdown table, with what it was measured on."""
    setting = evaluation.setting
    header = ["row", "computed", "PSNR dB", "PSNR dB vs fine", "SSIM", "latent rel. L2", "loop s", "request s",
              "× uncached", "× diffusers"]  # fmt: skip
    lines = [_line(header), _line(["---"] * len(header))]
    lines += [_line(_cells(row, setting["method"])) for row in evaluation.rows]
    lines += [
        "",
        f"{setting['prompts']} prompts from seed {setting['seed']}, {setting['steps']} steps, back end {setting['backend']}; "
        f"computed steps {', '.join(map(str, setting['schedule']))}.",
        f"PSNR ± standard error, against the uncached run and against {setting['fine_steps']} steps; "
        "seconds are medians; speed-ups are ratios of loop medians.",
    ]
    return "\n".join(lines)


def _cells(row: dict[str, Any], method: str) -> list[str]:
    name = f"**{method}** (this bundle)" if row["name"] == "bundle" else row["name"]
    return [
        name,
        str(row["compute_steps"]),
        _with_error(row["psnr_db"], row["psnr_db_stderr"]),
        _with_error(row["psnr_db_fine"], row["psnr_db_fine_stderr"]),
        f"{row['ssim']:.4f}",
        f"{row['latent_rel_l2']:.4f}",
        f"{row['seconds_loop']:.4f}",
        f"{row['seconds_total']:.4f}",
        f"{row['speedup_vs_uncached']:.2f}",
        f"{row['speedup_vs_eager']:.2f}",
    ]


def _with_error(value: float | None, error: float | None) -> str:
    if value is None:
        return "equal"
    return f"{value:.2f}" if error is None else f"{value:.2f} ± {error:.2f}"


def _line(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"
