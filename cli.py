"""The command line: parse, call, print. Exit codes come from the errors."""

import json
import logging
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from cachec.runtime.errors import CachecError, InputError

log = logging.getLogger("cachec")


class _Group(click.Group):
    """Prints a ``CachecError`` in one line and exits with its code; ``--debug`` shows the traceback."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except CachecError as error:
            if log.isEnabledFor(logging.DEBUG):
                raise
            click.echo(f"error: {error}", err=True)
            ctx.exit(error.exit_code)
        except KeyboardInterrupt:
            click.echo("interrupted", err=True)
            ctx.exit(130)


def _talk(level: int) -> Callable[[click.Context, click.Parameter, bool], None]:
    def set_level(ctx: click.Context, parameter: click.Parameter, given: bool) -> None:
        if given:
            log.setLevel(min(level, log.level))
            if level == logging.DEBUG:
                logging.getLogger().setLevel(logging.DEBUG)

    return set_level


def _talking(function: Any) -> Any:
    """``-v`` and ``--debug``, on the program and on every command."""
    for names, level, text in (
        (("--debug",), logging.DEBUG, "Show tracebacks and the libraries' own messages."),
        (("-v", "--verbose"), logging.INFO, "Say what is done, stage by stage."),
    ):
        option = click.option(*names, is_flag=True, expose_value=False, callback=_talk(level), help=text)
        function = option(function)
    return function


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="cachec")
@_talking
def main() -> None:
    """Compile a diffusion transformer into a bundle that computes few steps and forecasts the rest."""


def start() -> None:
    """The console script: quiet libraries, one-line messages."""
    logging.basicConfig(format="%(message)s", level=logging.ERROR)
    log.setLevel(os.environ.get("CACHEC_LOG_LEVEL", "WARNING").upper())
    warnings.filterwarnings("ignore")  # those of the libraries; ours are log messages
    for name in ("TRANSFORMERS_VERBOSITY", "DIFFUSERS_VERBOSITY"):
        os.environ.setdefault(name, "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    main()


def _options(*decorators: Callable[[Any], Any]) -> Callable[[Any], Any]:
    def apply(function: Any) -> Any:
        for decorator in reversed(decorators):
            function = decorator(function)
        return function

    return apply


_model_options = _options(
    click.option("--steps", default=50, show_default=True, help="Sampling steps."),
    click.option("--height", type=int, help="Pixels; default from the model."),
    click.option("--width", type=int, help="Pixels; default from the model."),
    click.option("--text-tokens", type=int, help="Length of the text sequence; default from the model."),
    click.option("--guidance", type=float, help="Guidance scale; default from the model."),
    click.option("--prompts", type=click.Path(), help="Training and calibration prompts, one a line; a default list ships."),
    click.option("--seed", default=0, show_default=True),
    click.option("--force", is_flag=True, help="Replace the output if it exists."),
)
_schedule_options = _options(
    click.option("--method", default="lesa", show_default=True, help="Forecasting method: cachec list methods."),
    click.option("--set", "options", multiple=True, metavar="K=V", help="Option of the method, as order=2."),
    click.option("--interval", type=int, help="Compute every N-th step, by the method's published rule."),
    click.option("--budget", type=int, help="Compute K steps: searched for fitted methods, else evenly spread."),
    click.option("--schedule", help="uniform, interval, search, or the steps to compute, as 0,1,2,9,16."),
)


_target_option = click.option(
    "--target",
    "--backend",
    "targets",
    multiple=True,
    default=["ort"],
    show_default=True,
    help="What to build: cachec list backends; bound to a device as ort-cuda. May be given several times.",
)


_build_options = _options(
    click.option("--strip-weights", is_flag=True, help="TensorRT: engines without weights, which the bundle then has once."),
    click.option("--hardware-compatibility", default="none", show_default=True,
                 help="TensorRT: none, same-capability or ampere-plus: also run on other GPUs, slower."),
    click.option("--version-compatible", is_flag=True, help="TensorRT: also run on later minor versions, slower."),
    click.option("--optimization-level", default=3, show_default=True, help="TensorRT: 0 builds fast, 5 searches longest."),
    click.option("--workspace", type=float, help="TensorRT: scratch memory of kernels, in GB; default all that there is."),
    click.option("--max-batch", default=1, show_default=True, help="TensorRT: samples that a call may take."),
)  # fmt: skip
_run_options = _options(
    click.option("--device", help="cpu, cuda, or cuda:1 for the second GPU; default the best that a target fits."),
    click.option("--target", help="Use this target of the bundle only, as tensorrt or ort-cpu; default the best that fits."),
)


@main.command("compile")
@_talking
@click.argument("model")
@click.option("-o", "--out", type=click.Path(path_type=Path), help="Bundle directory [default: MODEL-METHOD.cachec].")
@_schedule_options
@_model_options
@click.option("--levels", help="Several levels in one bundle: lossless,high,balanced,fast, or a PSNR in dB each: fast=30.")
@click.option("--target-psnr", type=float, help="As few computed steps as reach this PSNR in dB against the uncached run.")
@click.option("--target-speedup", type=float, help="As many computed steps as leave the loop this many times as fast.")
@click.option("--min-psnr", type=float, help="Fail if a level is below this PSNR in dB on held-out prompts.")
@click.option("--calibration", type=click.Path(), help="File from cachec calibrate; default: made now.")
@click.option("--reference-steps", type=int, help="Fit to a finer run with so many steps.")
@_target_option
@click.option(
    "--device", help="cpu, cuda or cuda:1: measure there, aoti builds for it; default cpu, or cuda if all targets are."
)
@_build_options
@click.option("--dtype", default="float32", show_default=True, help="float32, float16 or bfloat16.")
@click.option("--batch", type=int, help="Accept batches of this size only; default any.")
@click.option("--predictor", type=click.Path(), help="Trained predictor file, from cachec train.")
@click.option("--fold", default="static", show_default=True, help="static, or none: keep the predictor in the engine.")
@click.option("--hoist", default="all", show_default=True, help="What leaves the steps: none, tables, all.")
@click.option("--slots", help="Store features as float16 or bfloat16: half the memory, some rounding.")
@click.option("--velocities", is_flag=True, help="Forecasts also hand out velocities, for a sampler outside.")
@click.option("--verify-passes", is_flag=True, help="Compare the graphs with eager after each pass.")
@click.option("--dump-graphs", type=click.Path(), metavar="DIR", help="Write the readable graph after each pass.")
def compile_command(model: str, out: Path | None, options: tuple[str, ...], force: bool, **rest: Any) -> None:
    """Compile MODEL: a short name (tiny-flux, flux), a Hub id, or a directory."""
    from cachec.compiler.models import find_model, load_model
    from cachec.compiler.pipeline import compile_bundle
    from cachec.compiler.request import make_request
    from cachec.runtime.inspect import describe_levels
    from cachec.runtime.write import check_output

    spec = find_model(model)
    request = make_request(spec, options=_parse_options(options), **rest)
    out = out or Path(f"{spec.name.replace('/', '--')}-{request.method.name}.cachec")
    check_output(out, force=force)
    bundle, done = compile_bundle(load_model(spec), request, out, force=force)
    size = sum(entry["bytes"] for entry in bundle.manifest.files.values())
    _table(
        [
            ("bundle", str(out)),
            ("method", f"{request.method.name}, trained predictor: {done.predictor_origin}"),
            *describe_levels(bundle),
            *[("target", str(target)) for target in bundle.manifest.targets],
            ("size", f"{size / 1e6:.1f} MB"),
            ("seconds", ", ".join(f"{stage} {seconds:.1f}" for stage, seconds in done.seconds.items())),
        ]
    )


@main.command("add-target")
@_talking
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--target", "names", multiple=True, required=True, help="tensorrt or tensorrt-rtx; may be given several times.")
@click.option("--device", help="cuda, or cuda:1 for the second GPU; default the first.")
@_build_options
@click.option("--force", is_flag=True, help="Replace a target that the bundle has already.")
def add_target_command(bundle: Path, names: tuple[str, ...], **rest: Any) -> None:
    """Build engines into BUNDLE on this machine, from the ONNX files in it. Needs no torch."""
    from cachec.engines.add_target import add_targets

    opened, added = add_targets(bundle, names, **rest)
    sizes = {name: entry["bytes"] for name, entry in opened.manifest.files.items()}
    engines = [(name, artifact.path) for target in added for name, artifact in target.engines.items()]
    _table(
        [
            ("bundle", str(bundle)),
            *[("target", str(target)) for target in added],
            *[(f"  {name}", f"{path}, {sizes[path] / 1e6:.2f} MB") for name, path in engines],
        ]
    )


@main.command("calibrate")
@_talking
@click.argument("model")
@click.option("-o", "--out", type=click.Path(path_type=Path), required=True, help="Calibration file (safetensors).")
@click.option("--num", type=int, default=32, show_default=True, help="How many of the prompts.")
@click.option("--reference-steps", type=int, default=0, show_default=True, help="Also run with so many steps; 0 for not.")
@_model_options
def calibrate_command(model: str, out: Path, num: int, reference_steps: int, force: bool, **rest: Any) -> None:
    """Run MODEL uncached on some prompts and keep what fits and searches need. Interrupted, the same command goes on."""
    from cachec.compiler.commands.calibrate import calibrate_to_file

    _table(calibrate_to_file(model, out, num=num, reference_steps=reference_steps, force=force, **rest))


@main.command("train")
@_talking
@click.argument("model")
@click.option("-o", "--out", type=click.Path(path_type=Path), required=True, help="Predictor file (safetensors).")
@_schedule_options
@_model_options
def train_command(model: str, out: Path, options: tuple[str, ...], force: bool, **rest: Any) -> None:
    """Train a method's predictor for MODEL. Interrupted, the same command goes on where it was."""
    from cachec.compiler.methods.training import train_to_file
    from cachec.compiler.models import find_model, load_model
    from cachec.compiler.request import make_request

    spec = find_model(model)
    request = make_request(spec, options=_parse_options(options), **rest)
    facts = train_to_file(lambda: load_model(spec), request, out, force=force)
    _table([("predictor", str(out)), *((k, v) for k, v in facts.items() if k != "curve" and len(v) < 80)])


