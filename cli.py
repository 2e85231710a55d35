"""The command line: parse, call, print. Exit codes come from the errors."""

import json
import signal
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from cachec.compiler.commands.flags import declared_flags, parse_pairs, several
from cachec.compiler.commands.groups import Group
from cachec.compiler.commands.messages import set_up_messages, talking
from cachec.compiler.options import BuildWish, Command, make_build_options
from cachec.runtime.errors import need
from cachec.runtime.version import VERSION
from cachec.serving.flags import serve_flags

MEASURING = ("torch", "diffusers", "transformers", "skimage", "matplotlib")  # what eval and report need


@click.group(cls=Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(VERSION)
@talking
def main() -> None:
    """Compile a diffusion transformer into a bundle that computes few steps and forecasts the rest."""


def _said(given: Mapping[str, Any]) -> dict[str, Any]:
    """What was given, and not left at its default."""
    context = click.get_current_context()
    return {name: value for name, value in given.items() if context.get_parameter_source(name) != ParameterSource.DEFAULT}


def start() -> None:
    """The console script: one-line messages, without what libraries are known to say for nothing; SIGTERM is as Ctrl-C."""
    set_up_messages()
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    main()


_force = click.option("--force", is_flag=True, help="Replace the output if it exists.")


def _from_model(name: Command, made: str) -> Callable[[Any], Any]:
    """A command that makes something of MODEL, with the flags that are declared for it."""
    out = click.option("-o", "--out", type=click.Path(path_type=Path), required=True, help=made)
    return several(main.command(name), talking, click.argument("model"), out, declared_flags(name), _force)


_num = click.option("--num", type=int, default=32, show_default=True, help="How many of the prompts.")
_run_options = several(
    click.option("--size", metavar="WxH[xF]", help="One that BUNDLE was compiled for, as 832x1216; default its first."),
    click.option("--weights", help="Some that add-weights added to BUNDLE; default its own."),
    click.option("--steps", type=int, help="One number of steps that BUNDLE was compiled for; default its first."),
    click.option("--device", help="cpu, cuda, or cuda:1 for the second GPU; default the best that a target fits."),
    click.option("--target", help="Use this target of the bundle only, as tensorrt or ort-cpu; default the best that fits."),
)


@main.command("compile")
@talking
@click.argument("model")
@click.option("-o", "--out", type=click.Path(path_type=Path), help="Bundle directory [default: MODEL-METHOD.cachec].")
@declared_flags("compile")
@_force
def compile_command(model: str, out: Path | None, force: bool, **given: Any) -> None:
    """Compile MODEL: a short name (tiny-flux, flux), a Hub id, or a directory."""
    from cachec.compiler.commands.compile import compile_to_bundle
    from cachec.runtime.inspect import describe_all_levels, describe_choice

    out, done = compile_to_bundle(model, out, force=force, **given)
    bundle = done.bundle
    size = sum(entry["bytes"] for entry in bundle.manifest.files.values())
    _table(
        [
            ("bundle", str(out)),
            ("method", f"{bundle.manifest.method['name']}, trained predictor: {done.predictor_origin}"),
            *describe_all_levels(bundle),
            *[("target", str(target)) for target in bundle.manifest.targets],
            *describe_choice(bundle),
            ("size", f"{size / 1e6:.1f} MB"),
            ("seconds", ", ".join(f"{stage} {seconds:.1f}" for stage, seconds in done.seconds.items())),
        ]
    )


@main.command("add-target")
@talking
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--target", "names", multiple=True, required=True, help="tensorrt, tensorrt-rtx, several; or auto.")
@click.option("--device", help="cuda, or cuda:1 for the second GPU; default the first.")
@declared_flags("add-target")
@click.option("--force", is_flag=True, help="Replace a target that the bundle has already.")
def add_target_command(bundle: Path, names: tuple[str, ...], device: str | None, force: bool, **given: Any) -> None:
    """Build engines into BUNDLE on this machine, from the ONNX files in it. Needs no torch."""
    from cachec.engines.add_target import add_targets
    from cachec.engines.fastest import AUTO
    from cachec.runtime.inspect import describe_choice

    wish = BuildWish(**given)
    options = make_build_options(wish)
    opened, added = add_targets(bundle, names, device=device, max_batch=wish.max_batch, force=force, options=options)
    sizes = {name: entry["bytes"] for name, entry in opened.manifest.files.items()}
    engines = [(name, artifact.path) for target in added for name, artifact in target.engines.items()]
    _table(
        [
            ("bundle", str(bundle)),
            *[("target", str(target)) for target in added],
            *[(f"  {name}", f"{path}, {sizes[path] / 1e6:.2f} MB") for name, path in engines],
            *(describe_choice(opened) if AUTO in names else []),
        ]
    )


@main.command("add-level")
@talking
@click.argument("bundle", type=click.Path(path_type=Path))
@click.argument("stats", type=click.Path(path_type=Path))
@click.option("--conditions", type=click.Path(path_type=Path), help="Encoded prompts of STATS: then no torch is needed.")
@click.option("--budget", type=int, help="Compute K steps, which are searched.")
@click.option("--target-psnr", type=float, help="As few computed steps as reach this PSNR in dB; not with --conditions.")
@click.option("--method", help="Method of the bundle's cut; default gram or gram-hidden.")
@click.option("--set", "options", multiple=True, callback=parse_pairs, metavar="K=V", help="Option of the method.")
@click.option("--name", help="What the level is called; default budget-K or psnr-D.")
@click.option("--seed", default=0, show_default=True, help="Of the search.")
@click.option("--device", help="cpu, cuda, or cuda:1 for the second GPU; default the best that a target fits.")
@click.option("--force", is_flag=True, help="Replace a level of this name.")
def add_level_command(bundle: Path, stats: Path, **given: Any) -> None:
    """Search, fit and measure another level for BUNDLE, from the calibration file STATS, on the bundle's own engines."""
    from cachec.compiler.commands.add_level import add_level

    _table(add_level(bundle, stats, **given))


@main.command("add-weights")
@talking
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--lora", "loras", multiple=True, required=True, metavar="FILE[:SCALE]", help="May be given several times.")
@click.option("--name", help="What they are called; default made of the files' names.")
@click.option("--model", "source", help="The model that BUNDLE was compiled from; default as the bundle names it.")
@click.option("--force", is_flag=True, help="Replace weights of this name.")
def add_weights_command(bundle: Path, loras: tuple[str, ...], **rest: Any) -> None:
    """Add weights with LoRAs fused to BUNDLE, over its graphs, for run --weights NAME. Only changed tensors are written."""
    from cachec.compiler.commands.add_weights import add_weights

    _table(add_weights(bundle, loras, **rest))


@_from_model("encode", "Conditions file (safetensors).")
@_num
def encode_command(model: str, out: Path, num: int, force: bool, **given: Any) -> None:
    """Encode prompts by MODEL's text encoders, for cachec calibrate on a machine that has a bundle only."""
    from cachec.compiler.commands.encode import encode_to_file

    _table(encode_to_file(model, out, num=num, force=force, **given))


@main.command("plan", context_settings={"default_map": {"dtype": "bfloat16"}})
@talking
@click.argument("model")
@declared_flags("plan")
@click.option("--gpu", help="Say what this one allows, as H100; default all that are known.")
@click.option("--json", "as_json", is_flag=True, help="Print it as JSON: bytes, FLOPs, seconds.")
def plan_command(model: str, gpu: str | None, as_json: bool, **given: Any) -> None:
    """Say what MODEL takes to compile, calibrate and run, and what can be won. Needs its configuration only."""
    from cachec.compiler.commands.plan import plan_model

    found, gpus = plan_model(model, gpu=gpu, **given)
    from cachec.compiler.planning.estimate_words import describe_estimate  # which needs PyTorch: it was asked for

    if as_json:
        click.echo(json.dumps(found.to_json(gpus), indent=1))
        return
    _table(describe_estimate(found, gpus))


@main.command("calibrate")
@talking
@click.argument("source", metavar="MODEL|BUNDLE")
@click.option("-o", "--out", type=click.Path(path_type=Path), required=True, help="Calibration file (safetensors).")
@click.option("--conditions", type=click.Path(path_type=Path), help="Encoded prompts for a bundle, from cachec encode.")
@_num
@declared_flags("calibrate")
@_force
def calibrate_command(source: str, out: Path, **given: Any) -> None:
    """Run a model uncached on some prompts and keep what fits and searches need. Interrupted, the same command goes on.

    A bundle is run on its own engines, without torch, on the prompts of --conditions.
    """
    from cachec.compiler.commands.calibrate import calibrate_to_file

    _table(calibrate_to_file(source, out, **_said(given)))


@_from_model("train", "Predictor file (safetensors).")
def train_command(model: str, out: Path, force: bool, **given: Any) -> None:
    """Train a method's predictor for MODEL. Interrupted, the same command goes on where it was."""
    from cachec.compiler.commands.train import train_to_file

    _table(train_to_file(model, out, force=force, **given))


@_from_model("distill", "Directory of the distilled pipeline.")
def distill_command(model: str, out: Path, force: bool, **given: Any) -> None:
    """Distil MODEL into one of few steps without guidance, by Restricted MeanFlow. Interrupted, it goes on where it was."""
    from cachec.compiler.commands.distill import distill_to_directory

    _table(distill_to_directory(model, out, force=force, **given))


@main.command("import")
@talking
@click.argument("method")
@click.argument("files", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("-o", "--out", type=click.Path(path_type=Path), required=True, help="Predictor file (safetensors).")
@click.option("--set", "options", multiple=True, callback=parse_pairs, metavar="K=V", help="What the files do not say.")
@click.option("--license", "license_text", help="Under which licence they are, where that is not known.")
@_force
def import_command(method: str, files: tuple[Path, ...], out: Path, **given: Any) -> None:
    """Read weights of METHOD that its authors released in FILES, for compile --predictor. Pickled files are refused."""
    from cachec.compiler.commands.import_released import import_to_file

    _table(import_to_file(method, files, out, **given))


@main.command("run")
@talking
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("-p", "--prompt", "prompts", multiple=True, required=True, help="Prompt; may be given several times.")
@click.option("-o", "--out", type=click.Path(path_type=Path), required=True, help="PNG; of a video MP4, or an animated PNG.")
@click.option("--level", help="Quality level: cachec inspect lists them; default the bundle's first.")
@click.option("--negative-prompt", "negative", help="What guidance leads away from; default no text.")
@click.option("--guidance", type=float, help="Guidance scale; default the bundle's.")
@click.option("--true-cfg-scale", type=float, help="That of two branches beside an embedded one; default the bundle's.")
@click.option("--picture", type=click.Path(path_type=Path), help="Picture to begin with, of a size that BUNDLE has.")
@click.option("--strength", type=float, help="How far PICTURE is changed, above 0 to 1; default 0.6.")
@click.option("--seed", default=0, show_default=True, help="Noise of the first prompt; the next has the next seed.")
@click.option("--model", "source", help="Directory of the model's text encoders and VAE; default from the bundle.")
@click.option("--compare", is_flag=True, help="Also run every step, and write both side by side.")
@click.option("--beside", multiple=True, type=click.Path(path_type=Path), help="With --compare, other bundles in the sheet.")
@_run_options
@click.option("--sigmas", metavar="S,S,…", help="Noise levels, as the pipeline's call takes them; in place of --steps.")
@click.option("--threads", type=int, help="CPU threads an engine call may use.")
@click.option("--profile", type=click.Path(path_type=Path), help="Write where the time went: Chrome trace, JSON.")
@click.option("--verify", is_flag=True, help="Hash large files even if this machine has before.")
@click.option("--force", is_flag=True, help="Replace the output if it exists.")
def run_command(bundle: Path, prompts: tuple[str, ...], out: Path, source: str | None, **rest: Any) -> None:
    """Make pictures with BUNDLE. Several prompts make several files, numbered."""
    from cachec.compiler.commands.run import generate_pictures

    _table(generate_pictures(bundle, prompts, out, source=source, **rest))


@main.command("pull")
@talking
@click.argument("name", metavar="OWNER/NAME[@REVISION]")
@click.option("-o", "--out", type=click.Path(path_type=Path), help="Directory; default the Hub's own cache.")
def pull_command(name: str, out: Path | None) -> None:
    """Fetch a bundle from the Hugging Face Hub. cachec run takes such a name, too."""
    from cachec.engines.places import pull

    _table([("bundle", str(pull(name, out)))])


@main.command("push")
@talking
@click.argument("bundle", type=click.Path(path_type=Path))
@click.argument("name", metavar="OWNER/NAME")
@click.option("--private", is_flag=True, help="Nobody else sees it, if it is new.")
def push_command(bundle: Path, name: str, private: bool) -> None:
    """Put BUNDLE on the Hugging Face Hub, in one commit. The token is huggingface_hub's: hf auth login."""
    from cachec.engines.places import push

    _table([("bundle", push(bundle, name, private=private))])


@main.command("pack")
@talking
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("-o", "--out", type=click.Path(path_type=Path), required=True, help="Tar file.")
@_force
def pack_command(bundle: Path, out: Path, force: bool) -> None:
    """Write BUNDLE as a tar in the OCI image layout, for registries (oras cp --from-oci-layout). cachec run takes it, too."""
    from cachec.engines.places import pack

    pack(bundle, out, force=force)
    _table([("bundle", str(out)), ("size", f"{out.stat().st_size / 1e6:.1f} MB")])


_evaluation_options = several(
    click.option(
        "--against", default="taylor:1,taylor:2,reuse,plain,unipc", show_default=True, help="Methods, with orders; solvers."
    ),
    click.option("--level", help="Quality level whose number of computed steps they get; default the first."),
    click.option("--prompts", "file", type=click.Path(path_type=Path), help="Prompts, one a line; a held-out list ships."),
    click.option("--seed", default=0, show_default=True, help="Noise of the first prompt; the next has the next seed."),
    click.option("--model", "source", help="Directory of the model; default from the bundle."),
    click.option("--lora", "loras", multiple=True, metavar="FILE[:SCALE]", help="What is fused in what is measured."),
    _run_options,
)


@main.command("eval")
@talking
@click.argument("bundle", type=click.Path(path_type=Path))
@_evaluation_options
@declared_flags("eval")
@click.option("--num", default=32, show_default=True, help="How many prompts.")
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="Write it here, too; interrupted, it goes on.")
@click.option("--force", is_flag=True, help="Replace the JSON file if it exists.")
def eval_command(bundle: Path, json_file: Path | None, force: bool, **rest: Any) -> None:
    """Measure every level of BUNDLE beside the uncached run, other methods, and plain solvers."""
    need(*MEASURING, extra="compile", purpose="measuring a bundle")
    from cachec.compiler.commands.report import evaluate_to_file
    from cachec.compiler.evaluation.words import format_table

    click.echo(format_table(evaluate_to_file(bundle, json_file, force=force, **rest)))


@main.command("report")
@talking
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("-o", "--out", type=click.Path(path_type=Path), required=True, help="File: .html, .md or .json.")
@_evaluation_options
@click.option("--num", default=8, show_default=True, help="How many prompts.")
@click.option("--pictures", default=4, show_default=True, help="Show the pictures of the first so many prompts.")
@click.option("--force", is_flag=True, help="Replace the file if it exists.")
def report_command(bundle: Path, out: Path, **rest: Any) -> None:
    """Measure BUNDLE as eval does, and write a page with pictures, plots and settings."""
    need(*MEASURING, extra="compile", purpose="measuring a bundle")
    from cachec.compiler.commands.report import report_bundle
    from cachec.compiler.evaluation.words import headline

    _table([("report", str(out)), ("result", headline(report_bundle(bundle, out, **rest)))])


@main.command("serve")
@talking
@click.argument("bundles", nargs=-1, type=click.Path(path_type=Path))
@serve_flags
def serve_command(bundles: tuple[Path, ...], **given: Any) -> None:
    """Serve BUNDLES, or NAME=BUNDLE, over HTTP, as OpenAI's images and videos API: docs/serving.md."""
    from cachec.serving.command import serve_bundles

    serve_bundles(bundles, told=click.echo, **given)


@main.command("inspect")
@talking
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print the manifest and the programs as JSON.")
def inspect_command(bundle: Path, as_json: bool) -> None:
    """Check BUNDLE and say what is in it."""
    from cachec.engines.targets import find_fit
    from cachec.runtime.bundle import Bundle
    from cachec.runtime.inspect import describe_bundle

    opened = Bundle.open(bundle, verify=True)
    fits = [fit.in_words + fit.batches_in_words for fit in map(find_fit, opened.manifest.targets)]
    if as_json:
        programs = {level: opened.program(level).to_json() for level in opened.manifest.programs}
        click.echo(json.dumps({"manifest": opened.manifest.to_json(), "programs": programs, "fits": fits}, indent=1))
        return
    _table(describe_bundle(opened, fits))


@main.command("doctor")
@talking
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
@talking
@click.argument("what", type=click.Choice(["models", "methods", "schedules", "backends"]))
def list_command(what: str) -> None:
    """List what can be named on the command line."""
    from cachec.compiler.commands.listing import list_names

    _table(list_names(what))


def _table(rows: list[tuple[str, str]]) -> None:
    width = max(len(name) for name, _ in rows)
    for name, value in rows:
        click.echo(f"{name.ljust(width)}  {value}")


if __name__ == "__main__":
    start()
