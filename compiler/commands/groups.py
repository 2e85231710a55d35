"""How the command line takes what is said, and says what went wrong."""

import logging
from typing import Any

import click

from cachec.runtime.errors import CachecError, InputError

log = logging.getLogger("cachec")


class Command(click.Command):
    """Refuses a device that is given twice. Of other options the last one counts, so that scripts can put theirs behind."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        seen = self.make_parser(ctx).parse_args(list(args))[2]
        if [one.name for one in seen].count("device") > 1:
            raise InputError("--device is given twice, and one is taken: leave the other out")
        return super().parse_args(ctx, args)


class Group(click.Group):
    """Prints a ``CachecError`` in one line and exits with its code; ``--debug`` shows the traceback."""

    command_class = Command

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except CachecError as error:
            if log.isEnabledFor(logging.DEBUG):
                raise
            click.echo(f"error: {error}", err=True)
            ctx.exit(error.exit_code)
        except KeyboardInterrupt:
            click.echo("interrupted", err=True)
            ctx.exit(130)