@main.command("run")
@_talking
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("-p", "--prompt", "prompts", multiple=True, required=True, help="Prompt; may be given several times.")
@click.option("-o", "--out", type=click.Path(path_type=Path), required=True, help="PNG file.")
@click.option("--level", help="Quality level: cachec inspect lists them; default the bundle's first.")
@click.option("--seed", default=0, show_default=True, help="Noise of the first prompt; the next has the next seed.")
@click.option("--model", "source", help="Directory of the model's text encoders and VAE; default from the bundle.")
@click.option("--compare", is_flag=True, help="Also run every step, and write both side by side.")
@_run_options
@click.option("--threads", type=int, help="CPU threads an engine call may use.")
@click.option("--profile", type=click.Path(path_type=Path), help="Write where the time went: Chrome trace, JSON.")
@click.option("--verify", is_flag=True, help="Hash large files even if this machine has before.")
@click.option("--force", is_flag=True, help="Replace the output if it exists.")
def run_command(bundle: Path, prompts: tuple[str, ...], out: Path, source: str | None, **rest: Any) -> None:
    """Make pictures with BUNDLE. Several prompts make several files, numbered."""
    from cachec.compiler.commands.run import generate_pictures

    rows = generate_pictures(bundle, prompts, out, source=source, **rest)
    _table(rows)


