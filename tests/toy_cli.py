"""The command line with the toy's family registered: ``python -m tests.toy_cli compile DIRECTORY …``."""

import sys
from pathlib import Path

import cachec
from cachec.cli import start

if __name__ == "__main__":
    sys.path.append(str(Path(__file__).parent))
    cachec.register_family("ToyPipeline", "toy_model:ToyModel")
    start()
