"""Does every family's full-size transformer capture, in what time and memory? ``make models-full``: a table in docs/models.md.

From the published configurations that ship, without weights, at each model's default size, in bfloat16: what ``cachec plan``
does. Every model is a process of its own; memory is the peak of its resident set. ``python -m bench.models_full NAME …`` takes
some of them; what the page says of the others stays, with the day that it was measured on.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import click

from bench.memory import peak_rss

HERE = Path(__file__).parent
RECORD, PAGE = HERE / "models-full.json", HERE.parent / "docs" / "models.md"
TITLE = "## Full size, without weights"
WORDS = """
`make models-full` captures every model that has a short name from its published configuration, weightless, at its default size
in bfloat16, splits it and rewrites it into the graphs that engines are built from: what `cachec plan MODEL` does. Each is a
process of its own; seconds are up to the split, and up to the estimate; memory is the peak of the resident set. The machine had
{cores} cores, shared with other work: idle ones are several times faster. The configurations lie in `compiler/models/configs`.
Those of HunyuanVideo, HunyuanVideo-1.5, Wan and FLUX.2-dev are the constructors' defaults of diffusers 0.42.1, which name these
models; klein's and Z-Image's are written after the models' own code. None was compared with the files on the Hub.

| model | parameters | size | latents of a request | graph nodes | captured and split | with all passes | memory | on |
|---|---|---|---|---|---|---|---|---|
"""


def measure(name: str) -> dict[str, Any]:
    """Capture one model in this process."""
    start = time.perf_counter()
    from cachec.compiler.graphs.prepare import engine, linear, prepare
    from cachec.compiler.models import outline_model
    from cachec.compiler.options import make_settings, read_options
    from cachec.compiler.planning.estimate import estimate

    model = outline_model(name)
    settings = make_settings(model.spec, read_options({"dtype": "bfloat16"}, "plan").model)
    plain = linear(prepare(model, settings))
    captured = time.perf_counter() - start
    planned = estimate(plain, engine(plain, model.io), model.spec, settings, budget=1, batch=1)
    return {
        "source": model.spec.source,
        "size": settings.shape_bucket,
        "latents": list(model.example_inputs(settings, batch=1)[model.io.latents].shape[1:]),
        "parameters": planned.total,
        "nodes": sum(planned.nodes.values()),
        "captured_seconds": captured,
        "seconds": time.perf_counter() - start,
        "peak_rss": peak_rss(),
        "date": time.strftime("%F"),
    }


def page(found: Mapping[str, Mapping[str, Any]]) -> str:
    """The section of docs/models.md."""
    return TITLE + "\n" + WORDS.format(cores=os.cpu_count()) + "\n".join(_rows(found)) + "\n"


def _rows(found: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    for name, one in sorted(found.items()):
        shape = "×".join(map(str, one["latents"]))
        yield (
            f"| `{name}` ({one['source']}) | {one['parameters'] / 1e9:.2f} B | {one['size']} | {shape} | {one['nodes']} "
            f"| {one['captured_seconds']:.0f} s | {one['seconds']:.0f} s | {one['peak_rss'] / 1e9:.1f} GB | {one['date']} |"
        )


def with_section(text: str, section: str) -> str:
    """A page with its section of the same title replaced, or with the section at its end."""
    title = section.partition("\n")[0]
    before, found, after = text.partition(f"{title}\n")
    begin = after.find("\n## ")
    rest = "" if not found or begin < 0 else after[begin + 1 :]
    return f"{before.rstrip()}\n\n{section}" + (f"\n{rest}" if rest else "")


def _in_a_child(name: str) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, "-m", "bench.models_full", "--child", name], stdout=subprocess.PIPE, text=True, check=True
    )
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


@click.command()
@click.argument("names", nargs=-1)
@click.option("--child", hidden=True, help="Measure this one in this process.")
def main(names: Sequence[str], child: str | None) -> None:
    """Capture models by short name, by default all; write what came of it to docs/models.md."""
    if child is not None:
        click.echo(json.dumps(measure(child)))
        return
    from cachec.compiler.models.named import MODELS, PUBLISHED

    known = [name for name, spec in MODELS.items() if spec.source in PUBLISHED]
    found = json.loads(RECORD.read_text()) if RECORD.is_file() else {}
    for name in names or known:
        found[name] = _in_a_child(name)
        click.echo(next(_rows({name: found[name]})))
        RECORD.write_text(json.dumps(found, indent=1, sort_keys=True) + "\n")
        PAGE.write_text(with_section(PAGE.read_text(encoding="utf-8"), page(found)), encoding="utf-8")


if __name__ == "__main__":
    main()
