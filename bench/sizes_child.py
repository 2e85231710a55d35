"""One row of ``bench/sizes.py`` in a process of its own: ``python -m bench.sizes_child TASK.json``; prints a JSON object.

A task is ``{"do": "compile", "model": DIR, "out": BUNDLE, "options": {…}}``, which compiles, or ``{"do": "compare", …}``,
which plays one computed step of the bundle on ONNX Runtime and compares its velocity with the module's own, or
``{"do": "play", …}``, which makes one request with the bundle's default level.
"""

import json
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bench.memory import peak_rss


def compile_task(task: Mapping[str, Any]) -> dict[str, Any]:
    """Compile; seconds by stage, nodes and bytes."""
    start = time.perf_counter()
    from cachec.compiler.commands.compile import compile_to_bundle

    out, done = compile_to_bundle(task["model"], Path(task["out"]), force=True, **task["options"])
    facts = done.bundle.manifest.facts
    return {
        "seconds": time.perf_counter() - start,
        "stages": {name: round(seconds, 1) for name, seconds in done.seconds.items()},
        "bundle_bytes": sum(path.stat().st_size for path in out.rglob("*") if path.is_file()),
        "weight_bytes": facts["memory"]["weights"],
        "origin": done.predictor_origin,
    }


def compare_task(task: Mapping[str, Any]) -> dict[str, Any]:
    """The relative L2 distance of the compute engine's velocity from the module's, for one sample at the first step."""
    import numpy as np
    import torch

    import cachec
    from cachec.compiler.calibration.engine_evaluator import EngineEvaluator
    from cachec.compiler.models import find_model, load_model
    from cachec.compiler.models.base import settings_of

    model = load_model(find_model(task["model"]))
    with cachec.load(task["out"]) as bundle:
        settings, io = settings_of(bundle.manifest), bundle.io
        inputs = model.example_inputs(settings, batch=1)
        told = model.sampling(settings).timesteps[0]
        conditions = {name: inputs[name].numpy() for name in io.conditions}
        evaluator = EngineEvaluator(bundle.engines, io)
        start = time.perf_counter()
        velocity, _ = evaluator.evaluate(inputs[io.latents].numpy(), told, conditions)
        seconds = time.perf_counter() - start
    with torch.no_grad():
        given = {**inputs, io.timestep: torch.tensor([told])}
        wanted = model.transformer(**given, **model.constants(settings))[0].float().numpy()
    return {"step_seconds": seconds, "relative_error": float(np.linalg.norm(velocity - wanted) / np.linalg.norm(wanted))}


def play_task(task: Mapping[str, Any]) -> dict[str, Any]:
    """Seconds of one request, and the root mean square of its latents, which must be finite."""
    import numpy as np

    import cachec
    from cachec.compiler.models import find_model, load_model
    from cachec.compiler.models.base import settings_of

    model = load_model(find_model(task["model"]))
    with cachec.load(task["out"]) as bundle:
        inputs = model.example_inputs(settings_of(bundle.manifest), batch=1)
        conditions = {name: inputs[name].numpy() for name in bundle.io.conditions}
        session = bundle.session()
        start = time.perf_counter()
        latents = session.run(conditions, inputs[bundle.io.latents].numpy())
        seconds = time.perf_counter() - start
    size = float(np.sqrt(np.mean(np.square(latents))))
    if not np.isfinite(size):
        raise ValueError("the latents of this bundle are not finite")
    return {"seconds": seconds, "rms": size, "level": session.program.key.level}


def main() -> None:
    """Read the task, do it, print what came of it."""
    task = json.loads(Path(sys.argv[1]).read_text())
    result = {"compile": compile_task, "compare": compare_task, "play": play_task}[task["do"]](task)
    print(json.dumps({**result, "peak_rss": peak_rss()}))


if __name__ == "__main__":
    main()