_evaluation_options = _options(
    click.option("--against", default="taylor:1,taylor:2,reuse,plain,unipc", show_default=True, help="What to compare with."),
    click.option("--level", help="Quality level whose number of computed steps they get; default the first."),
    click.option("--prompts", "file", type=click.Path(path_type=Path), help="Prompts, one a line; a held-out list ships."),
    click.option("--seed", default=0, show_default=True, help="Noise of the first prompt; the next has the next seed."),
    click.option("--model", "source", help="Directory of the model; default from the bundle."),
    _run_options,
)


@main.command("eval")
@_talking
@click.argument("bundle", type=click.Path(path_type=Path))
@_evaluation_options
@click.option("--num", default=32, show_default=True, help="How many prompts.")
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="Write the table here, too.")
@click.option("--force", is_flag=True, help="Replace the JSON file if it exists.")
def eval_command(bundle: Path, json_file: Path | None, force: bool, **rest: Any) -> None:
    """Measure every level of BUNDLE beside the uncached run, other methods, and plain solvers.

    --against is a list such as taylor:1,lesa,plain,ab2,unipc. The number behind a method is its order.
    """
    from cachec.compiler.commands.report import evaluate_bundle
    from cachec.compiler.evaluation.words import format_table
    from cachec.runtime.files import check_file, write_file

    if json_file is not None:
        check_file(json_file, force=force)
    evaluation = evaluate_bundle(bundle, **rest)
    click.echo(format_table(evaluation))
    if json_file is not None:
        write_file(json_file, json.dumps(evaluation.to_json(), indent=1).encode())


