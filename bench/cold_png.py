"""From process start to a PNG on the disk, by the clock, without torch: ``python -m bench.cold_png BUNDLE``.

``cachec run`` in fresh processes, one after the other. The first finds no hashes that cachec remembers, and is shown apart; in
the others the files are in the page cache, too. To be run where nothing else runs.
"""

import os
import tempfile
from pathlib import Path

import click

from bench.cold import run_child
from bench.timing import spread

PROMPT = "a laughing face with short blue hair in a red tee on a yellow background"


@click.command()
@click.argument("bundle", type=click.Path(exists=True, path_type=Path))
@click.option("--repeats", type=click.IntRange(1), default=20, show_default=True, help="Runs behind the first one.")
@click.option("--threads", type=click.IntRange(1), help="Of the engines; default cachec's.")
@click.option("--level", help="Default the bundle's first.")
def main(bundle: Path, repeats: int, threads: int | None, level: str | None) -> None:
    """Time ``cachec run BUNDLE`` from process start to a PNG on the disk, in fresh processes one after the other."""
    options = {"--threads": threads, "--level": level}
    given = [str(one) for name, value in options.items() if value is not None for one in (name, value)]
    load, runs = os.getloadavg()[0], []
    with tempfile.TemporaryDirectory() as work:
        for place in range(repeats + 1):
            out = Path(work, f"{place}.png")
            arguments = [str(bundle.resolve()), "-p", PROMPT, "-o", str(out), *given]
            runs.append(run_child({"kind": "command", "arguments": arguments}, Path(work, "caches")))
            if not out.is_file():
                raise RuntimeError(f"the run wrote no {out.name}")
    for mark in runs[0]["seconds"]:
        seconds = spread([run["seconds"][mark] for run in runs[1:]])
        print(f"{mark}: median {seconds['median']:.3f} s ({seconds['low']:.3f}–{seconds['high']:.3f}, quartiles of {repeats}), "
              f"first {runs[0]['seconds'][mark]:.3f} s")  # fmt: skip
    print(f"peak of memory: {max(run['peak_rss'] for run in runs) / 2**20:.0f} MiB; load of the machine before: {load:.2f}")


if __name__ == "__main__":
    main()
