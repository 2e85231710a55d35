"""Flags of the command line, made of the declarations in ``cachec.compiler.options``."""

from collections.abc import Callable, Mapping
from dataclasses import Field
from pathlib import Path
from typing import Any

import click

from cachec.compiler.options import Command, plain_type
from cachec.compiler.options import declared as options_of
from cachec.runtime.errors import InputError


def several(*decorators: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """All of these, the first outermost."""

    def apply(function: Any) -> Any:
        for decorator in reversed(decorators):
            function = decorator(function)
        return function

    return apply


def declared_flags(command: Command) -> Callable[[Any], Any]:
    """The flags of all options that are declared for ``command``."""
    return several(*(_flag(one, kind) for _, one, kind in options_of(command)))


def _flag(one: Field[Any], kind: Any) -> Callable[[Any], Any]:
    plain, meta = plain_type(kind), one.metadata
    names = (*(meta["flags"] or (f"--{one.name.replace('_', '-')}",)), one.name)
    about = {"help": meta["help"], "default": one.default}
    if meta["read"] is not None:
        default: Any = one.default
        text = None if default is None else ",".join(map(str, default))
        return click.option(*names, metavar=meta["metavar"], show_default=True, **{**about, "default": text})
    if plain is bool:
        return click.option(*names, is_flag=True, flag_value=not one.default, **about)
    about |= {"metavar": meta["metavar"], "show_default": True}
    if plain is tuple:
        return click.option(*names, multiple=True, **about)
    if plain is Mapping:
        return click.option(*names, multiple=True, callback=parse_pairs, **{**about, "default": ()})
    return click.option(*names, type=click.Path(path_type=Path) if plain is Path else plain, **about)


def parse_pairs(context: click.Context, parameter: click.Parameter, given: tuple[str, ...]) -> dict[str, str] | None:
    """``K=V``, given several times."""
    pairs = [text.partition("=") for text in given]
    for key, equals, value in pairs:
        if not (key and equals and value):
            raise InputError(f"{parameter.opts[0]} {key}{equals}{value} is not of the form name=value")
    return {key: value for key, _, value in pairs} or None
