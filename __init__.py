"""cachec: a compiler that removes redundant steps from diffusion transformers."""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from cachec.runtime.errors import CachecError, InputError
from cachec.runtime.session import LoadedBundle, Session
from cachec.runtime.version import VERSION

__version__ = VERSION
__all__ = [
    "CachecError", "LoadedBundle", "Session", "__version__", "accelerate", "compile_model", "load", "register_family",
    "register_method",
]  # fmt: skip


def load(
    bundle: str | Path,
    *,
    device: str | None = None,
    target: str | None = None,
    size: str | None = None,
    steps: int | None = None,
    weights: str | None = None,
    verify: bool = False,
    threads: int | None = None,
    keep: Sequence[str] | None = None,
) -> LoadedBundle:
    """Open a bundle and load the engines of the best of its targets that fits here.

    ``bundle``: its directory, a Hub id (``owner/name``), or a tar that ``cachec pack`` wrote.
    ``device``: only on ``cpu``, ``cuda``, or ``cuda:1``, the second GPU. ``target``: only this one, ``tensorrt`` say.
    ``size`` (as ``832x1216``) and ``steps`` are what it is at, by default the bundle's first: it has all others as well.
    ``weights``: some that ``cachec add-weights`` added, in place of its own. ``verify`` hashes large files even if this machine
    has hashed them before; ``threads`` limits CPU threads. ``keep``: which of its components (``transformer``, ``vae_decoder``,
    the text encoders) stay loaded between calls of ``generate``, by default all.

    Raises:
        BundleError: the directory is no bundle, damaged, or none of its targets fits this machine or device.
        InputError: there is no such device here, or no such size or number of steps in the bundle.
    """
    from cachec.engines import open_bundle

    loaded = open_bundle(
        bundle,
        device=device,
        target=target,
        size=size,
        steps=steps,
        verify=verify,
        threads=threads,
        weights=weights,
        late=keep is not None and "transformer" not in keep,
    )
    return replace(loaded, drop_in=_as_transformer, front=partial(_generator, keep=keep))


def _generator(loaded: LoadedBundle, *, keep: Sequence[str] | None) -> Any:
    from cachec.pictures.generator import Generator

    return Generator(loaded, keep=keep)


def _as_transformer(loaded: LoadedBundle, transformer: Any, **options: Any) -> Any:
    from cachec.runtime.errors import need

    need("torch", "diffusers", extra="compile", purpose="as_transformer")
    from cachec.compiler.as_transformer import as_transformer

    return as_transformer(loaded, transformer, **options)


def compile_model(model: str, out: str | Path, *, method: str = "lesa", force: bool = False, **options: Any) -> Path:
    """Compile ``model`` (short name, Hub id or directory) into a bundle at ``out``; returns ``out``.

    ``options`` are those that ``cachec.compiler.options`` declares: ``steps``, ``interval``, ``budget``, ``schedule``,
    ``targets``, ``height``, ``width``, ``guidance``, ``dtype``, ``predictor``, ``prompts``, ``seed``, ….

    Raises:
        CachecError: of the kind that fits; nothing is left at ``out``, or a bundle that lacks only TensorRT's engines.
    """
    from cachec.compiler.commands.compile import compile_to_bundle

    return compile_to_bundle(model, Path(out), force=force, method=method, **options)[0]


def accelerate(pipeline: Any, *, method: str = "taylor", compiled: bool = True, **options: Any) -> Any:
    """Compile a diffusers pipeline in memory, in place, without files; returns it, ready to call as before.

    It is compiled where it is, in its own precision. ``compiled``: under ``torch.compile``, else op by op. ``options`` are
    those of :func:`compile_model`: ``steps`` (50), ``budget``, ``interval``, ``schedule``, ``height``, ``width``,
    ``text_tokens``, …; calls must then ask for these. ``config``: diffusers' ``TaylorSeerCacheConfig`` or a cache-dit YAML in
    place of a method and a schedule.

    Raises:
        CachecError: of the kind that fits; the pipeline is then as it was.
    """
    from cachec.runtime.errors import need

    need("torch", "diffusers", extra="compile", purpose="accelerate")
    from cachec.compiler.accelerate import accelerate_pipeline
    from cachec.compiler.models import wrap_pipeline
    from cachec.compiler.request import make_request

    if (config := options.pop("config", None)) is not None:
        from cachec.compiler.cache_configs import schedule_options

        wanted = schedule_options(config, options.get("steps", 50))
        method = wanted.pop("method")
        options |= wanted
    if given := sorted({"device", "dtype"} & options.keys()):
        raise InputError(f"{' and '.join(given)} cannot be given: the pipeline's own are taken; move it first with pipe.to(…)")
    if "lora" in options:
        raise InputError("lora cannot be given: fuse it in the pipeline first, with load_lora_weights, fuse_lora and "
                         "unload_lora_weights")  # fmt: skip
    model = wrap_pipeline(pipeline)
    return accelerate_pipeline(model, make_request(model.spec, method=method, **options), compiled=compiled)


def register_family(name: str, cls: type | str) -> None:
    """Let pipelines of the class ``name`` (as ``model_index.json`` has it) be loaded by ``cls``.

    ``cls`` is a :class:`cachec.compiler.models.base.Family`, or where one is: ``module:Class``. An installed package does the
    same with an entry point of the group ``cachec.families``.

    Raises:
        InputError: there is another family of this name.
    """
    from cachec.compiler.models import FAMILIES

    FAMILIES.register(name, cls)


def register_method(name: str, cls: type | str) -> None:
    """Let ``--method name`` mean ``cls``, a :class:`cachec.compiler.methods.base.Method`, or where one is: ``module:Class``.

    An installed package does the same with an entry point of the group ``cachec.methods``.

    Raises:
        InputError: there is another method of this name.
    """
    from cachec.compiler.methods import METHODS

    METHODS.register(name, cls)
