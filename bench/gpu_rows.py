"""Cases and rows of ``bench.gpu_check``: a transformer with its inputs, and everything that can denoise with it."""

import gc
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel

from bench.peers import (
    FIRST_BLOCK_THRESHOLDS,
    Peer,
    cache_dit,
    first_block_cache,
    grid,
    make_peer,
    open_subject,
    plain,
    synchronize,
    taylorseer,
    why_no_compiler,
)
from cachec.compiler.graphs.build_engines import LooseSources, build_and_load
from cachec.compiler.graphs.export import plan_engines
from cachec.compiler.graphs.prepare import engine, linear, prepare
from cachec.compiler.methods import get_method
from cachec.compiler.models import find_model, load_model, wrap_pipeline
from cachec.compiler.models.base import LoadedModel, Settings
from cachec.compiler.tables.lower import lower, lower_uncached
from cachec.compiler.tables.schedule import Schedule, uniform_schedule
from cachec.engines import get_builder, get_engine
from cachec.engines.torch_device import TorchDevice
from cachec.runtime.build_options import BuildOptions
from cachec.runtime.device import DeviceName
from cachec.runtime.engine import Engine
from cachec.runtime.errors import InputError
from cachec.runtime.program import Program, ProgramKey, hash_sigmas
from cachec.runtime.session import Session
from cachec.runtime.sizes import size_ranges

METHODS = {"hidden": ("taylor", {"order": "1"}), "output": ("adams", {"order": "2"})}
FLUX = {"attention_head_dim": 128, "num_attention_heads": 24, "joint_attention_dim": 4096, "pooled_projection_dim": 768}
SMALL = {
    "attention_head_dim": 32,
    "num_attention_heads": 4,
    "joint_attention_dim": 64,
    "pooled_projection_dim": 32,
    "axes_dims_rope": (8, 12, 12),
}
USUALLY_COMPUTED = 10  # steps that engines with bounded sizes are tuned for
SMALL_PIXELS = 64  # at or below, the model is ``SMALL``


@dataclass(eq=False)
class Case:
    """What all rows run. Conditions and noise are in the transformer's precision, on its device."""

    name: str
    model: LoadedModel
    settings: Settings
    conditions: dict[str, torch.Tensor]
    noise: torch.Tensor
    facts: dict[str, Any]
    compiled: Peer | None = None  # compiles once for all numbers of steps

    @property
    def device(self) -> torch.device:
        return self.noise.device

    @torch.no_grad()
    def time_step(self) -> float:
        """Seconds of one eager step, the second of two."""
        inputs = {"hidden_states": self.noise, "timestep": torch.ones_like(self.noise[:, 0, 0]), **self.conditions}
        seconds = 0.0
        for _ in range(2):
            synchronize(self.device)
            start = time.perf_counter()
            self.model.transformer(**inputs, **self.model.constants(self.settings))
            synchronize(self.device)
            seconds = time.perf_counter() - start
        return seconds

    def close(self) -> None:
        """Let go of the weights."""
        self.model.pipeline, self.compiled = None, None
        torch.compiler.reset()  # what is compiled keeps its module
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()


@dataclass(eq=False)
class Engines:
    """Engines of one back end, and the seconds of building them from the transformer."""

    backend: str
    engines: Mapping[str, Engine]
    seconds: float
    stack: ExitStack

    def close(self) -> None:
        self.engines = {}
        self.stack.close()


@dataclass(eq=False)
class Row:
    """Something that makes latents. ``family``: rows with the same uncached run. ``session``: cachec's, if it has one."""

    name: str
    family: str
    run: Callable[[], torch.Tensor]
    computed: tuple[int, ...]
    latents: torch.Tensor
    first_seconds: float
    session: Session | None = None
    seconds: list[float] = field(default_factory=list)
    last: torch.Tensor | None = None  # of the last timed run, replayed where calls are recorded

    def warm_up(self) -> bool:
        """One more run, in which sessions are recorded."""
        self.run()
        return True

    def facts(self) -> dict[str, Any]:
        return {} if self.session is None else {"replayed_from_one_recording": self.session.recorded}


