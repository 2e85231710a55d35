"""Calls of one ONNX file in a fresh process: reads a task from standard input, prints ``{"ms": …}``.

The task: ``file``, its ``signature``, ``threads``, and the ``seconds`` to go on for. Neither torch nor onnx is imported.
"""

import json
import statistics
import sys
import time
from pathlib import Path

import numpy as np

from cachec.engines.ort import OrtEngine
from cachec.runtime.engine import LoadOptions
from cachec.runtime.specs import Signature

WARM_UP = 5  # calls
LEAST = 5


def main() -> None:
    task = json.load(sys.stdin)
    signature = Signature.from_json(task["signature"])
    engines = OrtEngine.load({"step": Path(task["file"])}, {"step": signature}, LoadOptions(threads=task["threads"]))
    rng = np.random.default_rng(0)
    with engines["step"] as engine:
        buffers = [
            {
                spec.name: rng.random([size if isinstance(size, int) else 1 for size in spec.shape]).astype(spec.dtype)
                for spec in side
            }
            for side in (signature.inputs, signature.outputs)
        ]
        call = engine.context().bind(*buffers)
        for _ in range(WARM_UP):
            call.run()
        spent: list[float] = []
        while len(spent) < LEAST or sum(spent) < task["seconds"]:
            start = time.perf_counter()
            call.run()
            spent.append(time.perf_counter() - start)
    if strange := {"torch", "onnx"} & sys.modules.keys():
        raise RuntimeError(f"{', '.join(strange)} was loaded: its threads would take part")
    print(json.dumps({"ms": 1e3 * statistics.median(spent), "calls": len(spent)}))


if __name__ == "__main__":
    main()
