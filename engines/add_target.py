"""``cachec add-target``: build engines on the machine that will run them, from the ONNX files in the bundle.

Neither torch, nor diffusers, nor onnx is needed for it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from cachec.engines.backends import BACKENDS, get_backend
from cachec.engines.build import build_into, check_build, keep_timing, plan_target
from cachec.engines.targets import ONNX_TARGET, TargetName, parse_device
from cachec.runtime.build import Sources, build_options
from cachec.runtime.bundle import Bundle, Manifest, Target
from cachec.runtime.device import CPU, CUDA, DeviceName
from cachec.runtime.errors import BundleError, InputError, OutputError
from cachec.runtime.program import UNCACHED
from cachec.runtime.sizes import check_max_batch, size_ranges
from cachec.runtime.write import BundleWriter


class BundledSources(Sources):
    """The graphs of a bundle that exists: its ONNX files."""

    def __init__(self, bundle: Bundle) -> None:
        target = next((one for one in bundle.manifest.targets if one.backend == ONNX_TARGET.backend), None)
        if target is None:
            raise BundleError(
                f"{bundle.root} has no ONNX files to build from, only {'; '.join(map(str, bundle.manifest.targets))}: "
                "compile it again with --target ort"
            )
        self._files = {name: bundle.path(artifact.path) for name, artifact in target.engines.items()}
        self.signatures = {name: artifact.signature for name, artifact in target.engines.items()}
        self.precision, self.shape_bucket = target.precision, target.shape_bucket

    def programs(self) -> Mapping[str, Any]:
        raise BundleError("a bundle has no exported programs, only ONNX files")

    def onnx(self) -> Mapping[str, Path]:
        return self._files


def add_targets(
    root: Path, names: Sequence[str], *, device: str | None = None, max_batch: int = 1, force: bool = False, **options: Any
) -> tuple[Bundle, list[Target]]:
    """Build targets into the bundle at ``root``; ``options`` as in ``runtime.build.build_options``.

    Interrupted, it leaves the bundle as it was, but for the kernel timings, from which the next build goes on.

    Raises:
        InputError: a target cannot be built here, or an option is out of range.
        OutputError: the bundle has this target already, or another process is adding to it.
        EngineError: the builder fails.
    """
    check_max_batch(max_batch)
    wanted = [TargetName.parse(name, BACKENDS) for name in names]
    bundle = Bundle.open(root)
    sources, build = BundledSources(bundle), build_options(**options)
    there = parse_device(device) or DeviceName(CUDA if all(name.device != CPU for name in wanted) else CPU)
    for name in wanted:
        if not get_backend(name.backend).from_onnx:
            raise InputError(f"target {name} is not built from the ONNX files in a bundle, as tensorrt and tensorrt-rtx are: "
                             f"give it to cachec compile --target {name}")  # fmt: skip
    check_build(wanted, sources.precision, there, build)
    with BundleWriter(root, force=True, onto=bundle.manifest) as writer, TemporaryDirectory() as folder:
        manifest = Bundle.open(root).manifest  # another process may have added to it until now
        build = replace(build, sizes=_sizes(bundle, max_batch), timing_cache=Path(folder))
        planned = [plan_target(sources, name, device=there, options=build) for name in wanted]
        replaced = [one for one in manifest.targets if any(one.is_like(target) for target in planned)]
        if replaced and not force:
            raise OutputError(f"{root} has {replaced[0]} already: pass --force to replace it")
        _unpack_timing(bundle, manifest, Path(folder))
        try:
            added = [build_into(writer, sources, name, device=there, options=build) for name in wanted]
        except BaseException:
            _commit(writer, manifest, (), (), Path(folder))  # the timings only
            raise
        _commit(writer, manifest, added, replaced, Path(folder))
    return Bundle.open(root), added


def _sizes(bundle: Bundle, max_batch: int) -> Mapping[str, Any]:
    level = next((level for level in bundle.manifest.programs if level != UNCACHED), UNCACHED)
    program = bundle.program(level)
    return size_ranges(program.num_steps, len(program.compute_steps), batch=program.key.batch, max_batch=max_batch)


def _unpack_timing(bundle: Bundle, manifest: Manifest, folder: Path) -> None:
    """Let builders find the kernel timings of the bundle."""
    for key, name in manifest.timing.items():
        (folder / f"{key}.timing").write_bytes(bundle.path(name).read_bytes())


def _commit(writer: BundleWriter, old: Manifest, added: Sequence[Target], replaced: Sequence[Target], timing: Path) -> None:
    """Add ``added`` and the timings to the bundle; files that only ``replaced`` had go."""
    targets = (*(one for one in old.targets if one not in replaced), *added)
    known = keep_timing(writer, timing)
    used = {artifact.path for target in targets for artifact in target.engines.values()} | set(known.values())
    before = {artifact.path for target in replaced for artifact in target.engines.values()} | set(old.timing.values())
    unfinished = set() if added else writer.files.keys() - old.files.keys() - set(known.values())
    files = {name: entry for name, entry in writer.files.items() if name in used or name not in before | unfinished}
    writer.commit(replace(old, targets=targets, timing=known, files=files))