@dataclass(frozen=True)
class Maker:
    """A row that is yet to be made; making it compiles and warms up, and may fail."""

    name: str
    make: Callable[[], Row]


def open_tiny(device: torch.device, steps: int) -> Case:
    """tiny-flux in float32."""
    spec = find_model("tiny-flux")
    loaded = load_model(spec)
    loaded.transformer.to(device)
    model = wrap_pipeline(loaded.pipeline)  # as it is there, not as its files say
    return _case("tiny-flux", model, Settings(spec.height, spec.width, spec.text_tokens, spec.guidance, steps, "float32"), {})


def open_random(device: torch.device, blocks: tuple[int, int], pixels: int, steps: int) -> Case:
    """Random weights of FLUX.1-dev's shape in bfloat16, with so many double and single blocks."""
    small = pixels <= SMALL_PIXELS
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.bfloat16)
        with device:
            shape: dict[str, Any] = SMALL if small else FLUX
            transformer = FluxTransformer2DModel(
                num_layers=blocks[0], num_single_layers=blocks[1], guidance_embeds=True, **shape
            )
    finally:
        torch.set_default_dtype(before)
    transformer.to(device, torch.bfloat16).eval().requires_grad_(False)
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    parts = dict.fromkeys(("vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"))
    pipeline = FluxPipeline(scheduler=scheduler, transformer=transformer, **parts)
    pipeline.set_progress_bar_config(disable=True)
    settings = Settings(pixels, pixels, 8 if small else 512, 3.5, steps, "bfloat16")
    facts = {"blocks": list(blocks), "full_width": not small, "blocks_of_flux": [19, 38]}
    return _case(f"FLUX's shape, {blocks[0]} + {blocks[1]} blocks, {pixels} pixels", wrap_pipeline(pipeline), settings, facts)


def _case(name: str, model: LoadedModel, settings: Settings, facts: dict[str, Any]) -> Case:
    """A request of batch 1 from the model's example inputs."""
    dtype = getattr(torch, settings.dtype)
    inputs = {key: value.to(dtype) for key, value in model.example_inputs(settings, batch=1).items()}
    conditions = {key: inputs[key] for key in model.io.conditions}
    parameters = list(model.transformer.parameters())
    known = {
        "dtype": settings.dtype,
        "parameters": sum(parameter.numel() for parameter in parameters),
        "weight_bytes": sum(parameter.numel() * parameter.element_size() for parameter in parameters),
        "image_tokens": inputs[model.io.latents].shape[1],
        "text_tokens": settings.text_tokens,
        **facts,
    }
    return Case(name, model, settings, conditions, inputs[model.io.latents], known)


def build_engines(case: Case, backend: str) -> Engines:
    """Engines for both cuts: in memory for torch's own back ends, through files for the others."""
    start, kind, name = time.perf_counter(), get_engine(backend), DeviceName.parse(str(case.device))
    kind.check_target(name, case.settings.dtype)
    with torch.no_grad():
        split = prepare(case.model, case.settings)
        graphs = engine(linear(split), case.model.io)
        plans = plan_engines(graphs, case.model.example_inputs(case.settings), case.model.io.latents, case.settings.steps)
    with ExitStack() as stack:
        if backend in ("eager", "inductor"):
            device = TorchDevice(name)
            loaded = {plan.name: kind(graphs.modules[plan.name], plan.signature, device) for plan in plans}
        else:
            work = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="cachec-")))
            options = BuildOptions(sizes=size_ranges(case.settings.steps, USUALLY_COMPUTED))
            loaded = build_and_load(get_builder(backend), LooseSources(plans, work), work, name, options)
        engines = {key: stack.enter_context(engine) for key, engine in loaded.items()}
        return Engines(backend, engines, time.perf_counter() - start, stack.pop_all())


