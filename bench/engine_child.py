"""Engines of TensorRT for RTX in a fresh process: ``python -m bench.engine_child BUNDLE``. Prints a JSON object.

Neither torch nor onnx is imported: the peak of resident memory is the builder's.
"""

import json
import sys
import time
from pathlib import Path

from bench.memory import peak_rss
from cachec.engines.add_target import add_targets

BACKEND = "tensorrt-rtx"


def main() -> None:
    before, start = peak_rss(), time.perf_counter()
    bundle, (target,) = add_targets(Path(sys.argv[1]), [BACKEND], force=True)
    seconds, peak = time.perf_counter() - start, peak_rss()
    if strange := {"torch", "onnx"} & sys.modules.keys():
        raise RuntimeError(f"{', '.join(strange)} was loaded: add-target must not need it")
    sizes = {name: bundle.path(artifact.path).stat().st_size for name, artifact in target.engines.items()}
    print(json.dumps({"seconds": seconds, "before": before, "peak_rss": peak, "bytes": sizes, "version": target.version}))


if __name__ == "__main__":
    main()
