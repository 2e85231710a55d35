"""The competing caches on the same ``FluxTransformer2DModel``, for side-by-side timing: ``python -m bench.peers``.

A ``Recipe`` is one peer's way to put its cache on a transformer; ``make_peers`` gives each recipe a copy of the transformer of
its own (the weights are shared, hooks do not leak) and a number of steps. ``Peer.run`` is diffusers' denoise loop for given
conditions and noise, from a clean cache, and says which steps *really* ran every block: hooks in the blocks report it, not the
peer's settings. ``count_flops`` says what the other steps cost. As a program: all peers on tiny-flux, with these figures.

What is known about each (diffusers 0.42.1, cache-dit 1.5.3):

diffusers TaylorSeer (arXiv 2503.06923)
    caches the attention modules' outputs only: MLPs, norms and modulation run in all steps. Its lite mode skips whole blocks
    and forecasts ``proj_out``'s output. Factors are bfloat16 unless told otherwise.
diffusers FirstBlockCache
    always runs block 0 and reuses the residual of all others; one decision for the whole batch, from its mean.
cache-dit (DBCache, static steps mask, TaylorSeer calibrator)
    runs the first ``Fn`` blocks in all steps (at least 1; its default is 8) and forecasts the residual of the rest. Steps 0
    to 2 give its Taylor series no slope (``current_step > 1``, counted from -1): it reuses until a later step is computed.

Everything is where the transformer is, and in its precision: CPU or CUDA, float32 or bfloat16.

Shapes: ``B`` batch, ``T`` steps, ``N`` image tokens, ``L`` text tokens, ``C`` latent channels.
"""

import copy
import importlib
import itertools
import os
import statistics
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from typing import Any, Literal

import click
import numpy as np
import torch
from diffusers import (
    FirstBlockCacheConfig,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    TaylorSeerCacheConfig,
)
from diffusers.pipelines.flux.pipeline_flux import calculate_shift
from torch import nn
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from cachec.compiler.calibration.prompts import default_prompts
from cachec.compiler.models import find_model, load_model
from cachec.compiler.models.base import LoadedModel, Settings, tensors_from
from cachec.compiler.tables.sampling import Sampling
from cachec.compiler.tables.schedule import Schedule, interval_for_budget
from cachec.runtime.errors import InputError, MissingExtraError
from cachec.runtime.noise import make_noise
from cachec.runtime.specs import Array

FLUX_SHIFT = (256, 4096, 0.5, 1.15)  # FLUX.1-dev's scheduler: tokens and mu at both ends of a line
FIRST_BLOCK_THRESHOLDS = (0.05, 0.1)  # the first is diffusers' default
CACHE_DIT_FIRST_BLOCKS = (1, 8)  # the least it takes, and its default
RECOMPILES = 1024  # dynamo's limit is 8: hooks of the ninth module would run uncompiled, with a warning only
CPU_ATTENTION = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu  # FlopCounterMode does not know it

Request = tuple[dict[str, torch.Tensor], torch.Tensor]
"""Conditions (``encoder_hidden_states`` [B, L, D], ``pooled_projections`` [B, P], ``guidance`` [B]) and noise [B, N, C]."""


@dataclass(frozen=True, eq=False)
class Subject:
    """What all peers run: a bare transformer, what depends on the resolution only, and the sampler's grid.

    ``sampling`` takes a number of steps and gives ``sigmas`` [T + 1] and ``timesteps`` [T], as the transformer takes them.
    """

    transformer: FluxTransformer2DModel
    constants: Mapping[str, Any]
    sampling: Callable[[int], tuple[Array, Array]]

    @property
    def device(self) -> torch.device:
        return next(self.transformer.parameters()).device

    def __post_init__(self) -> None:
        for name, module in self.transformer.named_modules():
            if "forward" in vars(module) or module._forward_hooks or module._forward_pre_hooks:
                raise InputError(f"module {name or 'transformer'} carries hooks already: pass a transformer without caches")


def open_subject(model: LoadedModel, settings: Settings) -> Subject:
    """A loaded model as subject; ``settings.steps`` is not used."""
    return Subject(model.transformer, model.constants(settings), lambda steps: model.sampling(replace(settings, steps=steps)))


