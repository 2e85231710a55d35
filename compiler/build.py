"""From engine plans to engine files in a bundle, and loaded engines."""

import platform
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from cachec.compiler.export import EnginePlan
from cachec.compiler.models.base import Settings
from cachec.runtime.bundle import ANY_DEVICE, Artifact, Target
from cachec.runtime.device import DeviceName
from cachec.runtime.engine import HOST, Engine
from cachec.runtime.write import BundleWriter


def build_target(
    backend: type[Engine], settings: Settings, plans: Sequence[EnginePlan], writer: BundleWriter, device: DeviceName
) -> Target:
    """Build the engines into the bundle."""
    target_device = device.kind if backend.device_bound else ANY_DEVICE
    directory = writer.directory(f"engines/{backend.name}-{target_device}-{settings.dtype}-{settings.height}x{settings.width}")
    engines = build_engines(backend, plans, writer, directory, device)
    return Target(
        backend=backend.name,
        version=backend.version(),
        os=platform.system().lower(),
        device=target_device,
        precision=settings.dtype,
        shape_bucket=f"{settings.height}x{settings.width}, {settings.text_tokens} text tokens",
        engines=engines,
    )


def build_engines(
    backend: type[Engine], plans: Sequence[EnginePlan], writer: BundleWriter, directory: Path, device: DeviceName = HOST
) -> dict[str, Artifact]:
    """Build engines into a directory of the bundle, and name their files by their hashes."""
    signatures = {plan.name: plan.signature for plan in plans}
    paths = backend.build({plan.name: plan.program for plan in plans}, signatures, directory, device=device)
    sealed = {path: writer.seal(path) for path in sorted(set(paths.values()))}  # several engines may be in one file
    for extra in sorted(directory.iterdir()):
        if extra.relative_to(writer.staging).as_posix() not in writer.files:
            writer.seal(extra)
    return {name: Artifact(sealed[path], signatures[name]) for name, path in paths.items()}


def load_engines(backend: type[Engine], target: Target, root: Path, stack: ExitStack, device: DeviceName) -> dict[str, Engine]:
    """Load what was built, to be closed with ``stack``."""
    files = {name: root / artifact.path for name, artifact in target.engines.items()}
    engines = backend.load(files, {name: artifact.signature for name, artifact in target.engines.items()}, device=device)
    return {name: stack.enter_context(engine) for name, engine in engines.items()}
