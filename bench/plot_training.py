"""Draw the training curve that a predictor file carries: ``python bench/plot_training.py PREDICTOR -o curve.png``."""

import json
from pathlib import Path

import click
import matplotlib as mpl
from safetensors import safe_open

mpl.use("Agg")
import matplotlib.pyplot as plt


@click.command()
@click.argument("predictor", type=click.Path(path_type=Path))
@click.option("-o", "--out", type=click.Path(path_type=Path), required=True)
def main(predictor: Path, out: Path) -> None:
    with safe_open(predictor, "np") as file:
        facts = file.metadata()
    curve = json.loads(facts["curve"])
    figure, axes = plt.subplots(figsize=(6, 3.4), layout="constrained")
    for phase, label in ((0, "phase 1: teacher-forced"), (1, "phase 2: closed loop")):
        points = [p for p in curve if p["phase"] == phase]
        axes.plot([p["updates"] / 1000 for p in points], [p["held_out_latent_rel_l2"] for p in points], label=label)
    axes.axhline(curve[0]["held_out_latent_rel_l2"], color="gray", lw=0.8, ls="--", label="before training (reuse)")
    axes.set(xlabel="updates (thousands)", ylabel="held-out latents, relative L2", yscale="log")
    axes.set_title(f"{facts['method']} on {facts['model']}, {facts['steps']} steps, interval {facts['interval']}", fontsize=10)
    axes.grid(alpha=0.3, which="both")
    axes.legend(frameon=False, fontsize=8)
    figure.savefig(out, dpi=110)


if __name__ == "__main__":
    main()
