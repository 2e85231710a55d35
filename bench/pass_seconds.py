"""How long the passes take on a graph as deep as FLUX.1-dev's: ``python -m bench.pass_seconds``.

19 double and 38 single blocks, so the graph has the 7,000 nodes of the real one. Widths are small: the passes do not depend
on them, but for weights that are concatenated or cast. Prints one JSON object: ``nodes`` captured, ``seconds`` by stage and by
pass, ``nodes_after`` by graph. Seconds are of this process's CPU time, so that a busy machine does not matter much.
"""

import json
import time
from collections.abc import Callable
from typing import Any

import torch
from diffusers import FluxTransformer2DModel

from cachec.compiler.graphs.capture import capture_model
from cachec.compiler.graphs.export import plan_engines
from cachec.compiler.graphs.prepare import engine, linear
from cachec.passes import canonical_passes, cast_passes, run_passes, split_passes
from cachec.passes.base import Pass, PassResult
from cachec.runtime.abi import MODEL
from cachec.runtime.model_io import ModelIO

DOUBLE, SINGLE = 19, 38  # blocks of FLUX.1-dev
HEADS, HEAD_SIZE, CHANNELS, TEXT = 2, 16, 4, 32
IMAGE_TOKENS, TEXT_TOKENS, STEPS = 16, 8, 50
IO = ModelIO("hidden_states", "timestep", ("encoder_hidden_states", "pooled_projections", "guidance"))


def measure() -> dict[str, Any]:
    """Seconds and nodes."""
    model, inputs, constants = _deep_flux()
    seconds: dict[str, float] = {}
    watch = _Watch(seconds)
    with torch.no_grad():
        captured = _timed(seconds, "capture", lambda: capture_model(model, inputs, constants))
        watch.start()
        lists = [canonical_passes(), cast_passes(torch.bfloat16), split_passes(f"single_transformer_blocks.{SINGLE - 1}")]
        graphs = run_passes(captured, lists, observers=[watch])
        graphs = engine(linear(graphs, [watch]), IO, [watch])
        _timed(seconds, "engine plans", lambda: plan_engines(graphs, inputs, IO.latents, STEPS))
    passes = {name: value for name, value in seconds.items() if name not in ("capture", "engine plans")}
    return {
        "nodes": len(captured.modules[MODEL].graph.nodes),
        "nodes_after": {name: len(module.graph.nodes) for name, module in graphs.modules.items()},
        "seconds": {name: round(value, 2) for name, value in seconds.items()},
        "seconds_of_all_passes": round(sum(passes.values()), 2),
    }


def _timed(seconds: dict[str, float], name: str, run: Callable[[], Any]) -> Any:
    start = time.process_time()
    result = run()
    seconds[name] = time.process_time() - start
    return result


class _Watch:
    """An observer that adds the time since the last pass to the pass that ended."""

    def __init__(self, seconds: dict[str, float]) -> None:
        self._seconds, self._last = seconds, 0.0

    def start(self) -> None:
        self._last = time.process_time()

    def __call__(self, index: int, one: Pass, result: PassResult) -> None:
        now = time.process_time()
        self._seconds[one.name] = self._seconds.get(one.name, 0.0) + now - self._last
        self._last = now


def _deep_flux() -> tuple[torch.nn.Module, dict[str, torch.Tensor], dict[str, Any]]:
    model = FluxTransformer2DModel(
        in_channels=CHANNELS,
        num_layers=DOUBLE,
        num_single_layers=SINGLE,
        attention_head_dim=HEAD_SIZE,
        num_attention_heads=HEADS,
        joint_attention_dim=TEXT,
        pooled_projection_dim=TEXT,
        guidance_embeds=True,
        axes_dims_rope=(4, 6, 6),
    ).eval()
    inputs = {
        "hidden_states": torch.randn(2, IMAGE_TOKENS, CHANNELS),
        "timestep": torch.rand(2),
        "encoder_hidden_states": torch.randn(2, TEXT_TOKENS, TEXT),
        "pooled_projections": torch.randn(2, TEXT),
        "guidance": torch.full((2,), 3.5),
    }
    ids = {"img_ids": torch.zeros(IMAGE_TOKENS, 3), "txt_ids": torch.zeros(TEXT_TOKENS, 3)}
    return model, inputs, {**ids, "return_dict": False}


if __name__ == "__main__":
    torch.manual_seed(0)
    print(json.dumps(measure(), indent=2))
