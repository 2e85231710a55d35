"""One request in a fresh process, as a user's script makes it: ``python -m bench.cold_child`` with a JSON object on stdin.

Nothing is imported before it is needed: what an import costs is part of what is measured. Prints a JSON object: seconds since
the parent started this process, by mark, and the peak of resident memory.
"""

import json
import sys
import time
from collections.abc import Callable
from typing import Any

from bench.memory import peak_rss

NPZ_NOISE = "noise"
ABSENT = ("torch", "diffusers", "transformers", "accelerate", "onnx")  # in an environment of cachec[pictures] alone


class Marks:
    """Seconds since the process was started, by name."""

    def __init__(self, started: float) -> None:
        self._started = started
        self.seconds: dict[str, float] = {}

    def __call__(self, name: str) -> None:
        self.seconds[name] = time.time() - self._started


def run_bundle(task: dict[str, Any], mark: Marks) -> None:
    """Latents from a bundle, with conditions from a file: no text encoder, no VAE, and for ort no torch."""
    import cachec
    from cachec.engines import get_engine

    get_engine(task["backend"])
    mark("imported")
    import numpy as np

    with np.load(task["conditions"]) as file:
        conditions = {name: file[name] for name in file.files}
    noise = conditions.pop(NPZ_NOISE)
    with cachec.load(task["bundle"]) as bundle:
        bundle.session().run(conditions, noise)
    mark("latents")
    if task["backend"] == "ort" and "torch" in sys.modules:
        raise RuntimeError("torch was loaded: the ort runtime must not need it")


def run_bundle_pictures(task: dict[str, Any], mark: Marks) -> None:
    """A picture from a bundle alone, its text encoders and decoder included; for ort as if ``ABSENT`` were not installed."""
    if task["backend"] == "ort":
        _pretend_absent()
    import cachec
    from cachec.engines import get_engine

    get_engine(task["backend"])
    mark("imported")
    with cachec.load(task["bundle"]) as bundle:
        bundle.generate([task["prompt"]], seeds=[0])
    mark("picture")


def _pretend_absent() -> None:
    sys.modules.update(dict.fromkeys(ABSENT))  # None there: importing it fails


def run_command(task: dict[str, Any], mark: Marks) -> None:
    """``cachec run`` to a file, as if ``ABSENT`` were not installed."""
    _pretend_absent()
    from cachec.cli import main

    mark("imported")
    main(["run", *task["arguments"]], standalone_mode=False)
    mark("written")


def run_diffusers(task: dict[str, Any], mark: Marks) -> None:
    """A ``FluxPipeline`` with one of the caches, or compiled."""
    import torch
    from diffusers import FluxPipeline

    if task["peer"].startswith("cache-dit"):
        import cache_dit  # noqa: F401
    mark("imported")
    pipe = FluxPipeline.from_pretrained(task["directory"]) if "prompt" in task else _bare_pipeline(task["directory"])
    pipe.set_progress_bar_config(disable=True)
    PEERS[task["peer"]](pipe, task)
    latents = pipe(
        **_text(task),
        num_inference_steps=task["steps"],
        guidance_scale=task["guidance"],
        height=task["height"],
        width=task["width"],
        max_sequence_length=task["text_tokens"],
        generator=torch.Generator().manual_seed(0),
        output_type="latent",
    ).images
    mark("latents")
    if "prompt" not in task:
        return
    with torch.no_grad():
        unpacked = pipe._unpack_latents(latents, task["height"], task["width"], pipe.vae_scale_factor)
        scaled = unpacked / pipe.vae.config.scaling_factor + pipe.vae.config.shift_factor
        pipe.image_processor.postprocess(pipe.vae.decode(scaled, return_dict=False)[0], output_type="np")
    mark("picture")


def _text(task: dict[str, Any]) -> dict[str, Any]:
    if "prompt" in task:
        return {"prompt": task["prompt"]}
    import numpy as np
    import torch

    with np.load(task["conditions"]) as file:
        states, pooled = (torch.from_numpy(file[name]) for name in ("encoder_hidden_states", "pooled_projections"))
    return {"prompt_embeds": states, "pooled_prompt_embeds": pooled}


def _bare_pipeline(directory: str) -> Any:
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel

    absent = dict.fromkeys(("vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"))
    transformer = FluxTransformer2DModel.from_pretrained(directory, local_files_only=True)
    return FluxPipeline(FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True), transformer=transformer, **absent)


def _no_cache(pipe: Any, task: dict[str, Any]) -> None:
    """The pipeline as it is."""


def _compile(pipe: Any, task: dict[str, Any]) -> None:
    pipe.transformer.compile(dynamic=False)


def _taylorseer(pipe: Any, task: dict[str, Any]) -> None:
    from diffusers import TaylorSeerCacheConfig

    pipe.transformer.enable_cache(TaylorSeerCacheConfig(use_lite_mode=task["peer"].endswith("lite")))


def _first_block(pipe: Any, task: dict[str, Any]) -> None:
    from diffusers import FirstBlockCacheConfig

    pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=float(task["peer"].split()[-1])))


def _cache_dit(pipe: Any, task: dict[str, Any]) -> None:
    import cache_dit

    config = cache_dit.DBCacheConfig(
        Fn_compute_blocks=1,
        Bn_compute_blocks=0,
        num_inference_steps=task["steps"],
        steps_computation_mask=[int(step in task["compute"]) for step in range(task["steps"])],
        steps_computation_policy="static",
    )
    calibrator = cache_dit.TaylorSeerCalibratorConfig(taylorseer_order=1)
    cache_dit.enable_cache(pipe.transformer, cache_config=config, calibrator_config=calibrator)


PEERS: dict[str, Callable[[Any, dict[str, Any]], None]] = {
    "diffusers": _no_cache,
    "diffusers TaylorSeer": _taylorseer,
    "diffusers TaylorSeer lite": _taylorseer,
    "diffusers FirstBlockCache 0.05": _first_block,
    "cache-dit F1B0 TaylorSeer 1": _cache_dit,
    "torch.compile": _compile,
}
TASKS = {
    "bundle": run_bundle,
    "bundle pictures": run_bundle_pictures,
    "command": run_command,
    "diffusers": run_diffusers,
}


def main() -> None:
    task = json.load(sys.stdin)
    mark = Marks(task["started"])
    mark("interpreter")
    TASKS[task["kind"]](task, mark)
    print(json.dumps({"seconds": mark.seconds, "peak_rss": peak_rss()}))  # the last line: the command prints, too


if __name__ == "__main__":
    main()
