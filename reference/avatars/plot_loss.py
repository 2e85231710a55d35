"""Draw how the transformers' trainings went: ``python -m reference.avatars.plot_loss --out build/reference``.

Reads the logs ``OUT/NAME.jsonl`` and writes ``reference/models/loss.png``.
"""

import json
from pathlib import Path

import click
import matplotlib as mpl

from reference.avatars.assemble import PIPELINES

TO = Path(__file__).parents[1] / "models" / "loss.png"


def read_log(path: Path, what: str) -> tuple[list[int], list[float]]:
    """Updates, and ``what`` after them, of the lines that say it."""
    lines = [line for line in map(json.loads, path.read_text().splitlines()) if what in line]
    return [line["step"] for line in lines], [line[what] for line in lines]


@click.command()
@click.option("--out", type=click.Path(path_type=Path), default=Path("build/reference"), show_default=True, help="Logs.")
def main(out: Path) -> None:
    mpl.use("Agg")
    import matplotlib.pyplot as plt

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
