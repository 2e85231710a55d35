"""What the command line lets through of what is logged and warned of."""

import logging
import os
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import click

log = logging.getLogger("cachec")

_NOISE = {  # logger -> what it says that is no news: nothing here draws with torchvision, and cut prompts are named by cachec
    "transformers.utils.import_utils": "requires torchvision (not installed)",
    "transformers.tokenization_utils_base": "Token indices sequence length is longer",
}


def set_up_messages() -> None:
    """One-line messages, without what libraries are known to say for nothing."""
    logging.basicConfig(format="%(message)s", level=logging.ERROR)
    log.setLevel(os.environ.get("CACHEC_LOG_LEVEL", "WARNING").upper())
    logging.captureWarnings(capture=True)
    logging.getLogger("py.warnings").setLevel(logging.WARNING)
    warnings.formatwarning = lambda message, category, *_: f"{category.__name__}: {' '.join(str(message).split())}"
    for category in (DeprecationWarning, PendingDeprecationWarning, FutureWarning):  # to those who write code
        warnings.simplefilter("ignore", category)
    for name, noise in _NOISE.items():
        logging.getLogger(name).addFilter(partial(_is_news, noise))
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")


def _is_news(noise: str, record: logging.LogRecord) -> bool:
    return noise not in record.getMessage()


def _talk(level: int) -> Callable[[click.Context, click.Parameter, bool], None]:
    def set_level(ctx: click.Context, parameter: click.Parameter, given: bool) -> None:
        if given:
            log.setLevel(min(level, log.level))
            if level == logging.DEBUG:
                logging.getLogger().setLevel(logging.DEBUG)

    return set_level


def talking(function: Any) -> Any:
    """``-v`` and ``--debug``, on the program and on every command."""
    for names, level, text in (
        (("--debug",), logging.DEBUG, "Show tracebacks and the libraries' own messages."),
        (("-v", "--verbose"), logging.INFO, "Say what is done, stage by stage."),
    ):
        option = click.option(*names, is_flag=True, expose_value=False, callback=_talk(level), help=text)
        function = option(function)
    return function
