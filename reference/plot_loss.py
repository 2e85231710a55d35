"""Draw the loss curve: ``python -m reference.plot_loss --out reference/build``."""

import json
from pathlib import Path

import click
import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt


@click.command()
@click.option("--out", type=click.Path(path_type=Path), required=True)
def main(out: Path) -> None:
    lines = [json.loads(line) for line in (out / "loss.jsonl").read_text().splitlines()]
    by_step = {line["step"]: line for line in lines}  # a resumed run repeats the steps after its checkpoint
    points = [by_step[step] for step in sorted(by_step)]
    figure, axes = plt.subplots(figsize=(6, 3.2), layout="constrained")
    axes.plot([p["samples"] / 1000 for p in points], [p["loss"] for p in points], color="#205080")
    axes.set(xlabel="samples seen (thousands)", ylabel="loss (velocity MSE)", yscale="log")
    axes.set_title("tiny-flux: flow matching, then guidance distillation", fontsize=10)
    axes.grid(alpha=0.3, which="both")
    figure.savefig(out / "loss.png", dpi=110)


if __name__ == "__main__":
    main()
