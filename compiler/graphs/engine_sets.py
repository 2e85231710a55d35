"""One set of engines for all sizes of a bundle, or one for each."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from cachec.compiler.graphs.export import EnginePlan
from cachec.compiler.graphs.shared import share_plans
from cachec.compiler.graphs.weights import has_values, is_large
from cachec.compiler.models.base import LoadedModel, Settings
from cachec.runtime.bundle import SEVERAL
from cachec.runtime.engine import Engine
from cachec.runtime.errors import PassError
from cachec.runtime.specs import BFLOAT16, Array
from cachec.runtime.write import Collector

log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class EngineSets:
    """What engines are built from, by shape bucket.

    Of engines for several sizes: how long the ``axes`` are and what is in the ``tables``, by size. ``why_static``: why there
    are others for each size, where there could be one set.
    """

    plans: Mapping[str, Sequence[EnginePlan]]
    axes: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    tables: Mapping[str, Mapping[str, Array]] = field(default_factory=dict)
    why_static: str | None = None

    @property
    def facts(self) -> dict[str, Any]:
        """What the manifest says of it."""
        return {} if self.why_static is None else {"engines_for_each_size": self.why_static}

    def shapes(self, writer: Collector) -> dict[str, dict[str, Any]]:
        """The same for the manifest; tables go to files."""
        files = {size: writer.add_tables(size, tables) for size, tables in self.tables.items() if tables}
        return {
            size: {"axes": dict(axes), **({"tables": files[size]} if size in files else {})} for size, axes in self.axes.items()
        }

    def at(self, size: str, engines: Mapping[str, Engine]) -> Mapping[str, Engine]:
        """Loaded engines, at one size."""
        if not self.axes:
            return engines
        axes, tables = self.axes[size], self.tables[size]
        return {name: engine.at(engine.signature.at(axes), tables) for name, engine in engines.items()}


def choose_sets(
    model: LoadedModel, settings: Sequence[Settings], plans: Sequence[Sequence[EnginePlan]], *, static: str | None
) -> EngineSets:
    """One set for all sizes if the graphs allow it, unless ``static`` says why not. ``settings`` and ``plans`` by size."""
    alone = {one.shape_bucket: some for one, some in zip(settings, plans, strict=True)}
    if len(alone) == 1:
        return EngineSets(alone)
    if static is not None:
        return EngineSets(alone, why_static=static)
    module = model.transformer if model.stored is None else model.stored.module
    try:
        shared = share_plans(plans, compare=has_values(module) and not is_large(module))
    except PassError as error:
        log.warning("one set of engines is built for each size: %s", error)
        return EngineSets(alone, why_static=str(error))
    sizes = [one.size for one in settings]
    bucket = settings[0].shape_bucket.replace(sizes[0], SEVERAL.join(sizes), 1)
    tables = [{name: _array(table) for name, table in some.items()} for some in shared.tables]
    return EngineSets({bucket: shared.plans}, dict(zip(sizes, shared.axes, strict=True)), dict(zip(sizes, tables, strict=True)))


def _array(table: torch.Tensor) -> Array:
    """In the host's memory; numpy has no bfloat16."""
    held = table.detach().cpu().contiguous()
    array: Array = (held.view(torch.uint16) if str(held.dtype) == f"torch.{BFLOAT16}" else held).numpy()
    return array