def peer_rows(case: Case, steps: int, budgets: Sequence[int], *, compiled: bool) -> Iterator[Maker]:
    """Diffusers eager and compiled, diffusers' own caches, and cache-dit for each number of computed steps."""
    subject = open_subject(case.model, case.settings)
    transformer = subject.transformer
    yield Maker("diffusers", lambda: _peer_row(case, make_peer(plain(), subject, num_steps=steps)))
    if compiled:
        name = "torch.compile, block by block"
        yield Maker(name, lambda: _peer_row(case, _compiled_peer(case, steps), family="torch.compile"))
    for recipe in (taylorseer(), first_block_cache(FIRST_BLOCK_THRESHOLDS[0])):
        yield Maker(recipe.name, lambda recipe=recipe: _peer_row(case, make_peer(recipe, subject, num_steps=steps)))
    for budget in budgets:
        schedule = _cache_dit_schedule(steps, budget)

        def make(schedule: Schedule = schedule, budget: int = budget) -> Row:
            row = _peer_row(case, make_peer(cache_dit(schedule, transformer), subject, num_steps=steps))
            row.name = f"{row.name}, {budget}"
            return row

        yield Maker(f"cache-dit, {budget}", make)


def _cache_dit_schedule(steps: int, budget: int) -> Schedule:
    """Evenly spread behind steps 0 to 2, which its Taylor series needs to begin."""
    first = min(3, budget - 1)
    rest = uniform_schedule(steps - first, budget - first).compute
    return Schedule(steps, (*range(first), *(first + step for step in rest)))


def _compiled_peer(case: Case, steps: int) -> Peer:
    if (reason := why_no_compiler(case.device)) is not None:
        raise InputError(reason)
    subject = open_subject(case.model, case.settings)
    if case.compiled is None:
        case.compiled = make_peer(plain(), subject, num_steps=steps, compiled="blocks")
    sigmas, timesteps = grid(subject, steps)
    return replace(case.compiled, sigmas=sigmas, timesteps=timesteps)


def _peer_row(case: Case, peer: Peer, family: str = "diffusers") -> Row:
    start = time.perf_counter()
    first = peer.run(case.conditions, case.noise)
    synchronize(case.device)
    seconds = time.perf_counter() - start
    run = lambda: peer.run(case.conditions, case.noise).latents  # noqa: E731
    return Row(peer.name, family, run, first.computed, first.latents.float().cpu(), seconds)


def cachec_rows(case: Case, built: Engines, steps: int, budgets: Sequence[int]) -> Iterator[Maker]:
    """The uncached run, and both cuts for each number of computed steps."""
    settings = replace(case.settings, steps=steps)
    sampling = case.model.sampling(settings)
    key = ProgramKey(steps, hash_sigmas(sampling.sigmas), settings.sizes)
    programs = {"uncached": lower_uncached(key, sampling)}
    for budget in budgets:
        for cut, (method, options) in METHODS.items():
            schedule = uniform_schedule(steps, budget)
            table = get_method(method).with_options(options).table(schedule, sampling.sigmas, None)
            programs[f"{cut} cut, {budget}"] = lower(table, key, sampling)
    for name, program in programs.items():
        label = f"cachec {built.backend}, {name}"
        yield Maker(label, lambda name=name, program=program: _cachec_row(case, built, name, program))


def _cachec_row(case: Case, built: Engines, name: str, program: Program) -> Row:
    session = Session(built.engines, program, case.model.io)
    wide = {key: value.float() for key, value in {**case.conditions, "": case.noise}.items()}  # engines take float32
    if not session.takes(wide[""]):
        wide = {key: value.cpu().numpy() for key, value in wide.items()}
    noise = wide.pop("")

    def run() -> torch.Tensor:
        return torch.from_numpy(session.run(wide, noise))

    start = time.perf_counter()
    latents = run()
    seconds = time.perf_counter() - start
    family = f"cachec {built.backend}"
    return Row(f"{family}, {name}", family, run, program.compute_steps, latents, seconds, session)


def measure(rows: Sequence[Row], case: Case, *, repeats: int, deadline: float) -> int:
    """Time the rows in turns. Returns the number of rounds."""
    for number in range(repeats):
        if number and time.monotonic() > deadline:
            return number
        for row in rows if number % 2 == 0 else reversed(rows):
            synchronize(case.device)
            start = time.perf_counter()
            row.last = row.run()
            synchronize(case.device)
            row.seconds.append(time.perf_counter() - start)
    return repeats
