"""AOTInductor: one package for all sizes beside one for each: ``python -m bench.aoti_sizes``, the end of bench/SIZES.md.

The compute engine of tiny-flux with one block of each kind, for two sizes. Seconds are of processors, of C++ compilers too, and
nothing compiled is kept from before. Calls are played by turns on one thread; what is given is the ratio of each pair.
"""

import json
import os
import statistics
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import numpy as np

from bench.timing import facts, spread

HERE = Path(__file__).parent
BEGIN = "## AOTInductor: one package for all sizes, or one for each"
SIZES = ((128, 128), (192, 128))  # height, width
ROUNDS = 200


def plan_all() -> tuple[list[Any], Any]:
    """The compute graph of each size, and that of all."""
    from diffusers import FluxPipeline

    from cachec.compiler.frontend import StepGraphs, make_plans
    from cachec.compiler.graphs.prepare import engine, linear, prepare
    from cachec.compiler.graphs.shared import share_plans
    from cachec.compiler.models import MODELS, TINY_FLUX_DIR, wrap_pipeline
    from cachec.compiler.models.base import Settings
    from cachec.runtime.abi import COMPUTE

    pipeline = FluxPipeline.from_pretrained(TINY_FLUX_DIR, local_files_only=True)
    del pipeline.transformer.transformer_blocks[1:], pipeline.transformer.single_transformer_blocks[1:]
    model, spec, alone = wrap_pipeline(pipeline), MODELS["tiny-flux"], []
    settings = Settings(*SIZES[0], spec.text_tokens, spec.guidance, 4, "float32")
    for height, width in SIZES:
        one = replace(settings, height=height, width=width)
        split = linear(prepare(model, one))
        plans = make_plans(model, one, StepGraphs(split, engine(split, model.io)))
        alone.append(next(plan for plan in plans if plan.name == COMPUTE))
    return alone, share_plans([[plan] for plan in alone], compare=True)


def build(plan: Any, folder: Path) -> tuple[Any, dict[str, float]]:
    """An engine of a plan, and what it took."""
    from cachec.compiler.graphs.build_engines import LooseSources
    from cachec.engines.aoti import BUILDER, AotiEngine
    from cachec.runtime.engine import LoadOptions

    folder.mkdir()
    os.environ |= {"TORCHINDUCTOR_CACHE_DIR": str(folder / "cache"), "TORCHINDUCTOR_COMPILE_THREADS": "1"}
    before = os.times()
    files = BUILDER.build(LooseSources([plan], folder), folder)
    cost = {"seconds": sum(os.times()[:4]) - sum(before[:4]), "bytes": files[plan.name].stat().st_size}
    return AotiEngine.load(files, {plan.name: plan.signature}, LoadOptions(threads=1))[plan.name], cost


def buffers(signature: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """Random inputs of one sample, and places for what comes out."""
    random, sizes = np.random.default_rng(0), {"batch": 1}
    given = {spec.name: random.standard_normal(spec.resolve(sizes)).astype(spec.dtype) for spec in signature.inputs}
    return given, {spec.name: np.empty(spec.resolve(sizes), spec.dtype) for spec in signature.outputs}


def play(one: Any, alone: Any, tables: dict[str, Any], rounds: int) -> dict[str, Any]:
    """Calls of the engine for all sizes, which takes ``tables`` besides, and of that for one, by turns."""
    contexts, (given, own), (_, other) = (one.context(), alone.context()), buffers(alone.signature), buffers(alone.signature)
    seconds: list[list[float]] = [[], []]
    for number in range(-5, rounds):
        for place in (0, 1) if number % 2 else (1, 0):
            start = time.process_time()
            contexts[place].run((given | tables, given)[place], (other, own)[place])
            seconds[place].append(time.process_time() - start)
    apart = max(float(np.abs(own[name] - other[name]).max() / np.abs(own[name]).max()) for name in own)
    pairs = list(zip(*seconds, strict=True))[5:]
    return {
        "seconds": statistics.median(b for _, b in pairs), "ratio": spread([a / b for a, b in pairs]), "apart": apart
    }  # fmt: skip


def section(found: dict[str, Any], where: dict[str, Any]) -> str:
    """The end of the page."""
    one, each = found["one"], found["each"]
    total = {key: sum(cost[key] for cost in each) for key in one}
    lines = [
        BEGIN,
        "",
        "`python -m bench.aoti_sizes`: the compute engine of tiny-flux with one block of each kind, float32, one thread;",
        f"processor time, medians and quartiles of {found['rounds']} pairs by turns ({where['cpu']}, {where['date']};",
        "other work ran on the machine). The package for all is compiled first, and pays for what PyTorch imports.",
        "",
        "| packages | compiling | bytes |",
        "| --- | --- | --- |",
        f"| one for {len(each)} sizes | {one['seconds']:.0f} s | {one['bytes'] / 1e6:.1f} MB |",
        f"| one for each | {total['seconds']:.0f} s | {total['bytes'] / 1e6:.1f} MB |",
        "",
        "| size | a call, package of its own | one for all, ratio | outputs apart |",
        "| --- | --- | --- | --- |",
    ]
    for size, row in found["sizes"].items():
        ratio = "{median:.3f} ({low:.3f} to {high:.3f})".format(**row["ratio"])
        lines.append(f"| {size} | {1e3 * row['seconds']:.2f} ms | {ratio} | {row['apart']:.0e} |")
    return "\n".join([*lines, ""])


@click.command()
@click.option("--rounds", default=ROUNDS)
@click.option("--out", type=click.Path(path_type=Path), default=HERE / "aoti-sizes.json")
def main(rounds: int, out: Path) -> None:
    """Build three packages, and measure."""
    import torch

    torch.set_num_threads(1)
    plans, shared = plan_all()
    with tempfile.TemporaryDirectory(prefix="cachec-aoti-") as name:
        folder = Path(name)
        engine, cost = build(shared.plans[0], folder / "one")
        found: dict[str, Any] = {"rounds": rounds, "one": cost, "each": [], "sizes": {}}
        for place, ((height, width), plan) in enumerate(zip(SIZES, plans, strict=True)):
            alone, cost = build(plan, folder / str(place))
            found["each"].append(cost)
            tables = {key: value.numpy() for key, value in shared.tables[place].items()}
            there = engine.at(engine.signature.at(shared.axes[place]), tables)
            found["sizes"][f"{width}x{height}"] = play(there, alone, tables, rounds)
            print(json.dumps(found), flush=True)
    where, page = facts(), out.with_name("SIZES.md")
    out.write_text(json.dumps({"where": where, **found}, indent=1) + "\n")
    before = page.read_text(encoding="utf-8").partition(BEGIN)[0].rstrip() if page.exists() else ""
    page.write_text(f"{before}\n\n{section(found, where)}", encoding="utf-8")


if __name__ == "__main__":
    main()
