"""The process that ``build_apart`` starts: builds the engines of one back end, and says what comes of it."""

import json
import logging
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from cachec.engines.backends import get_builder
from cachec.runtime.build_options import BuildOptions, SizeRange
from cachec.runtime.builder import Sources
from cachec.runtime.device import DeviceName
from cachec.runtime.errors import CachecError, InputError, in_one_line
from cachec.runtime.specs import Signature

Say = Callable[[dict[str, Any]], None]
INTERRUPTED = 130  # exit code


class OrderedSources(Sources):
    """The ONNX files that an order names."""

    def __init__(self, order: Mapping[str, Any]) -> None:
        self._files = {name: Path(path) for name, path in order["onnx"].items()}
        self.signatures = {name: Signature.from_json(data) for name, data in order["signatures"].items()}
        self.precision, self.shape_bucket = order["precision"], order["shape_bucket"]

    def programs(self) -> Mapping[str, Any]:
        raise InputError("there are only ONNX files here, no exported programs")

    def onnx(self) -> Mapping[str, Path]:
        return self._files


def build_ordered(order: Mapping[str, Any]) -> dict[str, str]:
    """The files of the engines, by name. Raises as the builder does."""
    options = dict(order["options"])
    options["sizes"] = {name: SizeRange(**size) for name, size in options["sizes"].items()}
    options["timing_cache"] = options["timing_cache"] and Path(options["timing_cache"])
    builder, device = get_builder(order["backend"]), DeviceName.parse(order["device"])
    files = builder.build(OrderedSources(order), Path(order["out"]), device=device, options=BuildOptions(**options))
    return {name: str(path) for name, path in files.items()}


class _Saying(logging.Handler):
    """Hands messages to the other process, whose settings say what becomes of them."""

    def __init__(self, say: Say) -> None:
        super().__init__()
        self._say = say

    def emit(self, record: logging.LogRecord) -> None:
        self._say({"log": [record.name, record.levelno, record.getMessage()]})


def _read_order() -> dict[str, Any]:
    """The first line of standard input; what comes behind it is nothing, until it is closed."""
    content = b""
    while not content.endswith(b"\n"):
        piece = os.read(0, 1 << 16)
        if not piece:
            sys.exit(INTERRUPTED)
        content += piece
    order: dict[str, Any] = json.loads(content)
    return order


def _stop_when_closed() -> None:
    """Interrupt the main thread, as Ctrl-C does, when the other process closes the pipe or is gone."""
    os.read(0, 1)
    if hasattr(signal, "pthread_kill"):
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
    else:
        signal.raise_signal(signal.SIGINT)


def _voice() -> Say:
    """Writes lines to what standard output was; the libraries' own output goes to standard error from now on."""
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    lock = threading.Lock()

    def say(what: dict[str, Any]) -> None:
        with lock:
            print(json.dumps(what), file=out, flush=True)

    return say


def main() -> None:
    """Carry out the order, and say its result."""
    say = _voice()
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background has it ignored
    order = _read_order()
    logging.basicConfig(handlers=[_Saying(say)], level=logging.ERROR)
    logging.getLogger("cachec").setLevel(order["log_level"])
    threading.Thread(target=_stop_when_closed, daemon=True).start()
    try:
        say({"files": build_ordered(order)})
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)
    except CachecError as error:
        say({"error": [type(error).__name__, str(error)]})
    except Exception as error:  # whatever a library raises is the other process's to tell
        traceback.print_exc()
        say({"error": ["EngineError", f"building for {order['backend']} failed: {in_one_line(error)}"]})


if __name__ == "__main__":
    main()
