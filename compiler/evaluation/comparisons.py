"""What a bundle is compared with: the entries of ``--against``, each turned into a program and the engines to play it on."""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np

from cachec.compiler.graphs.build_engines import linear_engines
from cachec.compiler.graphs.prepare import prepare
from cachec.compiler.methods import METHODS, get_method
from cachec.compiler.methods.base import CodedMethod, Method
from cachec.compiler.methods.codings import coding_of
from cachec.compiler.methods.parameters import Parameters
from cachec.compiler.methods.training import find_shipped
from cachec.compiler.models.base import LoadedModel, Settings, settings_of
from cachec.compiler.planning.goals import PLAIN
from cachec.compiler.tables.coefficients import AdvanceTable
from cachec.compiler.tables.lower import lower, lower_uncached
from cachec.compiler.tables.samplers import SOLVERS, solver_rows
from cachec.compiler.tables.sampling import Sampling
from cachec.compiler.tables.schedule import Schedule
from cachec.runtime.abi import COEFFICIENTS, COMPUTE, FEATURES, FORECAST
from cachec.runtime.device import DeviceName
from cachec.runtime.engine import Engine
from cachec.runtime.errors import InputError, unknown_name
from cachec.runtime.plan import weighs_rows
from cachec.runtime.program import UNCACHED, Program, ProgramKey, hash_sigmas
from cachec.runtime.session import LoadedBundle, Session

Kind = Literal["uncached", "level", "method", "solver"]


@dataclass(frozen=True)
class Row:
    """One row of the comparison: a program, and the engines to play it on."""

    name: str
    kind: Kind
    program: Program
    engines: Mapping[str, Engine]

    def session(self, loaded: LoadedBundle) -> Session:
        return Session(self.engines, self.program, loaded.io)


@dataclass(frozen=True)
class Entry:
    """One entry of ``--against``: a solver, or a method with its options (``interval`` if it has a schedule of its own)."""

    name: str
    method: Method | None = None
    interval: int | None = None


def parse_against(text: str) -> tuple[Entry, ...]:
    """Read ``taylor:1,lesa,plain,ab2``: names of methods and solvers.

    A number behind a method is its order, or its interval if it is trained for one; ``name=value`` sets another option.

    Raises:
        InputError: a name or an option is unknown, an entry is there twice, or a method is fitted to the model.
    """
    entries = tuple(_parse_entry(part.strip()) for part in text.split(",") if part.strip())
    names = [entry.name for entry in entries]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise InputError(f"--against names {', '.join(twice)} twice")
    return entries


def _parse_entry(text: str) -> Entry:
    name, *parts = text.split(":")
    solvers = {PLAIN, *SOLVERS} - {"euler"}
    if name not in METHODS and name not in solvers:
        raise unknown_name("entry of --against", name, {*METHODS, *solvers})
    if name not in METHODS:
        if parts:
            raise InputError(f"--against {text}: a solver takes no options, so write {name}")
        return Entry(text)
    kind = get_method(name)
    if kind.needs_calibration:
        raise InputError(f"--against {text}: {name} needs calibration; compile a bundle with it instead")
    options = dict(_parse_option(text, part, "interval" if kind.needs_training else "order") for part in parts)
    interval = options.pop("interval", None)
    if interval is not None and not interval.isdigit():
        raise InputError(f"--against {text}: the interval must be a whole number")
    return Entry(text, kind.with_options(options), None if interval is None else int(interval))


def _parse_option(entry: str, part: str, default: str) -> tuple[str, str]:
    name, _, value = part.rpartition("=")
    if not value:
        raise InputError(f"--against {entry}: write {entry.split(':')[0]}:2, or name=value behind the colon")
    return name or default, value


def compared_level(loaded: LoadedBundle, level: str | None) -> str:
    """The level whose schedule other methods are run on: the given one, or the first that forecasts.

    Raises:
        InputError: the bundle has no such level.
    """
    levels = [name for name in loaded.programs if name != UNCACHED]
    if level is None:
        return loaded.default_level
    if level not in levels:
        raise unknown_name("level", level, levels)
    return level


def level_rows(loaded: LoadedBundle) -> list[Row]:
    """The uncached run, then every level of the bundle."""
    levels = {name: program for name, program in loaded.programs.items() if name != UNCACHED}
    return [
        Row(UNCACHED, "uncached", loaded.programs[UNCACHED], loaded.engines),
        *(Row(name, "level", program, loaded.engines) for name, program in levels.items()),
    ]


def sampler_program(model: LoadedModel, settings: Settings, key: ProgramKey, num_steps: int) -> Program:
    """The model's own sampler with ``num_steps`` steps, all computed."""
    sampling = model.sampling(settings.with_steps(num_steps))
    return lower_uncached(replace(key, steps=num_steps, sigmas_hash=hash_sigmas(sampling.sigmas)), sampling)


