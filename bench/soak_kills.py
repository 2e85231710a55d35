"""Commands that are killed at a random moment, and given again: half on a toy, half on tiny-flux."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import click

from cachec.runtime.bundle import Bundle
from cachec.runtime.errors import BundleError, CachecError, OutputError

TESTS = Path(__file__).parent.parent / "tests"
SHORT = ("--steps", "8", "--target", "ort")
TRAINED = ("--steps", "8", "--interval", "3", "--set", "max_rounds=1")
LONGEST = 1800  # seconds of a command
NAME = "somebody/model"  # on the stand-in of the Hub


@dataclass(frozen=True)
class Command:
    """What is killed: the arguments, where ``OUT`` stands for what it makes; ``base`` makes what it works on."""

    name: str
    arguments: tuple[str, ...]
    makes: str
    base: tuple[str, ...] = ()
    pushes: bool = False


def commands(model: str, prompts: str) -> list[Command]:
    """All that write, for one model."""
    bundle = ("compile", model, "--method", "taylor", "--schedule", "0,2,5", *SHORT, "-o", "OUT/m.cachec")
    few = ("--prompts", prompts)
    searched = ("compile", model, "--method", "gram", "--budget", "4", *SHORT, *few, "-o", "OUT/m.cachec")
    recorded = ("calibrate", model, "--steps", "8", *few, "-o", "OUT/m.calibration")
    return [
        Command("compile", bundle, "m.cachec"),
        Command("compile gram", searched, "m.cachec"),
        Command("add-target", ("add-target", "OUT/m.cachec", "--target", "tensorrt-rtx"), "m.cachec", bundle),
        Command("calibrate", recorded, "m.calibration"),
        Command("push", ("push", "OUT/m.cachec", NAME), "m.cachec", bundle, pushes=True),
        Command("train", ("train", model, *TRAINED, *few, "-o", "OUT/m.predictor"), "m.predictor"),
    ]


def call(arguments: Sequence[str], folder: Path) -> "subprocess.Popen[bytes]":
    """A process group of its own, so that what it started is killed with it."""
    given = [argument.replace("OUT", str(folder)) for argument in arguments]
    return subprocess.Popen(
        [sys.executable, str(TESTS / "toy_cli.py"), *given],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )


def finish(arguments: Sequence[str], folder: Path) -> tuple[int, str]:
    """Exit code and all that was said."""
    process = call(arguments, folder)
    said, _ = process.communicate(timeout=LONGEST)
    return process.returncode, said.decode(errors="replace")


def there(folder: Path) -> set[str]:
    """Files and folders beside each other, and all files of bundles, without the hashes in their names."""
    return {path.relative_to(folder).as_posix().split("-")[0] for path in folder.rglob("*") if path.is_file()}


def contents(bundle: Path) -> dict[str, bytes]:
    """All files of a bundle, by path in it."""
    return {path.relative_to(bundle).as_posix(): path.read_bytes() for path in bundle.rglob("*") if path.is_file()}


def left_half(path: Path) -> str:
    """What a killed command left at ``path``: nothing, a whole thing, or nothing that opens; else what is wrong with it."""
    try:
        if not path.exists():
            return "nothing was there"
        if path.suffix == ".cachec":
            Bundle.open(path, verify=True)
    except BundleError:
        return "nothing that opens"
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    else:
        return "whole"


def try_one(command: Command, seconds: float, wanted: set[str], folder: Path, base: Path | None, hub: Any) -> str:
    """Kill the command after ``seconds``, look, and give it again. ``hub``: the stand-in that is pushed to."""
    shutil.rmtree(folder, ignore_errors=True)
    hub.files.pop(NAME, None)
    folder.mkdir(parents=True)
    if base is not None:
        shutil.copytree(base, folder / "m.cachec")
    process = call(command.arguments, folder)
    try:
        process.communicate(timeout=seconds)
        ended = True
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        ended = False
    left = left_half(folder / command.makes)
    if left not in ("nothing was there", "whole", "nothing that opens") or (base is not None and left != "whole"):
        return f"{command.name}: left {left}"
    if command.pushes and (pushed := hub.files.get(NAME, {})) and pushed != contents(folder / command.makes):
        return f"{command.name}: left a part of it on the Hub: {sorted(pushed)[:5]}"
    code, said = finish(command.arguments, folder)
    done = code == 0 or (code == OutputError.exit_code and left == "whole")
    if not done:
        return f"{command.name}: the second time exit code {code}: {said[-200:]}"
    try:
        if command.makes.endswith(".cachec"):
            Bundle.open(folder / command.makes, verify=True)
    except CachecError as error:
        return f"{command.name}: afterwards {error}"
    if command.pushes and hub.files[NAME] != contents(folder / command.makes):
        return f"{command.name}: what is on the Hub is something else"
    if there(folder) != wanted:
        return f"{command.name}: files are not those of a run that was left alone: {sorted(there(folder) ^ wanted)[:5]}"
    return "done before it was killed" if ended else f"killed, {left}; gone on"


def run(count: int, folder: Path, work: Path) -> dict[str, Any]:
    """``count`` kills by turns of all commands on both models, at moments spread over the time that each takes."""
    start, log, seen = time.monotonic(), work / "kills.jsonl", Counter[str]()
    wrong: list[list[Any]] = []
    done = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []

    def note(case: int, said: str) -> None:
        ok = said.startswith(("done", "killed"))
        seen[said if ok else "wrong"] += 1
        if not ok:
            wrong.append([case, said])

    for case, said in done:
        note(case, said)
    texts = prompts(folder)
    both = zip(commands(toy_directory(folder), texts), commands("tiny-flux", texts), strict=True)
    kinds = [command for pair in both for command in pair]
    with hub_stand_in() as hub:
        known: dict[int, tuple[float, set[str], Path | None]] = {}
        for case in range(len(done), count):
            place = case % len(kinds)
            if place not in known:
                known[place] = alone(kinds[place], folder / f"alone-{place}")
            seconds, wanted, base = known[place]
            said = try_one(kinds[place], Random(case).uniform(0.05, 1.0) * seconds, wanted, folder / "killed", base, hub)
            note(case, said)
            click.echo(f"kills {case}: {kinds[place].name}: {said}")
            with log.open("a", encoding="utf-8") as file:
                file.write(json.dumps([case, said]) + "\n")
    return {"cases": count, "outcomes": dict(seen.most_common()), "wrong": wrong, "seconds": round(time.monotonic() - start)}


@contextmanager
def hub_stand_in() -> Iterator[Any]:
    """One on this machine, that commands push to while it lasts."""
    sys.path.append(str(TESTS))
    from hub_stand_in import hub_on_loopback

    with hub_on_loopback() as (hub, address):
        os.environ |= {"HF_ENDPOINT": address, "HF_HUB_OFFLINE": "0", "HF_TOKEN": "hf_none", "HF_HUB_DISABLE_XET": "1"}
        yield hub


def alone(command: Command, folder: Path) -> tuple[float, set[str], Path | None]:
    """What the command takes if it is left alone, the files that there are then, and what it worked on."""
    folder.mkdir(parents=True)
    base = None
    if command.base:
        code, said = finish(command.base, folder)
        assert code == 0, said
        base = shutil.copytree(folder / "m.cachec", folder.with_name(f"{folder.name}-base"))
    start = time.monotonic()
    code, said = finish(command.arguments, folder)
    assert code == 0, said
    return time.monotonic() - start, there(folder), base


def prompts(folder: Path) -> str:
    """A file of a few prompts."""
    from cachec.compiler.calibration.prompts import default_prompts

    path = folder / "prompts.txt"
    path.write_text("\n".join(default_prompts("avatars", "train")[:24]))
    return str(path)


def toy_directory(folder: Path) -> str:
    """The toy as a pipeline's directory."""
    sys.path.append(str(TESTS))
    from toy_model import save_toy

    path = folder / "toy"
    if not path.exists():
        save_toy(path)
    return str(path)
