"""Put a trained model or predictor into cachec-models: ``python -m reference.avatars.ship tiny-hunyuan --out build/reference``.

WHAT is a reference model, which is put together from its checkpoint as it is; a directory that ``cachec distill`` made; or a
file of ``cachec train``, which is written in float16 and named by what it is of.
"""

import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import click
import numpy as np

from cachec.compiler.methods.parameters import PRETRAINED, Parameters, load_predictor, predictor_bytes
from reference.avatars.assemble import PIPELINES, assemble

PACKAGE = Path(__file__).parents[1] / "models" / "cachec_models"
MAX_MODEL, MAX_ALL = 25_000_000, 95_000_000  # bytes


def bytes_in(path: Path) -> int:
    """Of a file, or of all files in a folder but Python's."""
    files = [path] if path.is_file() else path.rglob("*")
    return sum(file.stat().st_size for file in files if file.is_file() and file.suffix not in (".py", ".pyc"))


def ship_model(folder: Path, package: Path) -> Path:
    """Copy a pipeline directory. Returns where it is now."""
    for path in sorted(folder.rglob("*.json")):
        if named := [text for text in strings(json.loads(path.read_text())) if text.startswith("/")]:
            raise click.ClickException(f"{path} names a path of this machine: {named[0]}")
    if (size := bytes_in(folder)) > MAX_MODEL:
        raise click.ClickException(f"{folder} has {size / 1e6:.1f} MB, and {MAX_MODEL / 1e6:g} MB are the limit of a model")
    to = package / folder.name
    check_room(package, to, size)
    shutil.rmtree(to, ignore_errors=True)
    shutil.copytree(folder, to)
    return to


def in_float16(file: Path) -> tuple[str, bytes]:
    """A predictor as it ships: name and content of its file."""
    known = load_predictor(file)
    arrays = {name: array.astype(np.float16) if array.dtype == np.float32 else array for name, array in known.arrays.items()}
    if lost := [name for name, array in arrays.items() if not np.isfinite(array).all()]:
        raise click.ClickException(f"{file}: {lost[0]} is beyond float16")
    return predictor_name(known.facts), predictor_bytes(Parameters(arrays, known.facts, known.origin))


def ship_predictor(file: Path, package: Path) -> Path:
    """Write a predictor in float16. Returns where it is now."""
    name, content = in_float16(file)
    to = package / "predictors" / name
    check_room(package, to, len(content))
    to.parent.mkdir(exist_ok=True)
    to.write_bytes(content)
    return to


def predictor_name(facts: Mapping[str, str]) -> str:
    """Method, model, steps, and the interval or how many steps are computed."""
    trained = {name.removeprefix("trained_"): value for name, value in facts.items()}
    which = len(trained["schedule"].split(",")) if facts["interval"] == "none" else facts["interval"]
    return f"{facts['method']}-{facts['model']}-{trained['steps']}-{which}.safetensors"


def check_room(package: Path, to: Path, size: int) -> None:
    """``size`` bytes take the place of ``to``."""
    if (total := bytes_in(package) - (bytes_in(to) if to.exists() else 0) + size) > MAX_ALL:
        raise click.ClickException(f"{package} would have {total / 1e6:.1f} MB, and {MAX_ALL / 1e6:g} MB are its limit")


def strings(found: Any) -> Iterator[str]:
    """All texts in what a JSON file holds."""
    if isinstance(found, dict | list):
        for one in found.values() if isinstance(found, dict) else found:
            yield from strings(one)
    elif isinstance(found, str):
        yield found


@click.command()
@click.argument("what")
@click.option("--out", type=click.Path(path_type=Path), default=Path("build/reference"), show_default=True, help="Checkpoints.")
@click.option("--in-wheel", is_flag=True, help="A predictor goes into cachec itself, which has LESA's of tiny-flux.")
def main(what: str, out: Path, in_wheel: bool) -> None:
    if in_wheel:
        name, content = in_float16(Path(what))
        (PRETRAINED / name).write_bytes(content)
        print(f"{PRETRAINED / name}: {len(content) / 1e6:.2f} MB")
        return
    if what in PIPELINES:
        to = ship_model(assemble(what, out), PACKAGE)
    elif Path(what).is_dir():
        to = ship_model(Path(what), PACKAGE)
    elif Path(what).is_file():
        to = ship_predictor(Path(what), PACKAGE)
    else:
        raise click.ClickException(f"{what} is none of {', '.join(PIPELINES)}, no directory and no file")
    print(f"{to}: {bytes_in(to) / 1e6:.2f} MB; cachec-models has {bytes_in(PACKAGE) / 1e6:.1f} of {MAX_ALL / 1e6:g} MB")


if __name__ == "__main__":
    main()