def bare_subject(transformer: FluxTransformer2DModel, *, rows: int, columns: int, text_tokens: int) -> Subject:
    """A transformer without a pipeline, say with random weights, on FLUX.1-dev's grid for ``rows x columns`` image tokens."""
    device = next(transformer.parameters()).device
    ids = FluxPipeline._prepare_latent_image_ids(1, rows, columns, device, torch.float32)
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)

    def sampling(steps: int) -> Sampling:
        scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps), mu=calculate_shift(rows * columns, *FLUX_SHIFT))
        return Sampling(scheduler.sigmas.numpy(), (scheduler.timesteps / 1000).numpy())

    constants = {"img_ids": ids, "txt_ids": torch.zeros(text_tokens, 3, device=device), "return_dict": False}
    return Subject(transformer.eval(), constants, sampling)


@dataclass(frozen=True)
class Recipe:
    """How one peer puts its cache on a transformer, in place, and how it forgets a request; ``about`` are its settings."""

    name: str
    about: str
    apply: Callable[[FluxTransformer2DModel], object]
    reset: Callable[[FluxTransformer2DModel], object]


@dataclass(frozen=True, eq=False)
class Run:
    """Latents [B, N, C] and the steps in which the attention of every block was executed."""

    latents: torch.Tensor
    computed: tuple[int, ...]


class _Flag:
    """Set by a hook. Only ever written under ``torch.compile``: reading it there would be a guard, and recompile."""

    executed = False

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self.executed = True


@dataclass(frozen=True, eq=False)
class Peer:
    """A transformer with its cache on, for one number of steps. ``call`` is it, or its compiled form."""

    name: str
    about: str
    compiled: bool
    transformer: FluxTransformer2DModel
    call: Callable[..., tuple[torch.Tensor]]
    reset: Callable[[FluxTransformer2DModel], object]
    constants: Mapping[str, Any]
    sigmas: torch.Tensor
    timesteps: torch.Tensor
    flags: tuple[_Flag, ...]

    @property
    def num_steps(self) -> int:
        return len(self.timesteps)

    def run(self, conditions: Mapping[str, torch.Tensor], noise: torch.Tensor) -> Run:
        """One request: noise [B, N, C] to latents [B, N, C], as the pipeline's loop does it."""
        latents, computed = noise, []
        for step, (later, ran) in enumerate(self.steps(conditions, noise)):
            latents = later
            if ran:
                computed.append(step)
        return Run(latents, tuple(computed))

    @torch.no_grad()
    def steps(self, conditions: Mapping[str, torch.Tensor], noise: torch.Tensor) -> Iterator[tuple[torch.Tensor, bool]]:
        """Latents [B, N, C] after each step, and whether every block was executed in it."""
        self.reset(self.transformer)
        latents = noise
        for step in range(self.num_steps):
            for flag in self.flags:
                flag.executed = False
            timestep = self.timesteps[step].expand(len(latents)).to(latents.dtype)
            with self.transformer.cache_context("cond"):  # as FluxPipeline does; diffusers' caches raise without
                inputs = {"hidden_states": latents, "timestep": timestep, **conditions, **self.constants}
                velocity = self.call(**inputs)[0]
            moved = latents.float() + (self.sigmas[step + 1] - self.sigmas[step]) * velocity  # as the scheduler does it
            latents = moved.to(latents.dtype)
            yield latents, all(flag.executed for flag in self.flags)


@dataclass(frozen=True)
class Peers:
    """Peers by name, and why the others are missing."""

    peers: dict[str, Peer]
    skipped: dict[str, str]


def make_peers(subject: Subject, *, num_steps: int, compute: Sequence[int], compiled: bool = False) -> Peers:
    """All peers for ``num_steps``. ``compute`` goes to those that can be told their steps; the others follow their own rule.

    The uncached transformer is there under ``torch.compile`` too; with ``compiled`` so is each cache.
    """
    recipes = [plain(), taylorseer(), taylorseer(use_lite_mode=True)]
    recipes += [first_block_cache(threshold) for threshold in FIRST_BLOCK_THRESHOLDS]
    skipped = {}
    for first_blocks in CACHE_DIT_FIRST_BLOCKS:
        try:
            recipes.append(cache_dit(Schedule(num_steps, tuple(compute)), subject.transformer, first_blocks=first_blocks))
        except (MissingExtraError, InputError) as error:
            skipped[f"cache-dit F{first_blocks}B0"] = str(error)
    peers = [make_peer(recipe, subject, num_steps=num_steps) for recipe in recipes]
    compiles = recipes if compiled else recipes[:1]
    if (reason := why_no_compiler(subject.device)) is None:
        peers += [make_peer(recipe, subject, num_steps=num_steps, compiled=True) for recipe in compiles]
    else:
        skipped |= {_compiled_name(recipe): reason for recipe in compiles}
    return Peers({peer.name: peer for peer in peers}, skipped)


