"""What the tests of the server share: a server that is asked many things."""

import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parent))


@pytest.fixture(scope="package")
def toy():
    from toy_server import running, toy_served

    with running(toy_served()) as server:
        yield server
