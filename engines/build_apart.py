"""Builds in a process of their own: it gives its memory back, and what ends it ends nothing else.

The process is ``cachec.engines.build_child``. Both speak in lines of JSON: an order on its standard input, then messages and
the result on its standard output. Progress bars go to the terminal that both share. It stops when its standard input is
closed, so that it never outlives who wants the engines.
"""

import json
import logging
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from cachec.runtime import errors
from cachec.runtime.build_options import BuildOptions
from cachec.runtime.builder import EngineBuilder, Sources
from cachec.runtime.device import DeviceName
from cachec.runtime.errors import CachecError, EngineError

STOP_SECONDS = 60.0  # to keep its kernel timings; a builder stops at its next step only
_COMMAND = (sys.executable, "-P", "-m", "cachec.engines.build_child")


def build_apart(
    builder: EngineBuilder, sources: Sources, out: Path, *, device: DeviceName, options: BuildOptions
) -> dict[str, Path]:
    """As ``builder.build``, in another process. Interrupted, it waits until that has stopped.

    Raises:
        EngineError: the process was ended from outside, or crashed.
        CachecError: what the builder raises.
    """
    order = {
        "backend": builder.engine.name,
        "onnx": {name: str(path) for name, path in sources.onnx().items()},
        "signatures": {name: signature.to_json() for name, signature in sources.signatures.items()},
        "precision": sources.precision,
        "shape_bucket": sources.shape_bucket,
        "out": str(out),
        "device": str(device),
        "options": {**asdict(options), "timing_cache": options.timing_cache and str(options.timing_cache)},
        "log_level": logging.getLogger("cachec").getEffectiveLevel(),
    }
    with _child(json.dumps(order).encode() + b"\n") as child:
        result, code = _hear(child), child.wait()
    if "files" in result:
        return {name: Path(path) for name, path in result["files"].items()}
    if "error" in result:
        kind, text = result["error"]
        known = getattr(errors, kind, EngineError)
        raise (known if issubclass(known, CachecError) else EngineError)(text)
    raise EngineError(f"the process that built for {builder.engine.name} {_ending(code)}")


def _hear(child: "subprocess.Popen[bytes]") -> dict[str, Any]:
    """What the process says at last; messages go to their loggers."""
    result: dict[str, Any] = {}
    for line in child.stdout or ():
        said = json.loads(line)
        if "log" in said:
            name, level, text = said["log"]
            logging.getLogger(name).log(level, "%s", text)
        else:
            result = said
    return result


@contextmanager
def _child(order: bytes) -> Iterator["subprocess.Popen[bytes]"]:
    """The process, in a group of its own: Ctrl-C reaches it through its standard input only, once."""
    child = subprocess.Popen(
        _COMMAND,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        start_new_session=os.name != "nt",
        creationflags=0x200 if os.name == "nt" else 0,
    )
    assert child.stdin is not None
    assert child.stdout is not None
    try:
        with suppress(BrokenPipeError):  # it is gone already; its code says how it ended
            child.stdin.write(order)
            child.stdin.flush()
        yield child
    except BaseException:
        _stop(child)
        raise
    finally:
        _close_input(child)
        child.stdout.close()


def _stop(child: "subprocess.Popen[bytes]") -> None:
    """Let it stop, or end it if it takes too long, or whoever waits is interrupted again."""
    try:
        _close_input(child)
        child.wait(STOP_SECONDS)
    except subprocess.TimeoutExpired:
        _end(child)
    except BaseException:
        _end(child)
        raise


def _close_input(child: "subprocess.Popen[bytes]") -> None:
    with suppress(BrokenPipeError):  # of an order that nobody read
        child.stdin.close()  # type: ignore[union-attr]


def _end(child: "subprocess.Popen[bytes]") -> None:
    child.kill()
    child.wait()


def _ending(code: int) -> str:
    """How a process ended that did not say why."""
    if code >= 0:
        return f"ended with code {code} and did not say why"
    name = signal.Signals(-code).name if -code in set(signal.Signals) else f"signal {-code}"
    why = ", as the system does when memory is short" if name == "SIGKILL" else ""
    return f"was ended by {name}{why}"