def make_peer(recipe: Recipe, subject: Subject, *, num_steps: int, compiled: bool | Literal["blocks"] = False) -> Peer:
    """One peer on its own copy of the transformer.

    ``compiled``: the whole transformer, in the first run of each batch size; or its ``blocks`` only, each kind once, as
    diffusers advises for large models (``compile_repeated_blocks``), without a cache. dynamo's recompile limits are raised
    for the process, as cache-dit advises. Inductor's settings are the caller's: with ``TORCHINDUCTOR_FREEZING=1`` and
    ``TORCHINDUCTOR_CPP_WRAPPER=1`` in the environment the uncached transformer is faster, but TaylorSeer compiles for minutes.

    Raises:
        InputError: a cache is to be compiled block by block.
    """
    if compiled == "blocks" and recipe.name != plain().name:
        raise InputError(f"{recipe.name} is not compiled block by block: what it skips could not be seen")
    transformer = _copy_sharing_weights(subject.transformer)
    flags = () if compiled == "blocks" else _watch_blocks(transformer)  # with hooks, each block would be compiled anew
    recipe.apply(transformer)
    call: Callable[..., tuple[torch.Tensor]] = transformer
    if compiled:
        _raise_recompile_limits()
    if compiled == "blocks":
        transformer.compile_repeated_blocks(dynamic=False)
    elif compiled:
        call = torch.compile(transformer, dynamic=False)
    sigmas, timesteps = grid(subject, num_steps)
    return Peer(
        name=_compiled_name(recipe, blocks=compiled == "blocks") if compiled else recipe.name,
        about=recipe.about,
        compiled=bool(compiled),
        transformer=transformer,
        call=call,
        reset=recipe.reset,
        constants=subject.constants,
        sigmas=sigmas,
        timesteps=timesteps,
        flags=flags,
    )


