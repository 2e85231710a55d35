"""``python -m cachec``."""

from cachec.cli import start

start()
