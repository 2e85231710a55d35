"""``cachec list``: what can be named on the command line."""

from collections.abc import Callable

from cachec.runtime.errors import CachecError
from cachec.runtime.variants import PictureSize


def list_names(what: str) -> list[tuple[str, str]]:
    """Names of ``models``, ``methods``, ``schedules`` or ``backends``, each with a line about it."""
    if what == "models":
        from cachec.compiler.models import MODELS, find_model
        from cachec.compiler.models.distribution import installed_models, located

        def about(name: str) -> str:
            spec = located(MODELS[name]) if name in MODELS else find_model(name)
            return f"{spec.portable_source}, {PictureSize(spec.width, spec.height, spec.frames)}"

        return [(name, _or_why_not(about, name)) for name in sorted({*MODELS, *dict(installed_models())})]
    if what == "methods":
        from cachec.compiler.methods import METHODS, get_method

        def in_words(name: str) -> str:
            return f"{get_method(name).cut} cut: {get_method(name).summary}"

        return [(name, _or_why_not(in_words, name)) for name in METHODS]
    if what == "schedules":
        from cachec.compiler.tables.published import PUBLISHED

        return [(name, f"{steps} steps: {', '.join(map(str, some))}") for name, (steps, some) in PUBLISHED.items()]
    from cachec.engines import BACKENDS, get_engine

    return [(name, _or_why_not(lambda name: get_engine(name).version(), name)) for name in BACKENDS]


def _or_why_not(describe: Callable[[str], str], name: str) -> str:
    try:
        return describe(name)
    except CachecError as error:
        return f"not available: {error}"
