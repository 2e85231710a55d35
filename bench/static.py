"""What engines for one size gain over one set for all: ``make static``, static.json and a part of bench/SIZES.md.

Both bundles of a model hold the same sizes. Loading is a process of its own, with its processor time and the peak of its
resident set. Requests are played by turns, one of each bundle, on one thread; what is given is processor time, and the ratio
of each pair.
"""

import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import click
import numpy as np

from bench.aoti_sizes import BEGIN as AOTI
from bench.cases import CASES, TINY, open_case
from bench.memory import peak_rss
from bench.timing import facts, spread

HERE = Path(__file__).parent
BEGIN = "## One set of engines, or one for each size"
SIZES = {TINY: ("128x128", "128x96", "192x128"), "flux-shaped": ("128x128", "192x128", "192x192")}
STEPS = 4
KINDS = ("one set", "one for each size")


def compile_both(name: str, work: Path, *, quick: bool) -> dict[str, Path]:
    """A bundle of each kind."""
    from cachec.compiler.pipeline import compile_bundle
    from cachec.compiler.request import make_request

    case, bundles = open_case(name, work, quick=quick), {}
    for kind in KINDS:
        request = make_request(
            case.model.spec, method="reuse", budget=3, steps=STEPS, size=",".join(SIZES[name]), static=kind != KINDS[0]
        )
        bundles[kind] = work / f"{name} {kind}.cachec"
        compile_bundle(case.model, request, bundles[kind], force=True)
    return bundles


def load_all(bundle: Path) -> dict[str, float]:
    """This process: what it takes to load all sizes."""
    import cachec

    before, start = peak_rss(), time.process_time()
    with cachec.load(bundle, threads=1) as loaded:
        for size in loaded.bundle.manifest.sizes if loaded.bundle is not None else ():
            loaded.at(size)
        return {"seconds": time.process_time() - start, "bytes": peak_rss() - before}


def play_pairs(bundles: dict[str, Path], rounds: int) -> dict[str, Any]:
    """Uncached requests of one sample at every size, by turns."""
    import cachec

    rows = {}
    with cachec.load(bundles[KINDS[0]], threads=1) as one, cachec.load(bundles[KINDS[1]], threads=1) as each:
        for size in one.bundle.manifest.sizes if one.bundle is not None else ():
            sessions = [loaded.session(level="uncached", size=size) for loaded in (one, each)]
            random, signature = np.random.default_rng(0), each.at(size).target.engines
            specs = {spec.name: spec for artifact in signature.values() for spec in artifact.signature.inputs}
            shapes = {name: specs[name].resolve({"batch": 1}) for name in sessions[0].conditions}
            given = {name: random.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
            noise = random.standard_normal(sessions[0].latent_shape).astype(np.float32)
            latents = [session.run(given, noise) for session in sessions]
            seconds: list[list[float]] = [[], []]
            for number in range(rounds):
                for place in (0, 1) if number % 2 else (1, 0):
                    start = time.process_time()
                    sessions[place].run(given, noise)
                    seconds[place].append(time.process_time() - start)
            rows[size] = {
                "seconds": statistics.median(seconds[1]) / STEPS,
                "ratio": spread([a / b for a, b in zip(*seconds, strict=True)]),
                "apart": float(np.abs(latents[0] - latents[1]).max() / np.abs(latents[1]).max()),
            }
    return rows


def measure(name: str, work: Path, *, quick: bool) -> dict[str, Any]:
    """All of a model."""
    bundles = compile_both(name, work, quick=quick)
    found: dict[str, Any] = {"sizes": SIZES[name], "kinds": {}}
    for kind, path in bundles.items():
        files = [file for file in path.rglob("*") if file.is_file()]
        command = [sys.executable, "-m", "bench.static", "--load", str(path)]
        loads = [json.loads(subprocess.check_output(command, text=True).splitlines()[-1]) for _ in range(1 if quick else 5)]
        found["kinds"][kind] = {
            "onnx_files": len([file for file in files if file.suffix == ".onnx"]),
            "bytes": sum(file.stat().st_size for file in files),
            **{f"load_{what}": statistics.median(load[what] for load in loads) for what in loads[0]},
        }
    found["requests"] = play_pairs(bundles, 3 if quick else 25 if name == TINY else 5)
    return found


def section(rows: dict[str, Any], where: dict[str, Any]) -> str:
    """The end of the page."""
    lines = [
        BEGIN,
        "",
        f"`make static`: float32, ONNX Runtime, one thread; processor time, medians ({where['cpu']}, {where['cores']} cores,",
        f"{where['date']}). *Loading*: all sizes, in a process of its own. *A step*: of an uncached request with engines of",
        "the size alone, and the one set's time over it: median and quartiles of pairs played by turns.",
        "",
        "| model | engines | ONNX files | bundle | loading | memory |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for name, row in rows.items():
        for kind, one in row["kinds"].items():
            sizes = f"{one['bytes'] / 1e6:.1f} MB | {one['load_seconds']:.2f} s | {one['load_bytes'] / 1e6:.0f} MB"
            lines.append(f"| {name}, {len(row['sizes'])} sizes | {kind} | {one['onnx_files']} | {sizes} |")
    lines += ["", "| model | size | a step | one set, ratio | latents apart |", "| --- | --- | --- | --- | --- |"]
    for name, row in rows.items():
        for size, one in row["requests"].items():
            ratio = "{median:.3f} ({low:.3f} to {high:.3f})".format(**one["ratio"])
            lines.append(f"| {name} | {size} | {1e3 * one['seconds']:.1f} ms | {ratio} | {one['apart']:.0e} |")
    return "\n".join([*lines, ""])


@click.command()
@click.option("--load", type=click.Path(path_type=Path), help="Only load this bundle, and say what it took.")
@click.option("--quick", is_flag=True)
@click.option("--out", type=click.Path(path_type=Path), default=HERE / "static.json")
def main(load: Path | None, quick: bool, out: Path) -> None:
    """Compile tiny-flux and the FLUX-shaped model both ways, and measure."""
    if load is not None:
        print(json.dumps(load_all(load)))
        return
    with tempfile.TemporaryDirectory(prefix="cachec-static-") as folder:
        rows = {name: measure(name, Path(folder), quick=quick) for name in CASES}
    where, page = facts(), out.with_name("SIZES.md")
    out.write_text(json.dumps({"where": where, "models": rows}, indent=1) + "\n")
    text = page.read_text(encoding="utf-8") if page.exists() else ""
    before, behind = text.partition(BEGIN)[0].rstrip(), "".join(text.partition(AOTI)[1:])
    page.write_text(f"{before}\n\n{section(rows, where)}\n{behind}", encoding="utf-8")


if __name__ == "__main__":
    main()
