"""Engines: back ends by name, and bundles opened with the target that fits this machine."""

import logging
from pathlib import Path

from cachec.engines.backends import BACKENDS, get_builder, get_engine
from cachec.engines.targets import ONNX_TARGET, TargetName, choose_target, parse_device
from cachec.runtime.bundle import Bundle
from cachec.runtime.errors import CachecError, InputError
from cachec.runtime.host_memory import num_cores
from cachec.runtime.origin import load_bundle
from cachec.runtime.session import LoadedBundle

__all__ = ["BACKENDS", "check_threads", "get_builder", "get_engine", "open_bundle"]

log = logging.getLogger(__name__)


def check_threads(threads: int | None) -> None:
    """Raise ``InputError`` for a number of threads that is none; warn about more than there are cores."""
    if threads is None:
        return
    if threads < 1:
        raise InputError(f"threads is {threads}; it must be at least 1")
    if threads > (cores := num_cores()):
        log.warning("threads is %d, but this process has %d cores: more threads than cores wait for each other", threads, cores)


def open_bundle(
    root: str | Path,
    *,
    device: str | None = None,
    target: str | None = None,
    size: str | None = None,
    steps: int | None = None,
    verify: bool = False,
    threads: int | None = None,
    weights: str | None = None,
    late: bool = False,
) -> LoadedBundle:
    """Check the bundle at ``root`` and load the engines of the best of its targets that fits here.

    ``root``: a directory, a Hub id or a tar (``engines/places.py``).
    ``device`` is ``cpu``, ``cuda``, or ``cuda:1`` for the second GPU, by default the best that a target fits. ``target``
    allows only targets of this name: ``tensorrt``, ``ort-cpu``. ``size`` (as ``832x1216``) and ``steps`` are those that the
    result is at, by default the bundle's first; engines of other sizes are loaded when they are asked for. ``weights`` names
    some that ``cachec add-weights`` added, in place of the bundle's own. ``late``: engines are loaded when they are first run.

    Raises:
        BundleError: it is damaged, or none of its targets fits: another operating system, GPU, or version of its back end.
        InputError: there is no such device, size, or number of steps, or no such weights for a target.
    """
    check_threads(threads)
    name, wanted = parse_device(device), None if target is None else TargetName.parse(target, BACKENDS)
    bundle = Bundle.open(_directory(root), verify=verify)
    if weights is not None:
        bundle = _with_weights(bundle, weights, wanted)
    try:
        fit, others = choose_target(bundle.at(size, steps).manifest.targets, device=name, wanted=wanted)
    except CachecError as error:
        raise type(error)(f"{root}: {error}\n{_again(bundle)}") from error
    better = [other for other in others if other.rank < fit.rank]
    for other in others:
        log.log(logging.WARNING if other in better else logging.INFO, "target %s does not fit: %s", other.target, other.reason)
    log.log(logging.WARNING if better or not fit.exact else logging.INFO, "using target %s, which %s", fit.target, fit.in_words)
    assert fit.backend is not None, "chosen targets fit"
    return load_bundle(bundle, fit.target, fit.backend, device=fit.device, threads=threads, steps=steps, late=late)


def _directory(root: str | Path) -> Path:
    if Path(root).is_dir():
        return Path(root)
    from cachec.engines.places import find_bundle  # which a bundle on disk need not wait for

    return find_bundle(root)


def _with_weights(bundle: Bundle, name: str, wanted: TargetName | None) -> Bundle:
    """The bundle as if it had been compiled with its further weights ``name``."""
    other = Bundle(bundle.root, bundle.manifest.with_weights(name))
    lacking = [one for one in bundle.manifest.targets if name not in one.added and (wanted is None or wanted.matches(one))]
    if lacking and not any(wanted is None or wanted.matches(one) for one in other.manifest.targets):
        raise InputError(f"{lacking[0]} has not the weights {name}: {no_other_weights(lacking[0].backend)}")
    for target in lacking:
        log.info("target %s has not the weights %s", target, name)
    return other


def no_other_weights(backend: str) -> str:
    """What to do where engines of a back end take no other weights than they were built with."""
    if "refit" in get_builder(backend).options:
        return "its engines keep their own; build them again with cachec add-target --refittable --force"
    return f"{backend} engines keep their own; take a target that takes others, as ort, aoti or eager"


def _again(bundle: Bundle) -> str:
    """What to do if no target fits."""
    manifest = bundle.manifest
    again = f"ake one that fits with cachec compile {manifest.model['source']} --method {manifest.method['name']}"
    onnx = any(target.backend == ONNX_TARGET.backend for target in manifest.targets)
    if onnx and any(Path("/dev").glob("nvidia[0-9]*")):
        return f"Build one here with cachec add-target {bundle.root} --target tensorrt, or m{again}"
    return f"M{again}"
