"""What the manifest of a compiled bundle says."""

import importlib.metadata
from collections.abc import Mapping, Sequence
from typing import Any

from cachec.compiler.methods.parameters import Parameters
from cachec.compiler.models.base import LoadedModel
from cachec.compiler.request import Request
from cachec.runtime.bundle import Manifest, Target
from cachec.runtime.noise import GENERATOR
from cachec.runtime.variants import Variant
from cachec.runtime.version import VERSION
from cachec.runtime.write import BundleWriter

OWN_TYPE = "their own type"  # of slots


def make_manifest(
    model: LoadedModel,
    request: Request,
    writer: BundleWriter,
    targets: Sequence[Target],
    programs: Mapping[str, Mapping[str, str]],
    parameters: Parameters | None,
    timing: Mapping[str, str],
    facts: Mapping[str, Any],
    more: Sequence[Variant] = (),
) -> Manifest:
    """The manifest of what ``writer`` collected. ``programs``: files by level; ``facts``: what was measured and counted.

    ``more``: of the request's other sizes and numbers of steps.
    """
    method = request.method
    return Manifest(
        model={
            "name": model.spec.name,
            "source": model.spec.portable_source,
            "weights_sha256": model.weights_hash,
            **({"credit": model.spec.credit} if model.spec.credit else {}),
            **({"plain_sha256": model.plain_hash, "loras": [dict(one) for one in model.loras]} if model.loras else {}),
        },
        io=model.io.to_json(),
        method={
            "name": method.name,
            "options": method.options_of(parameters),
            "cut": method.cut,
            "feeds_back": getattr(method, "feeds_back", False),
            "short_history": "repeat the oldest entry",
            "fold": "static" if request.folds else "none",
            "hoist": request.wish.graph.hoist,
            "slots": request.wish.graph.slots or OWN_TYPE,
            "velocities": request.wish.graph.velocities,
            "predictor": dict(parameters.facts) if parameters else None,
        },
        settings={
            **varying_settings(request),
            "seed": request.wish.fit.seed,
            "block": request.settings.cut or model.block,
            "sampler": model.sampler,
            "prompts": model.spec.prompts,
        },
        noise=GENERATOR,
        targets=tuple(targets),
        programs=programs,
        files=writer.files,
        timing=timing,
        facts={
            "made_by": f"cachec {VERSION}",
            "torch": importlib.metadata.version("torch"),
            **facts,
        },
        more=tuple(more),
    )


def varying_settings(request: Request) -> dict[str, Any]:
    """Those that may differ by size and number of steps."""
    return {**vars(request.settings), "interval": request.interval}
