"""Flags of ``cachec serve``. Light: the command line reads them before it knows that anything is to be served."""

from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import click

from cachec.serving.limits import STRENGTHS, Limits

HELP = {
    "queue": "Samples that may wait for a bundle, beside those in its lanes; more get 429.",
    "samples": "Samples of a request (n).",
    "prompt": "Characters of a prompt.",
    "pixels": "Pixels of a request, all samples and frames.",
    "body": "Bytes of a request.",
    "picture": "Bytes of a request with a picture.",
    "body_seconds": "Seconds in which a request's head must come, and then its body.",
    "seconds": "Seconds after which a request is given up (504).",
    "grace": "Seconds that running requests get when the server stops.",
    "kept": "Pictures and videos that wait to be fetched.",
}


def _numbers(context: click.Context, option: click.Parameter, text: str) -> tuple[float, ...]:
    try:
        return tuple(float(one) for one in text.split(",") if one.strip())
    except ValueError as error:
        raise click.BadParameter(f"{text!r} is no list of numbers, as 0.3,0.6") from error


def serve_flags(function: Callable[..., Any]) -> Callable[..., Any]:
    """All of them but the bundles."""
    flags = [
        click.option("--host", default="127.0.0.1", show_default=True, help="Address; others than loopback can be reached."),
        click.option("--port", type=int, default=8000, show_default=True, help="0 takes a free one."),
        click.option("--lanes", type=int, default=8, show_default=True, help="Samples that a bundle works on at once."),
        click.option("--policy", default="deadline", show_default=True, help="fifo, shortest or deadline: docs/lanes.md."),
        click.option(
            "--strengths",
            default=",".join(map(str, STRENGTHS)),
            show_default=True,
            callback=_numbers,
            help="How far requests may have a picture changed, beside 1: each takes its time when the server starts.",
        ),
        click.option("--device", help="cpu, cuda, or cuda:1 for the second GPU; default the best that a target fits."),
        click.option("--target", help="Use this target of the bundles only; default the best that fits."),
        click.option("--weights", help="Some that add-weights added to the bundles; default their own."),
        click.option("--threads", type=int, help="CPU threads an engine call may use."),
        click.option(
            "--api-key-file",
            type=click.Path(path_type=Path),
            help="Its first line is the key that requests must bring; default the variable CACHEC_API_KEY, or none.",
        ),
        *[
            click.option(
                f"--max-{one.name.replace('_', '-')}",
                one.name,
                type=type(one.default),
                default=one.default,
                show_default=True,
                help=HELP[one.name],
            )
            for one in fields(Limits)
        ],
        click.option("--ray", is_flag=True, help="On Ray Serve, at RAY_ADDRESS or on a cluster of its own: docs/deploy.md."),
        click.option("--replicas", default="1", show_default=True, help="On Ray: how many, or 0-4 by the load."),
        click.option("--gpus", type=float, default=0.0, show_default=True, help="On Ray: of each replica."),
        click.option("--log-requests", is_flag=True, help="Log what is asked for, prompts, too; otherwise only ids."),
    ]
    for flag in reversed(flags):
        function = flag(function)
    return function