@main.command("report")
@_talking
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("-o", "--out", type=click.Path(path_type=Path), required=True, help="File: .html, .md or .json.")
@_evaluation_options
@click.option("--num", default=8, show_default=True, help="How many prompts.")
@click.option("--pictures", default=4, show_default=True, help="Show the pictures of the first so many prompts.")
@click.option("--force", is_flag=True, help="Replace the file if it exists.")
def report_command(bundle: Path, out: Path, **rest: Any) -> None:
    """Measure BUNDLE as eval does, and write a page with pictures, plots and settings."""
    from cachec.compiler.commands.report import report_bundle
    from cachec.compiler.evaluation.words import headline

    report = report_bundle(bundle, out, **rest)
    _table([("report", str(out)), ("result", headline(report))])


@main.command("inspect")
@_talking
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print the manifest and the programs as JSON.")
def inspect_command(bundle: Path, as_json: bool) -> None:
    """Check BUNDLE and say what is in it."""
    from cachec.engines.targets import find_fit
    from cachec.runtime.bundle import Bundle
    from cachec.runtime.inspect import describe_bundle

    opened = Bundle.open(bundle, verify=True)
    fits = [find_fit(target).in_words for target in opened.manifest.targets]
    if as_json:
        programs = {level: opened.program(level).to_json() for level in opened.manifest.programs}
        manifest = opened.manifest.to_json()
        click.echo(json.dumps({"manifest": manifest, "programs": programs, "fits": fits}, indent=1))
        return
    _table(describe_bundle(opened, fits))


@main.command("doctor")
@_talking
@click.option("--json", "as_json", is_flag=True, help="Print it as JSON.")
def doctor_command(as_json: bool) -> None:
    """Say what this machine has, and what each back end would need to run and to build here."""
    from cachec.engines.doctor import diagnose

    found = diagnose()
    if as_json:
        click.echo(json.dumps(found.to_json(), indent=1))
        return
    _table(found.rows())


@main.command("list")
@_talking
@click.argument("what", type=click.Choice(["models", "methods", "backends"]))
def list_command(what: str) -> None:
    """List what can be named on the command line."""
    if what == "models":
        from cachec.compiler.models import MODELS

        _table([(name, f"{spec.portable_source}, {spec.width}x{spec.height}") for name, spec in MODELS.items()])
    elif what == "methods":
        from cachec.compiler.methods import METHODS, get_method

        _table([(name, f"{get_method(name).cut} cut: {get_method(name).summary}") for name in METHODS])
    else:
        from cachec.engines import BACKENDS, get_backend

        rows = []
        for name in BACKENDS:
            try:
                rows.append((name, get_backend(name).version()))
            except CachecError as error:
                rows.append((name, f"not available: {error}"))
        _table(rows)


def _parse_options(options: tuple[str, ...]) -> dict[str, str]:
    pairs = [option.partition("=") for option in options]
    for key, equals, value in pairs:
        if not (key and equals and value):
            raise InputError(f"--set {key}{equals}{value} is not of the form name=value")
    return {key: value for key, _, value in pairs}


def _table(rows: list[tuple[str, str]]) -> None:
    width = max(len(name) for name, _ in rows)
    for name, value in rows:
        click.echo(f"{name.ljust(width)}  {value}")


if __name__ == "__main__":
    start()
