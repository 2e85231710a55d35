"""``cachec add-target``: build engines on the machine that will run them, from the ONNX files in the bundle.

Neither torch, nor diffusers, nor onnx is needed for it.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from cachec.engines.backends import BACKENDS, FROM_ONNX, get_engine
from cachec.engines.build_target import build_into, check_build, keep_timing, plan_target
from cachec.engines.fastest import AUTO, check_alone, find_usable, keep_fastest
from cachec.engines.targets import ONNX_TARGET, TargetName, parse_device
from cachec.runtime.build_options import DEFAULTS, BuildOptions
from cachec.runtime.builder import Sources
from cachec.runtime.bundle import Bundle, Target
from cachec.runtime.components import components_of
from cachec.runtime.device import CUDA, DeviceName
from cachec.runtime.engine import ONNX
from cachec.runtime.errors import BundleError, InputError, OutputError
from cachec.runtime.files import write_file
from cachec.runtime.program import UNCACHED
from cachec.runtime.sizes import check_max_batch, size_ranges
from cachec.runtime.write import BundleAdder

log = logging.getLogger(__name__)


class BundledSources(Sources):
    """The graphs of a bundle that exists, of its first size, or of one of its components: its ONNX files."""

    def __init__(self, bundle: Bundle, component: str | None = None) -> None:
        targets = bundle.manifest.targets
        if component is not None:
            targets, self.folder = components_of(bundle.manifest)[component].targets, f"components/{component}"
        target = next((one for one in targets if one.backend == ONNX_TARGET.backend), None)
        if target is None:
            raise BundleError(
                f"{bundle.root} has no ONNX files to build{f' {component}' if component else ''} from, only "
                f"{'; '.join(map(str, targets))}: compile it again with --target ort"
            )
        self._files = {name: bundle.path(artifact.path) for name, artifact in target.engines.items()}
        self.signatures = {name: artifact.signature for name, artifact in target.engines.items()}
        self.precision, self.shape_bucket = target.precision, target.shape_bucket

    @classmethod
    def of_all_sizes(cls, bundle: Bundle) -> "list[BundledSources]":
        """The graphs of each size and length of texts. Those of one set are fixed at it, which TensorRT makes best of."""
        return [cls(place) for place in bundle.places]

    @classmethod
    def of_components(cls, bundle: Bundle) -> "dict[str, BundledSources]":
        """The graphs of each component."""
        return {name: cls(bundle, name) for name in bundle.manifest.components}

    def programs(self) -> Mapping[str, Any]:
        raise InputError("a bundle has no exported programs, only ONNX files: give this target to cachec compile")

    def onnx(self) -> Mapping[str, Path]:
        return self._files


def add_targets(
    root: Path,
    names: Sequence[str],
    *,
    device: str | None = None,
    max_batch: int = 1,
    force: bool = False,
    options: BuildOptions = DEFAULTS,
    apart: bool = False,
) -> tuple[Bundle, list[Target]]:
    """Build targets into the bundle at ``root``, its text encoders and decoder too; ``apart``: in processes of their own.

    ``auto`` alone: build and time all that its ONNX files can become, and ONNX Runtime; add the fastest, unless it is that. It
    is timed at the bundle's first size; what is added, is for every size.

    Interrupted, it leaves the bundle as it was, but for the kernel timings, from which the next build goes on.

    Raises:
        InputError: a target cannot be built here, or an option is out of range.
        OutputError: the bundle has this target already, or another process is adding to it.
        EngineError: the builder fails, or what it takes is not there.
    """
    check_max_batch(max_batch)
    there = parse_device(device) or DeviceName(CUDA)
    if there.kind != CUDA:
        raise InputError(f"device is {there}, but what add-target builds runs on NVIDIA GPUs only: leave the device out")
    if AUTO in names:
        check_alone(names)
        return _add_fastest(root, there, max_batch, force=force, options=options)
    wanted = [TargetName.parse(name, BACKENDS) for name in names]
    for name in wanted:
        if name.backend not in FROM_ONNX:
            raise InputError(f"target {name} is not built from the ONNX files in a bundle, as tensorrt and tensorrt-rtx are: "
                             f"give it to cachec compile --target {name}")  # fmt: skip
    with BundleAdder(root) as writer:
        folder = writer.directory("timings")
        bundle, sizes = writer.bundle, BundledSources.of_all_sizes(writer.bundle)
        check_build(wanted, sizes[0].precision, there, options)
        build = replace(options, sizes=_sizes(bundle, max_batch), timing_cache=folder)
        planned = [plan_target(sources, name, device=there, options=build) for name in wanted for sources in sizes]
        replaced = _check_planned(bundle, planned, force=force)
        _unpack_timing(bundle, folder)
        try:
            added = [
                build_into(writer, sources, name, device=there, options=build, apart=apart)
                for sources in sizes
                for name in wanted
            ]
            parts = _build_components(writer, wanted, there, build, apart=apart)
        except BaseException:
            _keep_timing_alone(writer, folder)
            raise
        added = [_with_further(target, bundle) for target in added]
        _commit(writer, added, replaced, keep_timing(writer, folder), parts)
    return Bundle.open(root), added


def _build_components(
    writer: BundleAdder, names: Sequence[TargetName], there: DeviceName, options: BuildOptions, *, apart: bool
) -> dict[str, list[Target]]:
    """The engines of the bundle's components. Their sizes are fixed, and they are for one sample."""
    fixed = replace(options, sizes={})
    return {
        part: [build_into(writer, sources, name, device=there, options=fixed, apart=apart) for name in names]
        for part, sources in BundledSources.of_components(writer.bundle).items()
    }


