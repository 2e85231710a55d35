"""Bundles damaged anyhow, and what opening and running them does. Each case is made from its number alone."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file

import cachec
from cachec.runtime import checked_files
from cachec.runtime.bundle import MANIFEST, Bundle, _digest
from cachec.runtime.errors import CachecError
from cachec.runtime.files import hash_file
from tests.damage import change

LONGEST = 600  # characters of a message that a person reads
REFUSED, SAME, ANOTHER, FAILED = (
    "refused",
    "opens, nothing of the run changed",
    "runs as it says",
    "opens, refused when it is run",
)
RIGHT = (REFUSED, SAME, ANOTHER, FAILED)
PROMPT = "a smiling face"
NUMBERS = (np.nan, np.inf, -1e30, 0.0, -1.0, 1e38)


WHOLE = "whole.cachec"  # the bundle with text encoders, tokenizers and decoder
EVERY = 11  # so many cases are one of it; prime to 2 and 3, by which cases are told apart, too


def make_bundle(folder: Path) -> Path:
    """A small bundle for ONNX Runtime, with a fitted level and an uncached one; beside it a whole one, a small FLUX."""
    sys.path.append(str(Path(__file__).parent.parent / "tests"))
    from families import FAMILIES
    from toy_bundle import split_toy, write_output_bundle

    write_output_bundle(split_toy(head_axis=True), folder / "toy.cachec", backend="ort")
    flux = next(family for family in FAMILIES if family.name == "flux")
    flux.make().save_pretrained(folder / "flux")
    asked = ("--components", "all", "--method", "reuse", "--steps", "3", "--budget", "2", "--size", "32x32", "--target", "ort")
    command = [sys.executable, "-m", "cachec", "compile", str(folder / "flux"), *asked, "-o", str(folder / WHOLE)]
    subprocess.run(command, check=True, capture_output=True)
    return folder / "toy.cachec"


def bundle_of(bundle: Path, case: int) -> Path:
    """The one that a case damages."""
    return bundle.with_name(WHOLE) if case % EVERY == 0 else bundle


def opened_outside(root: Path) -> list[str]:
    """A list that fills with the files beside ``root`` that Python opens from now on."""
    found: list[str] = []

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open" and isinstance(arguments[0], str | bytes | os.PathLike):
            path = os.path.realpath(os.fsdecode(arguments[0]))
            if path.startswith("/etc/passwd") or (path.startswith(str(root.parent)) and not path.startswith(str(root))):
                found.append(path)

    sys.addaudithook(watch)
    return found


def run(bundle: Path, *, whole: bool) -> dict[str, bytes]:
    """What each level makes of one noise, as bytes; of a ``whole`` bundle, pictures of a prompt."""
    results = {}
    with cachec.load(bundle, threads=1) as loaded:
        if whole:
            return {level: np.stack(loaded.generate([PROMPT], seeds=[0], level=level)).tobytes() for level in loaded.programs}
        for level in loaded.programs:
            session = loaded.session(level=level)
            noise = np.random.default_rng(0).standard_normal(session.latent_shape).astype(np.float32)
            specs = {spec.name: spec for engine in loaded.engines.values() for spec in engine.signature.inputs}
            given = {name: np.full(specs[name].resolve({"batch": 1}), 0.5, np.float32) for name in session.conditions}
            results[level] = session.run(given, noise).tobytes()
    return results


def judge(bundle: Path, wanted: dict[str, bytes], *, whole: bool) -> str:
    """Open and run it: one of :data:`RIGHT`, or what went wrong."""
    stage = REFUSED
    try:
        for level in Bundle.open(bundle).manifest.programs:
            Bundle.open(bundle).program(level)
        stage = FAILED
        return SAME if run(bundle, whole=whole) == wanted else ANOTHER
    except CachecError as error:
        text = str(error)
        if len(text.replace(str(bundle), "x")) > LONGEST or text.count("\n") > 1:  # a second line says what to do
            return f"a message of {len(text)} characters, {text.count(chr(10))} breaks: {text[:80]}"
        return stage
    except Exception as error:
        return f"{type(error).__name__}: {str(error)[:120]}"


def change_numbers(path: Path, random: Random) -> None:
    """One array of a program gets another number, another shape, another type, or goes."""
    arrays = load_file(path)
    name = random.choice(sorted(arrays))
    array, kind = arrays[name].copy(), random.random()
    if kind < 0.5 and array.size:
        value = random.choice(NUMBERS)
        array.reshape(-1)[random.randrange(array.size)] = value if array.dtype.kind == "f" else random.choice([-1, 2**31 - 1])
    elif kind < 0.7:
        array = array.reshape(-1)[: random.randrange(array.size + 1)]
    elif kind < 0.85:
        array = array.astype(random.choice([np.float64, np.int64, np.float16, np.uint8]))
    else:
        del arrays[name]
    if name in arrays:
        arrays[name] = np.ascontiguousarray(array)
    save_file(arrays, path)


def sign(bundle: Path, data: Any, changed: str | None = None) -> None:
    """Write the manifest with hashes that fit, as whoever means harm would."""
    if changed is not None:
        path = bundle / changed
        data["files"][changed] = {**data["files"][changed], "bytes": path.stat().st_size, "sha256": hash_file(path)}
    if isinstance(data, dict):
        data["digest"] = _digest({k: v for k, v in data.items() if k != "digest"})
    (bundle / MANIFEST).write_text(json.dumps(data))


def manifests(bundle: Path, cases: range) -> Iterator[tuple[int, str]]:
    """A third changes a manifest without its digest, a third with it, a third programs with all hashes."""
    both = {False: bundle, True: bundle.with_name(WHOLE)}
    wanted = {whole: run(path, whole=whole) for whole, path in both.items()}
    with_copy = bundle.with_name(f"copy-{cases.start}")
    outside = opened_outside(with_copy)
    for case in cases:
        random, of = Random(case), bundle_of(bundle, case)
        shutil.rmtree(with_copy, ignore_errors=True)
        shutil.copytree(of, with_copy, copy_function=os.link)
        for name in (of / MANIFEST, *(of / "programs").iterdir()):  # those that are written to
            (with_copy / name.relative_to(of)).unlink()
            shutil.copyfile(name, with_copy / name.relative_to(of))
        damage_manifest(with_copy, case % 3, random)
        outside.clear()
        said = judge(with_copy, wanted[of != bundle], whole=of != bundle)
        if case % 3 == 0 and said != REFUSED:
            said = f"a manifest without its digest: {said}"
        yield case, said if not outside else f"left the bundle: {outside[0]}"


def damage_manifest(bundle: Path, kind: int, random: Random) -> None:
    data = json.loads((bundle / MANIFEST).read_text())
    if kind < 2:
        before = json.dumps(data)
        while json.dumps(data) == before:
            for _ in range(random.choice([1, 1, 1, 3])):
                change(data, random)
        text = json.dumps(data)
        if kind == 1:
            sign(bundle, data)
        else:
            (bundle / MANIFEST).write_text(text if random.random() < 0.8 else text[: random.randrange(len(text))])
        return
    files = random.choice(sorted(data["programs"].items()))[1]
    if random.random() < 0.5:
        path = bundle / files["json"]
        program = json.loads(path.read_text())
        for _ in range(random.choice([1, 1, 1, 3])):
            change(program, random)
        path.write_text(json.dumps(program))
        sign(bundle, data, files["json"])
    else:
        change_numbers(bundle / files["arrays"], random)
        sign(bundle, data, files["arrays"])


def files(bundle: Path, cases: range) -> Iterator[tuple[int, str]]:
    """Flipped bits, missing ends, files that are gone, exchanged, folders or links; half of the others keep their times.

    In half of the cases every file is large: its hash was remembered when the bundle was opened whole.
    """
    root = bundle.with_name(f"files-{cases.start}")
    for case in cases:
        random = Random(case)
        shutil.rmtree(root, ignore_errors=True)
        shutil.copytree(bundle_of(bundle, case), root)
        if case % 2:
            checked_files.LARGE_FILE_BYTES = 0
        Bundle.open(root)
        damage_file(root, random)
        try:
            Bundle.open(root)
            said = "a damaged file opens"
        except CachecError as error:
            said = REFUSED if len(str(error)) < LONGEST else f"a message of {len(str(error))} characters"
        except Exception as error:
            said = f"{type(error).__name__}: {str(error)[:120]}"
        checked_files.LARGE_FILE_BYTES = 64 * 2**20
        yield case, said


def damage_file(root: Path, random: Random) -> None:
    paths = sorted(path for path in root.rglob("*") if path.is_file())
    path = random.choice(paths)
    stat, content = path.stat(), path.read_bytes()
    kind = random.choice(["flip", "flip", "zero", "truncate", "append", "remove", "exchange", "folder", "link"])
    damaged = bytearray(content)
    if kind == "flip":
        place = random.randrange(len(content))
        damaged[place] ^= 1 << random.randrange(8)
    elif kind == "zero":
        start = random.randrange(len(content))
        damaged[start : start + 512] = bytes(b ^ 0xFF for b in damaged[start : start + 512])
    elif kind == "truncate":
        damaged = damaged[: random.randrange(len(content))]
    elif kind == "append":
        damaged += b"\0" * random.randint(1, 4096)
    elif kind == "exchange":
        damaged = bytearray(next(p.read_bytes() for p in random.sample(paths, len(paths)) if p.read_bytes() != content))
    if kind in ("remove", "folder", "link"):
        path.unlink()
        if kind == "folder":
            path.mkdir()
        elif kind == "link":
            path.symlink_to(random.choice([root / "nowhere", path, root, Path("/dev/zero"), Path("/etc/hostname")]))
        return
    path.write_bytes(bytes(damaged))
    if random.random() < 0.5:
        os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