def compared_rows(
    entries: Sequence[Entry], loaded: LoadedBundle, model: LoadedModel, *, level: str, work: Path, stack: ExitStack
) -> list[Row]:
    """A row for each entry, with as many computed steps as ``level`` has, or a trained method's own.

    Engines that the bundle lacks, as its predictor is inside its own or it does not forecast, are built in the folder ``work``
    and closed with ``stack``.

    Raises:
        InputError: a trained method has no predictor that fits, or a method does not fit the schedule.
    """
    programs = {entry.name: _compared_program(entry, loaded.programs[level], loaded, model) for entry in entries}
    settings, device = settings_of(loaded.manifest), DeviceName.parse(loaded.engines[COMPUTE].device.name)
    shared, rows = loaded.engines if _is_linear(loaded.engines) else None, list[Row]()
    for place, entry in enumerate(entries):
        program, engines = programs[entry.name], loaded.engines
        if isinstance(entry.method, CodedMethod):
            coding = coding_of(prepare(model, settings), settings, entry.method, None)
            folder = work / f"coded-{place}"
            folder.mkdir(parents=True)
            engines = linear_engines(model, settings, loaded.target.backend, folder, stack, device, coding)
        elif _forecasts(program):
            by_row = program.coefficients.shape[1] > 1
            if shared is None or (by_row and not weighs_rows(shared[FORECAST].signature)):
                folder = work / f"linear-{place}"
                folder.mkdir(parents=True)
                shared = linear_engines(model, settings, loaded.target.backend, folder, stack, device, by_row=by_row)
            engines = shared
        rows.append(Row(entry.name, "solver" if entry.method is None else "method", program, engines))
    return rows


def _forecasts(program: Program) -> bool:
    return any(one.graph == FORECAST for one in program.instructions)


def _compared_program(entry: Entry, base: Program, loaded: LoadedBundle, model: LoadedModel) -> Program:
    settings, key = settings_of(loaded.manifest), replace(base.key, level="default")
    if entry.method is None:
        return _solver_program(entry.name, model, settings, key, len(base.compute_steps))
    if entry.method.needs_training:
        schedule, parameters = _trained(entry, entry.method, model, settings)
        sampling = model.sampling(settings)
        key = replace(key, steps=settings.steps, sigmas_hash=hash_sigmas(sampling.sigmas))
    else:
        schedule, parameters = Schedule(base.num_steps, base.compute_steps), None
        sampling = reference_sampling(loaded, model, base)
    return lower(entry.method.table(schedule, sampling.levels(entry.method.cut), parameters), key, sampling)


def reference_sampling(loaded: LoadedBundle, model: LoadedModel, base: Program) -> Sampling:
    """The sampler on the grid of ``base``, whose own time steps may have been polished."""
    return model.sampling(settings_of(loaded.manifest).with_steps(base.num_steps))


def _solver_program(name: str, model: LoadedModel, settings: Settings, key: ProgramKey, num_steps: int) -> Program:
    plain = sampler_program(model, settings, key, num_steps)
    if name == PLAIN:
        return plain
    if not np.allclose(model.sampling(settings.with_steps(num_steps)).shares, 1, atol=1e-6):
        raise InputError(
            f"--against {name}: it is a solver for flows, and {model.sampler} is none; {PLAIN} takes fewer steps of it"
        )
    table = AdvanceTable(Schedule(num_steps, tuple(range(num_steps))), solver_rows(name, plain.sigmas.astype(np.float64)))
    return lower(table, plain.key, Sampling(plain.sigmas, plain.timesteps, targets=plain.target_timesteps))


def _trained(entry: Entry, method: Method, model: LoadedModel, settings: Settings) -> tuple[Schedule, Parameters]:
    interval = method.default_interval if entry.interval is None else entry.interval
    schedule = method.interval(settings.steps, interval)
    parameters = find_shipped(model, method, schedule, settings)
    if parameters is None:
        raise InputError(
            f"--against {entry.name}: no {method.name} predictor ships for {model.spec.name} with {settings.steps} steps, "
            f"interval {interval} and these settings; compile a bundle with it and evaluate that"
        )
    return schedule, parameters


def _is_linear(engines: Mapping[str, Engine]) -> bool:
    """Do they take rows of all features as they are?"""
    inputs = {spec.name: spec for spec in engines[FORECAST].signature.inputs} if FORECAST in engines else {}
    return FEATURES in inputs and (weighs_rows(engines[FORECAST].signature) or inputs[COEFFICIENTS].shape[-2] == 1)
