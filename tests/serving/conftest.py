"""What the tests of the server share: a server that is asked many things."""

import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

WANTED = ("fastapi", "uvicorn", "openai")  # the wheel's smoke tests have none of them
collect_ignore_glob = [] if all(map(find_spec, WANTED)) else ["test_*.py"]
sys.path.append(str(Path(__file__).parent))


@pytest.fixture(scope="package")
def toy():
    from toy_server import running, toy_served

    with running(toy_served()) as server:
        yield server
