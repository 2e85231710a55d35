"""What engines for one size gain over one set for all: ``make static``, static.json and the end of bench/SIZES.md.

Both bundles of a model hold the same sizes. Compiling and loading are processes of their own, with their processor time (that
of C++ compilers included, and nothing kept from before) and the peak of their resident set. Requests are played by turns, one
of each bundle, on one thread; what is given is processor time, and the ratio of each pair.

    python -m bench.static [--of MODEL TARGET] …      measures these alone, and leaves the other rows as they are
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import click
import numpy as np

from bench.cases import TINY, open_case
from bench.memory import peak_rss
from bench.timing import facts, spread

HERE = Path(__file__).parent
BEGIN = "## One set of engines, or one for each size"
SIZES = {
    (TINY, "ort"): ("64x64", "64x48", "96x64"),
    (TINY, "aoti"): ("64x64", "96x64"),  # compiling takes minutes a size
    ("flux-shaped", "ort"): ("128x128", "192x128", "192x192"),
}
STEPS = 4
KINDS = ("one set", "one for each size")
TARGETS = {"ort": "ONNX Runtime", "aoti": "AOTInductor"}


def compile_one(name: str, target: str, kind: str, out: Path, *, quick: bool) -> dict[str, float]:
    """This process: a bundle of a kind, and the seconds that it and its children were at work."""
    from cachec.compiler.pipeline import compile_bundle
    from cachec.compiler.request import make_request

    case = open_case(name, out.parent, quick=quick)
    request = make_request(
        case.model.spec,
        method="reuse",
        budget=3,
        steps=STEPS,
        size=",".join(SIZES[name, target]),
        static=kind != KINDS[0],
        targets=(target,),
        components="transformer" if target == "aoti" else None,
    )
    before = os.times()
    compile_bundle(case.model, request, out, force=True)
    return {"compile_seconds": sum(os.times()[:4]) - sum(before[:4])}


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


def ask_child(cache: Path, *arguments: str) -> dict[str, float]:
    """What a process of its own says at last; compiled code is kept in ``cache`` alone."""
    command = [sys.executable, "-m", "bench.static", *arguments]
    said = subprocess.check_output(command, text=True, env={**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(cache)})
    found: dict[str, float] = json.loads(said.splitlines()[-1])
    return found


def measure(name: str, target: str, work: Path, *, quick: bool) -> dict[str, Any]:
    """All of a model on a target."""
    bundles, small = {kind: work / f"{name} {target} {kind}.cachec" for kind in KINDS}, ["--quick"] * quick
    found: dict[str, Any] = {"sizes": SIZES[name, target], "kinds": {}}
    for kind, path in bundles.items():
        cache = work / f"cache-{KINDS.index(kind)}"  # g++ is handed paths in it as they are
        compiled = ask_child(cache, "--compile", name, target, kind, str(path), *small)
        files = [file for file in path.rglob("*") if file.is_file()]
        loads = [ask_child(cache, "--load", str(path)) for _ in range(1 if quick else 3)]
        found["kinds"][kind] = {
            **compiled,
            "files": len([file for file in files if file.suffix in (".onnx", ".pt2")]),
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
        f"`make static`: float32, one thread; processor time, medians ({where['cpu']}, {where['cores']} cores,",
        f"{where['date']}, other work on the machine). *Compiling*: the whole command, C++ compilers included; on AOTInductor",
        "of the transformer alone. *Loading*: all sizes, in a process of its own. *A step*: of an uncached request with",
        "engines of the size alone, and the one set's time over it: median and quartiles of pairs played by turns.",
        "",
        "| model | engines | compiling | ONNX files or packages | bundle | loading | memory |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, row in rows.items():
        for kind, one in row["kinds"].items():
            sizes = f"{one['bytes'] / 1e6:.1f} MB | {one['load_seconds']:.2f} s | {one['load_bytes'] / 1e6:.0f} MB"
            compiling = f"{one['compile_seconds']:.0f} s" if "compile_seconds" in one else "–"
            lines.append(f"| {name}, {len(row['sizes'])} sizes | {kind} | {compiling} | {one['files']} | {sizes} |")
    lines += ["", "| model | size | a step | one set, ratio | latents apart |", "| --- | --- | --- | --- | --- |"]
    for name, row in rows.items():
        for size, one in row["requests"].items():
            ratio = "{median:.3f} ({low:.3f} to {high:.3f})".format(**one["ratio"])
            lines.append(f"| {name} | {size} | {1e3 * one['seconds']:.1f} ms | {ratio} | {one['apart']:.0e} |")
    return "\n".join([*lines, ""])


@click.command()
@click.option("--load", type=click.Path(path_type=Path), help="Only load this bundle, and say what it took.")
@click.option("--compile", "wanted", nargs=4, help="Only compile MODEL for TARGET, KIND of engines, to BUNDLE.")
@click.option("--of", "chosen", nargs=2, multiple=True, help="MODEL TARGET")
@click.option("--quick", is_flag=True)
@click.option("--out", type=click.Path(path_type=Path), default=HERE / "static.json")
def main(
    load: Path | None, wanted: tuple[str, str, str, str] | None, chosen: tuple[tuple[str, str], ...], quick: bool, out: Path
) -> None:
    """Compile tiny-flux and the FLUX-shaped model both ways, and measure."""
    if load is not None:
        print(json.dumps(load_all(load)))
        return
    if wanted is not None:
        *what, bundle = wanted
        print(json.dumps(compile_one(*what, Path(bundle), quick=quick)))
        return
    rows = json.loads(out.read_text())["models"] if chosen else {}
    for name, target in chosen or SIZES:
        with tempfile.TemporaryDirectory(prefix="cachec-static-") as folder:
            rows[f"{name}, {TARGETS[target]}"] = measure(name, target, Path(folder), quick=quick)
    where, page = facts(), out.with_name("SIZES.md")
    out.write_text(json.dumps({"where": where, "models": rows}, indent=1) + "\n")
    before = page.read_text(encoding="utf-8").partition(BEGIN)[0].rstrip() if page.exists() else ""
    page.write_text(f"{before}\n\n{section(rows, where)}", encoding="utf-8")


if __name__ == "__main__":
    main()
