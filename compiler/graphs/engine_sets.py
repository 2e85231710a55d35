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
from cachec.runtime.engine import Engine
from cachec.runtime.errors import PassError
from cachec.runtime.specs import BFLOAT16, Array
from cachec.runtime.variants import label_of_shapes, name_shapes
from cachec.runtime.write import Collector

log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class EngineSets:
    """What engines are built from, by shape bucket.

    Of engines for several sizes: how long the ``axes`` are and what is in the ``tables``, by the bucket of one size and length
    of texts. ``why_static``: why there are others for each, where there could be one set.
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
        files = {one: writer.add_tables(label_of_shapes(one), tables) for one, tables in self.tables.items() if tables}
        return {
            one: {"axes": dict(axes), **({"tables": files[one]} if one in files else {})} for one, axes in self.axes.items()
        }

    def place(self, bucket: str) -> int:
        """Which of the ``plans`` are for a bucket of one size and length of texts."""
        return list(self.plans).index(bucket) if bucket in self.plans else 0

    def at(self, bucket: str, engines: Mapping[str, Engine]) -> Mapping[str, Engine]:
        """Loaded engines, at one size and length of texts."""
        if not self.axes:
            return engines
        axes, tables = self.axes[bucket], self.tables[bucket]
        return {name: engine.at(engine.signature.at(axes), tables) for name, engine in engines.items()}


def choose_sets(
    model: LoadedModel, settings: Sequence[Settings], plans: Sequence[Sequence[EnginePlan]], *, static: str | None
) -> EngineSets:
    """One set for all sizes if the graphs allow it, unless ``static`` says why not.

    ``settings`` and ``plans`` by size and length of texts.
    """
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
    sizes, texts = dict.fromkeys(one.size for one in settings), sorted({one.text_tokens for one in settings})
    tables = [{name: _array(table) for name, table in some.items()} for some in shared.tables]
    bucket, by_bucket = name_shapes(list(sizes), texts), dict(zip(alone, tables, strict=True))
    return EngineSets({bucket: shared.plans}, dict(zip(alone, shared.axes, strict=True)), by_bucket)


def _array(table: torch.Tensor) -> Array:
    """In the host's memory; numpy has no bfloat16."""
    held = table.detach().cpu().contiguous()
    array: Array = (held.view(torch.uint16) if str(held.dtype) == f"torch.{BFLOAT16}" else held).numpy()
    return array
