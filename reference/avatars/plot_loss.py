"""Draw how the trainings went: ``python -m reference.avatars.plot_loss --out build/reference``.

Reads the transformers' logs ``OUT/NAME.jsonl`` and writes ``reference/models/loss.png``. Distilled models and predictors carry
their curves with them: of those that ship it writes ``reference/models/held-out.png``.
"""

import json
from itertools import chain
from pathlib import Path

import click
import matplotlib as mpl
from safetensors import safe_open

from cachec.compiler.methods.parameters import PRETRAINED
from cachec.compiler.models.distribution import predictor_folders
from reference.avatars.assemble import PIPELINES

MODELS = Path(__file__).parents[1] / "models"
TO, HELD_OUT = MODELS / "loss.png", MODELS / "held-out.png"


def read_log(path: Path, what: str) -> tuple[list[int], list[float]]:
    """Updates, and ``what`` after them, of the lines that say it."""
    lines = [line for line in map(json.loads, path.read_text().splitlines()) if what in line]
    return [line["step"] for line in lines], [line[what] for line in lines]


def draw_held_out() -> None:
    """What held-out samples said during distillations and trainings of predictors, from the files that ship."""
    import matplotlib.pyplot as plt

    figure, (distilled, lesa, disca) = plt.subplots(1, 3, figsize=(11, 3.6), layout="constrained")
    for path in sorted(MODELS.glob("cachec_models/*/distilled.json")):
        facts = json.loads(path.read_text())
        points = [(one["update"], one["held_out"]) for one in facts["curve"]]
        (line,) = distilled.plot(*zip(*points, strict=True), label=path.parent.name)
        distilled.plot(facts["best_update"], facts["held_out_rel_l2"], "o", color=line.get_color())
    for path in sorted(chain.from_iterable(folder.glob("*.safetensors") for folder in (PRETRAINED, *predictor_folders()))):
        with safe_open(path, "np") as file:
            facts = file.metadata()
        curve = json.loads(facts["curve"])
        if facts["method"] == "lesa":
            points = [(one["updates"], one["held_out_latent_rel_l2"]) for one in curve]
            label = f"{facts['model']}, N = {facts['interval']}"
            (line,) = lesa.plot(*zip(*points, strict=True), label=label)
            begun = next(one for one in curve if one["phase"] == 1)
            lesa.plot(begun["updates"], begun["held_out_latent_rel_l2"], "o", color=line.get_color())
        else:
            points = [(one["update"], one["held_out"]) for one in curve]
            disca.plot(*zip(*points, strict=True), label=facts["model"])
            disca.axvline(int(facts["updates"]), color="gray", lw=0.8, ls="--")
    distilled.set(title="Restricted MeanFlow", xlabel="updates", ylabel="held-out ends, relative L2")
    lesa.set(title="LESA", xlabel="updates", yscale="log", ylabel="held-out latents, relative L2")
    disca.set(title="DisCa", xlabel="updates", yscale="log", ylabel="held-out velocities, relative L2")
    for axes in (distilled, lesa, disca):
        axes.grid(alpha=0.3, which="both")
        axes.legend(frameon=False, fontsize=8)
    figure.savefig(HELD_OUT, dpi=110)
    print(HELD_OUT)


@click.command()
@click.option("--out", type=click.Path(path_type=Path), default=Path("build/reference"), show_default=True, help="Logs.")
def main(out: Path) -> None:
    mpl.use("Agg")
    import matplotlib.pyplot as plt

    draw_held_out()
    if not any((out / f"{name}.jsonl").exists() for name in PIPELINES):
        print(f"{out} has no logs: {TO} stays as it is")
        return
    figure, axes = plt.subplots(figsize=(7, 3.5), layout="constrained")
    for name in PIPELINES:
        if not (log := out / f"{name}.jsonl").exists():
            print(f"{log} is not there: {name} is left out")
            continue
        (line,) = axes.plot(*read_log(log, "loss"), label=name)
        axes.plot(*read_log(log, "held_out_loss"), "o", color=line.get_color(), markerfacecolor="none")
    axes.set(xlabel="updates of 32 samples", ylabel="flow loss", yscale="log")
    axes.legend(frameon=False)
    figure.savefig(TO, dpi=110)
    print(TO)


if __name__ == "__main__":
    main()
