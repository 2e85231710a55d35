"""Building the engines of one target into a bundle. Needs what its back end needs: for TensorRT neither torch nor onnx."""

import logging
import platform
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from cachec.engines.backends import get_builder
from cachec.engines.build_apart import build_apart
from cachec.engines.targets import Fit, TargetName
from cachec.runtime.build_options import BuildOptions, in_words
from cachec.runtime.builder import Sources
from cachec.runtime.bundle import ANY_DEVICE, Artifact, Target
from cachec.runtime.device import DeviceName
from cachec.runtime.engine import HOST, Engine, LoadOptions
from cachec.runtime.errors import InputError
from cachec.runtime.work import LOCK
from cachec.runtime.write import Collector

log = logging.getLogger(__name__)

TIMING = "timing"  # folder of kernel timings in a bundle


def plan_target(sources: Sources, name: TargetName, *, device: DeviceName, options: BuildOptions) -> Target:
    """The target that will be built, without its engines."""
    builder, there = get_builder(name.backend), device_for(name, device)
    return Target(
        backend=name.backend,
        version=builder.engine.version(),
        os=platform.system().lower(),
        device=name.device or (there.kind if builder.device_bound else ANY_DEVICE),
        precision=sources.precision,
        shape_bucket=sources.shape_bucket,
        engines={},
        needs=builder.needs(there, options.only(builder.options)),
        sizes={key: (size.least, size.usual, size.most) for key, size in options.sizes.items()} if builder.bounded else {},
    )


def build_into(
    writer: Collector,
    sources: Sources,
    name: TargetName,
    *,
    device: DeviceName = HOST,
    options: BuildOptions,
    apart: bool = False,
) -> Target:
    """Build a target's engines into the bundle that ``writer`` collects, and name their files by their hashes.

    Options that the back end does not take are for other targets. ``apart``: in a process of its own, what
    may take all memory.

    Raises:
        InputError: the back end cannot build for this device, precision or options here.
        EngineError: its library fails, or what it takes is not there.
    """
    target = plan_target(sources, name, device=device, options=options)
    builder = get_builder(name.backend)
    own = options.only(builder.options)
    directory, there = writer.directory(f"{sources.folder}/{name}-{sources.precision}"), device_for(name, device)
    if builder.apart:
        builder.check_room(onnx_bytes(sources), directory, there, own)
    build = partial(build_apart, builder) if apart and builder.apart else builder.build
    files = build(sources, directory, device=there, options=own)
    sealed = {path: writer.seal(path) for path in sorted(set(files.values()))}  # several engines may be in one file
    seal_all(writer, directory)
    return replace(
        target,
        engines={key: Artifact(sealed[path], sources.signatures[key]) for key, path in files.items()},
        weights={key: writer.name_of(path) for key, path in sources.onnx().items()} if own.strip else {},
    )


def load_collected(fit: Fit, sources: Sources, writer: Collector) -> Mapping[str, Engine]:
    """The engines of a target that fits, from files that are not in the bundle yet."""
    assert fit.backend is not None, "it fits"
    files = {name: writer.staging / artifact.path for name, artifact in fit.target.engines.items()}
    weights = {name: writer.staging / path for name, path in fit.target.weights.items()}
    return fit.backend.load(files, sources.signatures, LoadOptions(fit.device, weights=weights, needs=fit.target.needs))


def onnx_bytes(sources: Sources) -> int:
    """Of the ONNX files and their weights."""
    folders = {path.parent for path in sources.onnx().values()}
    return sum(path.stat().st_size for folder in folders for path in folder.iterdir() if path.suffix in (".onnx", ".bin"))


def check_build(
    names: Sequence[TargetName], precision: str, device: DeviceName, options: BuildOptions, *, max_batch: int = 1
) -> None:
    """Raise ``InputError`` unless all targets can be built here, and every option is for one of them."""
    builders = [get_builder(name.backend) for name in names]
    if unused := options.given() - frozenset().union(*(builder.options for builder in builders)):
        raise InputError(
            f"{in_words(unused)} is for none of the targets {', '.join(map(str, names))}: leave it out, or "
            "add the target tensorrt"
        )
    if max_batch != 1 and not any(builder.bounded for builder in builders):
        raise InputError(f"max-batch is {max_batch}, but {', '.join(map(str, names))} takes any batch: leave it out")
    for name, builder in zip(names, builders, strict=True):
        if ignored := options.given() - builder.options:
            log.warning("%s is not for %s", in_words(ignored), name)
        if (only := builder.engine.only_device) not in (None, name.device or only):
            raise InputError(f"target {name}: {name.backend} runs on {only} only; call it {name.backend}")
        builder.check_build(device_for(name, device), precision, options)


def device_for(name: TargetName, device: DeviceName) -> DeviceName:
    """What a target is built for, if the engines are measured on ``device``."""
    only = get_builder(name.backend).engine.only_device
    if only is not None and device.kind != only and device != HOST:
        raise InputError(f"device is {device}, but {name.backend} runs on {only} only")
    kind = name.device or only or device.kind
    return device if kind == device.kind else DeviceName(kind)


def seal_all(writer: Collector, directory: Path) -> None:
    """List what else is in a directory: shared weights. An empty directory goes."""
    for extra in sorted(directory.iterdir()):
        if writer.name_of(extra) not in writer.files:
            writer.seal(extra)
    if not any(directory.iterdir()):
        directory.rmdir()


def keep_timing(writer: Collector, folder: Path) -> dict[str, str]:
    """Collect kernel timings; returns their files in the bundle, by the machine that they are of."""
    found = sorted(path for path in folder.glob("*") if path.name != LOCK)
    return {path.stem: writer.add_bytes(f"{TIMING}/{path.name}", path.read_bytes()) for path in found}