def _with_further(target: Target, bundle: Bundle) -> Target:
    """A target that has the bundle's further weights, if it takes those of the ONNX files."""
    there = (one for place in bundle.places for one in place.manifest.targets if one.shape_bucket == target.shape_bucket)
    onnx = next(one for one in there if one.backend == ONNX_TARGET.backend)
    takes = get_engine(target.backend).weights_form(target.needs) == ONNX
    return replace(target, added=onnx.added) if takes else target


def _add_fastest(
    root: Path, there: DeviceName, max_batch: int, *, force: bool, options: BuildOptions
) -> tuple[Bundle, list[Target]]:
    """As ``add_targets``, of what is the fastest that the ONNX files can become; nothing if they are, as they are."""
    with BundleAdder(root) as writer:
        folder = writer.directory("timings")
        bundle, (sources, *others) = writer.bundle, BundledSources.of_all_sizes(writer.bundle)
        names = [ONNX_TARGET, *map(TargetName, FROM_ONNX)]
        usable, failed = find_usable(names, [sources.precision], there, options, max_batch=max_batch)
        build = replace(options, sizes=_sizes(bundle, max_batch), timing_cache=folder)
        new = [
            plan_target(one, name, device=there, options=build)
            for name in usable
            for one in (sources, *others)
            if name != ONNX_TARGET
        ]
        replaced = _check_planned(bundle, new, force=force)
        _unpack_timing(bundle, folder)
        try:
            fastest, facts = keep_fastest(usable, sources, writer, there, build, failed)
            added = [] if fastest.backend == ONNX_TARGET.backend else [fastest]
            name = TargetName(fastest.backend)
            added += [build_into(writer, one, name, device=there, options=build, apart=True) for one in others if added]
            parts = _build_components(writer, [name] if added else [], there, build, apart=True)
        except BaseException:
            _keep_timing_alone(writer, folder)
            raise
        gone = [one for one in replaced if any(one.is_like(target) for target in added)]
        _commit(writer, added, gone, keep_timing(writer, folder), parts, {AUTO: facts})
    return Bundle.open(root), added


def _check_planned(bundle: Bundle, planned: Sequence[Target], *, force: bool) -> list[Target]:
    """The bundle's targets that will be replaced."""
    for index, target in enumerate(planned):
        if any(target.is_like(other) for other in planned[:index]):
            raise InputError(f"{target} is asked for twice: name it once")
    replaced = [one for one in bundle.manifest.targets if any(one.is_like(target) for target in planned)]
    if replaced and not force:
        raise OutputError(f"{bundle.root} has {replaced[0]} already: pass --force to replace it")
    return replaced


def _sizes(bundle: Bundle, max_batch: int) -> Mapping[str, Any]:
    level = next((level for level in bundle.manifest.programs if level != UNCACHED), UNCACHED)
    program = bundle.at(steps=max(bundle.manifest.step_counts)).program(level)
    if program.key.batch is not None and max_batch != 1:
        raise InputError(
            f"max-batch is {max_batch}, but the bundle was compiled for batches of {program.key.batch}: leave it out"
        )
    return size_ranges(
        program.num_steps, len(program.compute_steps), batch=program.key.batch, max_batch=max_batch, guided=program.key.guided
    )


def _unpack_timing(bundle: Bundle, folder: Path) -> None:
    """Let builders find the kernel timings of the bundle."""
    for key, name in bundle.manifest.timing.items():
        write_file(folder / f"{key}.timing", bundle.path(name).read_bytes())


def _keep_timing_alone(writer: BundleAdder, folder: Path) -> None:
    """After a build that failed, which is what is to be said, even if the disk is full now."""
    try:
        _commit(writer, (), (), keep_timing(writer, folder))
    except OutputError as error:
        log.warning("kernel timings are lost: %s", error)


def _commit(
    writer: BundleAdder,
    added: Sequence[Target],
    replaced: Sequence[Target],
    timing: Mapping[str, str],
    parts: Mapping[str, Sequence[Target]] | None = None,
    facts: Mapping[str, Any] | None = None,
) -> None:
    """Add ``added``, those of components in ``parts``, the timings and more ``facts``; files of what they replace go."""
    old = writer.bundle.manifest
    targets = (*(one for one in old.targets if one not in replaced), *added)
    components, gone = components_of(old), list(replaced)
    for name, new in (parts or {}).items():
        gone += (like := [one for one in components[name].targets if any(one.is_like(target) for target in new)])
        stays = (one for one in components[name].targets if one not in like)
        components[name] = replace(components[name], targets=(*stays, *new))
    everywhere = (*targets, *(target for one in components.values() for target in one.targets))
    used = {artifact.path for target in everywhere for artifact in target.engines.values()} | set(timing.values())
    before = {artifact.path for target in gone for artifact in target.engines.values()} | set(old.timing.values())
    unfinished = set() if added else writer.files.keys() - old.files.keys() - set(timing.values())
    files = {name: entry for name, entry in writer.files.items() if name in used or name not in before | unfinished}
    told = {name: component.to_json() for name, component in components.items()}
    new_facts = {**old.facts, **(facts or {})}
    writer.commit(replace(old, targets=targets, components=told, timing=timing, files=files, facts=new_facts))