def grid(subject: Subject, num_steps: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The sampler's ``sigmas`` [T + 1] and ``timesteps`` [T] on the subject's device, float32."""
    own = subject.sampling(num_steps)
    sigmas, timesteps = (torch.from_numpy(np.array(array)).to(subject.device) for array in (own.sigmas, own.timesteps))
    return sigmas, timesteps


def plain() -> Recipe:
    """No cache. With ``num_steps=K`` also the peer of every cache that computes K steps."""
    return Recipe("diffusers", "no cache", lambda _: None, _reset_diffusers)


def taylorseer(**options: Any) -> Recipe:
    """Diffusers' TaylorSeer; ``options`` as ``TaylorSeerCacheConfig`` takes them.

    Its own rule: steps 0, 1, 2, then ``(step - 4) % cache_interval == 0``; by default 13 of 50.
    """
    config = TaylorSeerCacheConfig(**options)
    parts = ["diffusers TaylorSeer", *(["lite"] if config.use_lite_mode else [])]
    parts += [] if config.taylor_factors_dtype is torch.bfloat16 else [str(config.taylor_factors_dtype).split(".")[1]]
    parts += [] if config.cache_interval == TaylorSeerCacheConfig().cache_interval else [f"interval {config.cache_interval}"]
    return Recipe(" ".join(parts), str(config), lambda transformer: transformer.enable_cache(config), _reset_diffusers)


def first_block_cache(threshold: float) -> Recipe:
    """Diffusers' FirstBlockCache: a step is skipped where block 0's residual moved by less than ``threshold`` of its size."""
    config = FirstBlockCacheConfig(threshold=threshold)
    name = f"diffusers FirstBlockCache {threshold:g}"
    return Recipe(name, str(config), lambda transformer: transformer.enable_cache(config), _reset_diffusers)


def cache_dit(
    schedule: Schedule, transformer: FluxTransformer2DModel, *, first_blocks: int = 1, last_blocks: int = 0, order: int = 1
) -> Recipe:
    """cache-dit's DBCache with a static steps mask and its TaylorSeer calibrator.

    The policy ``static`` makes the mask decide alone: warm-up ends with the mask's first 0, thresholds and limits are not
    looked at (``CachedContextManager.can_cache``).

    Raises:
        MissingExtraError: cache-dit is not installed, or cannot be imported here.
        InputError: ``first_blocks`` and ``last_blocks`` leave no block to skip.
    """
    num_blocks = len(_blocks(transformer))
    if first_blocks + last_blocks >= num_blocks:
        raise InputError(f"F{first_blocks}B{last_blocks} runs all {num_blocks} blocks of this model in every step")
    library = _import_cache_dit()
    mask = [int(step in schedule.compute) for step in range(schedule.num_steps)]
    # num_inference_steps is needed for its statistics; it forgets a request one step late by it, hence refresh_context
    config = library.DBCacheConfig(
        Fn_compute_blocks=first_blocks,
        Bn_compute_blocks=last_blocks,
        num_inference_steps=schedule.num_steps,
        steps_computation_mask=mask,
        steps_computation_policy="static",
    )
    calibrator = library.TaylorSeerCalibratorConfig(taylorseer_order=order)

    def apply(transformer: FluxTransformer2DModel) -> None:
        library.enable_cache(transformer, cache_config=copy.deepcopy(config), calibrator_config=copy.deepcopy(calibrator))

    name = f"cache-dit F{first_blocks}B{last_blocks} TaylorSeer {order}"
    return Recipe(name, f"{config.strify()} {calibrator.strify()}", apply, library.refresh_context)


def count_flops(peer: Peer, conditions: Mapping[str, torch.Tensor], noise: torch.Tensor) -> tuple[int, ...]:
    """FLOPs of matrix products and attention in each step [T], as dispatched: for accounting, not while timing.

    Raises:
        InputError: the peer is compiled; the counter does not see into its kernels.
    """
    if peer.compiled:
        raise InputError(f"{peer.name} is compiled, its FLOPs cannot be counted: count those of its uncompiled form")

    def attention(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
        return sdpa_flop_count(query, key, value)

    steps, counts = peer.steps(conditions, noise), []
    for _ in range(peer.num_steps):
        with FlopCounterMode(display=False, custom_mapping={CPU_ATTENTION: attention}) as counter:
            next(steps)
        counts.append(counter.get_total_flops())
    return tuple(counts)


def check_clean(peer: Peer, requests: Sequence[Request]) -> None:
    """Raise ``RuntimeError`` if the first request's latents or steps depend on the requests between."""
    first = peer.run(*requests[0])
    for request in requests[1:]:
        peer.run(*request)
    again = peer.run(*requests[0])
    if first.computed != again.computed or not torch.equal(first.latents, again.latents):
        distance = (first.latents - again.latents).abs().max().item()
        raise RuntimeError(f"{peer.name} carries state from one request to the next: latents differ by up to {distance:.2g}")


def _blocks(transformer: FluxTransformer2DModel) -> list[nn.Module]:
    return [*transformer.transformer_blocks, *transformer.single_transformer_blocks]


def _watch_blocks(transformer: FluxTransformer2DModel) -> tuple[_Flag, ...]:
    """Hooks where caches cannot fake a call: a skipped block or attention is still called, its first linear is not."""
    flags = []
    for block in _blocks(transformer):
        flag = _Flag()
        block.attn.to_q.register_forward_hook(flag)
        flags.append(flag)
    return tuple(flags)


def _copy_sharing_weights(transformer: FluxTransformer2DModel) -> FluxTransformer2DModel:
    shared = {id(tensor): tensor for tensor in itertools.chain(transformer.parameters(), transformer.buffers())}
    copied: FluxTransformer2DModel = copy.deepcopy(transformer, shared)
    return copied


def _reset_diffusers(transformer: FluxTransformer2DModel) -> None:
    transformer._reset_stateful_cache()  # what pipelines call after each request (maybe_free_model_hooks)


def _import_cache_dit() -> Any:
    if find_spec("cache_dit") is None:
        raise MissingExtraError("cache-dit is not installed: pip install --no-deps cache-dit")
    os.environ.setdefault("CACHE_DIT_LOG_LEVEL", "ERROR")  # it prints to stdout; read once, when it is imported
    try:
        return importlib.import_module("cache_dit")
    except ImportError as error:
        raise MissingExtraError(f"cache-dit cannot be imported here: {error}") from error


def _compiled_name(recipe: Recipe, *, blocks: bool = False) -> str:
    if blocks:
        return "torch.compile, block by block"
    return "torch.compile" if recipe.name == plain().name else f"{recipe.name} + torch.compile"


def _raise_recompile_limits() -> None:
    """As cache-dit's ``set_compile_configs`` does; global, and never lowered."""
    config = importlib.import_module("torch._dynamo.config")
    config.recompile_limit = max(config.recompile_limit, RECOMPILES)
    config.accumulated_recompile_limit = max(config.accumulated_recompile_limit, 8 * RECOMPILES)


def why_no_compiler(device: torch.device) -> str | None:
    """Why Inductor cannot compile for the device here; ``None`` if it can, as far as can be seen."""
    if device.type == "cuda":
        return None if find_spec("triton") else "Inductor needs triton, which is not installed"
    builder = importlib.import_module("torch._inductor.cpp_builder")
    failure = importlib.import_module("torch._inductor.exc").InvalidCxxCompiler
    try:
        builder.get_cpp_compiler()
    except failure as error:
        return f"Inductor finds no C++ compiler: {error}"
    return None


def synchronize(device: torch.device) -> None:
    """Wait until the device has done all that was started."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def time_runs(peer: Peer, request: Request, *, repeats: int) -> float:
    """Median seconds of a request; the peer must have run before."""
    seconds = []
    for _ in range(repeats):
        synchronize(request[1].device)
        start = time.perf_counter()
        peer.run(*request)
        synchronize(request[1].device)
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def make_requests(model: LoadedModel, settings: Settings, prompts: Sequence[str]) -> list[Request]:
    """Requests of batch 1; seeds count from 0."""
    example = model.example_inputs(settings, batch=1)[model.io.latents]
    encoded = [tensors_from(model.encode([prompt], settings, model.io.conditions)) for prompt in prompts]
    noises = [torch.from_numpy(make_noise(seed, tuple(example.shape[1:])))[None] for seed in range(len(prompts))]
    return list(zip(encoded, noises, strict=True))


@click.command()
@click.option("--steps", default=50, show_default=True)
@click.option("--budget", default=8, show_default=True, help="Computed steps of the peers that can be told theirs.")
@click.option("--prompts", default=2, show_default=True)
@click.option("--repeats", default=3, show_default=True)
@click.option("--compiled", is_flag=True, help="Every cache under torch.compile too.")
def main(steps: int, budget: int, prompts: int, repeats: int, compiled: bool) -> None:
    from cachec.compiler.calibration.metrics import psnr_db  # brings scikit-image, which only this program needs

    warnings.filterwarnings("ignore")
    spec = find_model("tiny-flux")
    model = load_model(spec)
    settings = Settings(spec.height, spec.width, spec.text_tokens, spec.guidance, steps, "float32")
    requests = make_requests(model, settings, default_prompts("avatars", "eval")[:prompts])
    subject = open_subject(model, settings)
    made = make_peers(subject, num_steps=steps, compute=interval_for_budget(steps, budget).compute, compiled=compiled)
    peers = [*made.peers.values(), replace(make_peer(plain(), subject, num_steps=budget), name=f"diffusers, {budget} steps")]
    reference = made.peers["diffusers"]
    uncached = [reference.run(*request).latents for request in requests]
    pipeline = [torch.from_numpy(model.generate(*_arrays(request), settings)) for request in requests]
    gap = max((a - b).abs().max().item() for a, b in zip(uncached, pipeline, strict=True))
    print(f"largest difference between the loop here and FluxPipeline's own: {gap:.2g}; {torch.get_num_threads()} threads")
    flops = sum(count_flops(reference, *requests[0]))
    for peer in peers:
        check_clean(peer, requests)
        runs = [peer.run(*request) for request in requests]
        shown = [model.decode(run.latents.numpy(), settings)[0] for run in runs]
        wanted = [model.decode(latents.numpy(), settings)[0] for latents in uncached]
        psnr = " ".join(f"{psnr_db(a, b):6.2f}" for a, b in zip(shown, wanted, strict=True))
        share = "" if peer.compiled else f"{sum(count_flops(peer, *requests[0])) / flops:4.0%}"
        seconds = time_runs(peer, requests[0], repeats=repeats)
        print(f"{peer.name:56s} {seconds:6.3f} s  flops {share:4s}  {psnr} dB  {peer.about}")
        for run in runs:
            print(f"{'':57s}computed {len(run.computed)}: {' '.join(map(str, run.computed))}", flush=True)
    for name, reason in made.skipped.items():
        print(f"{name:56s} skipped: {reason}")


def _arrays(request: Request) -> tuple[dict[str, Array], Array]:
    conditions, noise = request
    return {name: value.numpy() for name, value in conditions.items()}, noise.numpy()


if __name__ == "__main__":
    main()
