"""The command line as tests call it: in this process, or in one that is killed."""

import os
import signal
import subprocess
import sys
from pathlib import Path

from click.testing import CliRunner

from cachec.cli import main

TOY_SCHEDULE = ["--steps", "8", "--interval", "3"]  # of LESA: computes 0, 1, 2, 3, 5


def run_cli(*arguments):
    """The exit code, and everything printed."""
    result = CliRunner().invoke(main, [str(a) for a in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.output


def succeed(*arguments):
    code, output = run_cli(*arguments)
    assert code == 0, output
    return output


def killed(*arguments, at, cwd):
    """Run the command line in a process that kills itself where it calls ``at``: ``module:name*2`` for the second time."""
    command = [sys.executable, Path(__file__).with_name("toy_cli.py"), *map(str, arguments)]
    result = subprocess.run(command, env={**os.environ, "KILL_AT": at}, cwd=cwd, capture_output=True, check=False)
    assert result.returncode == -signal.SIGKILL, result.stderr.decode()
