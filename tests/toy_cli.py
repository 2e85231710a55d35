"""The command line with the toy's family registered: ``python -m tests.toy_cli compile DIRECTORY …``.

``KILL_AT=module:name*3`` kills the process when it calls that function for the third time.
"""

import importlib
import os
import signal
import sys
from pathlib import Path

import cachec
from cachec.cli import start


def kill_at(place):
    name, _, count = place.partition("*")
    module, _, path = name.partition(":")
    *parents, last = path.split(".")
    owner, left = importlib.import_module(module), int(count)
    for parent in parents:
        owner = getattr(owner, parent)
    real = getattr(owner, last)

    def counted(*args, **kwargs):
        nonlocal left
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*args, **kwargs)

    setattr(owner, last, counted)


if __name__ == "__main__":
    sys.path.append(str(Path(__file__).parent))
    cachec.register_family("ToyPipeline", "toy_model:ToyModel")
    if "KILL_AT" in os.environ:
        kill_at(os.environ["KILL_AT"])
    start()
