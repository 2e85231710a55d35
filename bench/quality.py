"""Every method at equal cost on the reference models: ``python -m bench.quality``, or ``--model tiny-flux`` for one.

    python -m bench.quality [--model NAME]… [--part PART]… [--work build/quality] [--captions 128] [--again METHOD]… [--look]
                            [--device cuda]

Fitted on 32 training captions (schedules by pictures chosen on 96 more), measured on 128 held-out captions, seeds from 0. Rows,
caption by caption, lie in ``WORK/MODEL/rows.json`` as soon as they are measured; an interrupted run goes on where it was.
``--again`` measures a method's rows anew, after a change of its code. ``--look`` runs everything on a handful of captions and
updates, to see that it runs. What breaks off is told, and the rest goes on; what lacks a trained file says which command makes
it, and is tried again by the next run. ``python -m bench.quality_report`` makes of the rows ``bench/quality-MODEL.json``,
charts, and ``bench/QUALITY.md``. No times are measured: it can run beside other work.
"""

import logging
import sys
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path

import click

from bench.quality_caches import bench_caches
from bench.quality_distilled import bench_distilled
from bench.quality_methods import BUDGETS, WHOLE_BUDGET, bench_equal_cost
from bench.quality_setting import LOOK, NUM_EVAL, Extent, Rows, Setting, decoder_hash, open_model, open_setting
from bench.quality_transfer import bench_branches, bench_transfer
from cachec.compiler.models import find_model
from cachec.compiler.models.base import ModelSpec
from cachec.runtime.device import CPU, DeviceName
from cachec.runtime.errors import ModelUnavailableError

REFERENCE_MODELS = ("tiny-flux", "tiny-qwen", "tiny-hunyuan")


def _equal_cost(budget: int) -> Callable[[Rows, Setting], None]:
    return lambda rows, setting: bench_equal_cost(rows, setting, budget)


PARTS: Mapping[str, Callable[[Rows, Setting], None]] = {  # what the page can least do without comes first
    f"equal-{WHOLE_BUDGET}": _equal_cost(WHOLE_BUDGET),
    "caches": bench_caches,
    "distilled": bench_distilled,
    **{f"equal-{budget}": _equal_cost(budget) for budget in BUDGETS if budget != WHOLE_BUDGET},
    "transfer": bench_transfer,
    "branches": bench_branches,
}


def bench_model(
    spec: ModelSpec, work: Path, parts: tuple[str, ...], again: tuple[str, ...], extent: Extent, device: DeviceName
) -> list[str]:
    """Measure what is missing of one model. Returns what broke off."""
    model, settings = open_model(spec)
    name = spec.name
    folder = work / name
    setting = open_setting(model, settings, folder, extent, device)
    weights = {"weights": model.weights_hash[:12], "decoder": decoder_hash(model)}
    facts = {"model": name, **weights, **settings.facts, "steps": settings.steps, **extent.facts}
    rows = Rows(folder / "rows.json", facts, device)
    if again:
        rows.forget(again)
    for part, bench in PARTS.items():
        if not parts or part in parts:
            print(f"{name}: {part}", flush=True)
            with rows.guarding(f"{name}: {part}"):
                bench(rows, setting)
    return rows.failed


@click.command()
@click.option("--model", "models", multiple=True, help="A reference model, or several; all that there are by default.")
@click.option("--part", "parts", multiple=True, type=click.Choice(list(PARTS)), help="Only these.")
@click.option("--work", type=click.Path(path_type=Path), default=Path("build/quality"), show_default=True)
@click.option("--captions", default=NUM_EVAL, show_default=True, help="Held-out captions.")
@click.option("--again", multiple=True, metavar="METHOD", help="Measure the rows of this method anew.")
@click.option(
    "--look", is_flag=True, help="Everything on a handful of captions and updates, to see that it runs; give a --work."
)
@click.option("--device", default=CPU, show_default=True, help="Where models run: cpu, cuda.")
def main(
    models: tuple[str, ...],
    parts: tuple[str, ...],
    work: Path,
    captions: int,
    again: tuple[str, ...],
    look: bool,
    device: str,
) -> None:
    logging.basicConfig(level=logging.ERROR)
    warnings.filterwarnings("ignore")
    failed = list[str]()
    for name in models or REFERENCE_MODELS:
        try:
            spec = find_model(name)
        except ModelUnavailableError as error:
            if models:
                raise
            print(f"{name} is left out: {error}", flush=True)
        else:
            failed += bench_model(spec, work, parts, again, LOOK if look else Extent(captions), DeviceName.parse(device))
    if failed:
        sys.exit(f"{len(failed)} broke off, and are tried again by the same command: {'; '.join(failed)}")


if __name__ == "__main__":
    main()
