"""What every family must do, on its small random pipeline, saved and loaded from disk like a real one.

Everything is compared with the untouched pipeline of diffusers: in its own loop, with its own scheduler and guidance. Caches
are played there by hooks on the last block, which is what a Program's forecasts are to equal.

``B`` batch, ``T`` steps.
"""

import itertools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

import cachec
from cachec.compiler.calibration.calibration import open_calibration
from cachec.compiler.calibration.graph_evaluator import GraphEvaluator
from cachec.compiler.calibration.runs import Subject, recording_here
from cachec.compiler.calibration.statistics import record_statistics
from cachec.compiler.calibration.uses import UsedPrompts
from cachec.compiler.graphs.prepare import prepare
from cachec.compiler.graphs.weights import Values
from cachec.compiler.methods import get_method
from cachec.compiler.models import find_model, load_model
from cachec.compiler.models.base import LoadedModel, Settings
from cachec.compiler.pipeline import Compilation, compile_bundle
from cachec.compiler.request import make_request
from cachec.compiler.tables.lower import lower
from cachec.compiler.tables.schedule import Schedule
from cachec.runtime.abi import COMPUTE, FEATURE, VELOCITY, negative_name
from cachec.runtime.bundle import Bundle
from cachec.runtime.errors import InputError
from cachec.runtime.noise import make_noise
from cachec.runtime.program import UNCACHED, Program, ProgramKey, hash_sigmas
from cachec.runtime.session import LoadedBundle, Session
from cachec.runtime.specs import Array
from tests.families import Family

STEPS, COMPUTED = 6, (0, 1, 4)
VALUES = 1.5  # of 255, between pictures that are the same to rounding
EXACT, SAME, DIFFERENT = 1e-5, 1e-4, 1e-3  # of the graph; of latents that are to be equal; of those that are not
PROMPTS, NEGATIVE = ("a large blue ring", "a small red cross"), "blurred"
SIZES: Mapping[str, tuple[tuple[int, int], ...]] = {  # height, width
    "dit": ((64, 64),),
    "qwen-image-edit": ((128, 192),),
    "wan-2.2-5b": ((64, 96), (64, 64)),
}
USUAL_SIZES = ((32, 48), (64, 32))  # of other numbers of tokens
TEXT_TOKENS = {
    "dit": 1,
    "z-image": 32,
    "hunyuan-video-1.5": 64,
    "flux-2": 96,
    "flux-2-klein": 48,
    "qwen-image-edit": 96,
    "wan-i2v": 512,  # where CLIP sees the picture, diffusers' attention takes no other number
}
WITHOUT_NEGATIVES = ("dit", "flux-2-klein")  # their pipelines' negative branch is of nothing
VIDEOS = ("hunyuan-video", "hunyuan-video-1.5", "wan-2.1", "wan-2.2", "wan-2.2-5b", "wan-i2v")
REQUESTS = {"dit": ("7", "8")}
FITTED = 8  # prompts to fit on


@dataclass(frozen=True)
class Found:
    """A check: what it measured, in words; ``passed`` ``None``: it does not apply."""

    passed: bool | None
    said: str


class Case:
    """A family's pipeline in ``directory``, loaded as users load it, and what is compiled from it."""

    def __init__(self, family: Family, directory: Path, work: Path) -> None:
        self.family, self.directory, self.work = family, directory, work
        self.sizes = SIZES.get(family.name, USUAL_SIZES)
        self.why_alone: str | None = None

    @cached_property
    def model(self) -> LoadedModel:
        model = load_model(find_model(str(self.directory)))
        for name, stand_in in self.family.stand_ins(self.directory).items():
            setattr(model.pipeline, name, stand_in)
        return model

    @cached_property
    def prompts(self) -> tuple[str, ...]:
        """Two, as the family takes them."""
        return self._taken(REQUESTS.get(self.family.name, PROMPTS))

    @cached_property
    def fitted_prompts(self) -> tuple[str, ...]:
        """Others, to fit on."""
        classes = self.family.name in REQUESTS
        return self._taken([str(number) if classes else f"{number} green houses" for number in range(20, 20 + FITTED)])

    def _taken(self, prompts: Sequence[str]) -> tuple[str, ...]:
        """As the family takes them: edits begin with a picture."""
        if "image" not in self.family.call:
            return tuple(prompts)
        self.family.call["image"].save(picture := self.work / "picture.png")
        return tuple(f"[{picture}] {prompt}" for prompt in prompts)

    def settings(self, size: tuple[int, int]) -> Settings:
        frames = 5 if self.family.name in VIDEOS else 1
        tokens = TEXT_TOKENS.get(self.family.name, 24)
        return Settings(*size, text_tokens=tokens, guidance=3.0, steps=STEPS, dtype="float32", frames=frames)

    def compile(
        self, name: str, sizes: Sequence[tuple[int, int]], target: str, dtype: str, components: str = "transformer"
    ) -> Compilation:
        """A bundle of these sizes, by a method of the cut that the family has."""
        first, method = self.settings(sizes[0]), {"method": "taylor", "options": {"order": "1"}}
        request = make_request(
            self.model.spec,
            **(method if self.model.expert is None else {"method": "adams"}),
            schedule=",".join(map(str, COMPUTED)),
            steps=str(STEPS),
            size=",".join(map(self.size_text, sizes)),
            text_tokens=first.text_tokens,
            guidance=first.guidance,
            dtype=dtype,
            targets=(target,),
            components=components,
        )
        return compile_bundle(self.model, request, self.work / name, force=True)

    def size_text(self, size: tuple[int, int]) -> str:
        """As the command line has it."""
        settings = self.settings(size)
        return f"{settings.width}x{settings.height}" + (f"x{settings.frames}" if settings.frames > 1 else "")

    @cached_property
    def bundle(self) -> Path:
        """All sizes in one bundle, ONNX Runtime; with text encoders and decoder, where that can be (``why_alone``)."""
        name = "bundle.cachec"
        try:
            self.compile(name, self.sizes, "ort", "float32", "all")
        except InputError as error:
            if not str(error).startswith("--components all"):
                raise
            self.why_alone = str(error).partition(". Compile with")[0]
            self.compile(name, self.sizes, "ort", "float32")
        return self.work / name

    @contextmanager
    def loaded(self, size: tuple[int, int]) -> Iterator[LoadedBundle]:
        with cachec.load(self.bundle, size=self.size_text(size)) as bundle:
            yield bundle

    def given(self, size: tuple[int, int]) -> tuple[dict[str, Array], Array]:
        """Conditions of two requests, both branches' where there are two, and noise."""
        settings, model = self.settings(size), self.model
        prompts, takes = self.prompts, self.family.name not in WITHOUT_NEGATIVES
        negatives = [NEGATIVE, ""] if model.is_guided(settings) and takes else None
        conditions = model.encode(prompts, settings, model.conditions(settings), negatives)
        shape = model.example_inputs(settings)[model.io.latents].shape[1:]
        return conditions, np.random.default_rng(0).standard_normal((len(prompts), *shape)).astype(np.float32)

    def key(self, size: tuple[int, int]) -> ProgramKey:
        settings, model = self.settings(size), self.model
        sigmas = model.sampling(settings).sigmas
        return ProgramKey(STEPS, hash_sigmas(sigmas), settings.sizes, guided=model.is_guided(settings))

    def programs(self, size: tuple[int, int]) -> dict[str, Program]:
        """Half-computed Programs of the families' own samplers: features reused and extrapolated, and one of the output cut."""
        model, key = self.model, self.key(size)
        sampling, schedule = model.sampling(self.settings(size)), Schedule(STEPS, COMPUTED)
        methods = {
            "reuse": get_method("reuse")(),
            "taylor": get_method("taylor")(order=1),
            "adams": get_method("adams")(order=2),
        }
        return {
            name: lower(method.table(schedule, sampling.levels(method.cut), None), key, sampling)
            for name, method in methods.items()
            if model.expert is None or method.cut == "output"
        }

    def fitted(self, evaluator: GraphEvaluator, size: tuple[int, int]) -> Program:
        """gram's, fitted to runs of other prompts."""
        subject = Subject.of(self.model, self.settings(size))
        prompts = UsedPrompts(self.fitted_prompts, ("fit",) * FITTED)
        runs = record_statistics(subject, recording_here(subject, evaluator), prompts, reference_steps=0, seed=0, work=None)
        calibration, schedule, method = (
            open_calibration(runs, subject, evaluator),
            Schedule(STEPS, COMPUTED),
            get_method("gram")(),
        )
        sampling = subject.own_sampling
        table = method.table(schedule, sampling.levels(method.cut), method.calibrate(calibration, schedule))
        return lower(table, self.key(size), sampling)


def check_capture(case: Case) -> Found:
    """The compute graph is the transformer, on what the pipeline hands over."""
    model, settings, start = case.model, case.settings(case.sizes[0]), time.perf_counter()
    graphs = prepare(model, settings)
    seconds = time.perf_counter() - start
    compute = Values(torch.device("cpu")).module(graphs.modules[COMPUTE])
    inputs, io = model.example_inputs(settings, batch=3), model.io
    given = model.observed(settings, batch=3).first  # type: ignore[attr-defined]
    with torch.no_grad():
        found = compute(**inputs)[VELOCITY]
        wanted = model.transformer(**{**given, io.timestep: inputs[io.timestep], "return_dict": False})[0]
    if isinstance(wanted, torch.Tensor):
        wanted = wanted.narrow(io.axis, 0, found.shape[io.axis])
    else:  # a list of samples
        wanted = model.state({io.latents: wanted})
    error = float((found - wanted).abs().max() / wanted.abs().max())
    return Found(error <= EXACT, f"{error:.0e}, {seconds:.0f} s")


def check_uncached(case: Case) -> Found:
    """ONNX Runtime, every step computed, at every size: the untouched pipeline's latents."""
    errors = []
    for size in case.sizes:
        conditions, noise = case.given(size)
        wanted = case.model.generate(conditions, noise, case.settings(size))
        with case.loaded(size) as bundle:
            got = bundle.session(batch=len(noise), level="uncached").run(conditions, noise)
        errors.append(_apart(got, wanted))
    return Found(max(errors) <= SAME, f"{max(errors):.0e} at {len(errors)} size{'s' * (len(errors) > 1)}")


def check_forecasts(case: Case) -> Found:
    """Half computed, at every size: what the pipeline's own loop gives with the same cache by hooks, not the uncached run."""
    same, other = [], []
    for size in case.sizes:
        conditions, noise = case.given(size)
        settings, programs = case.settings(size), case.programs(size)
        with counting_calls(case.model) as calls:
            uncached = case.model.generate(conditions, noise, settings)
        with case.loaded(size) as bundle:
            evaluator = GraphEvaluator(prepare(case.model, settings), case.model.io)
            if size == case.sizes[0]:
                programs["gram"] = case.fitted(evaluator, size)
            for name in programs.keys() & {"reuse", "taylor"}:
                with cached_by_hooks(case.model, programs[name], calls_a_step=len(calls) // STEPS):
                    wanted = case.model.generate(conditions, noise, settings)
                got = Session(bundle.engines, programs[name], bundle.io, batch=len(noise)).run(conditions, noise)
                same.append(_apart(got, wanted))
                other.append(_apart(got, uncached))
            for name in programs.keys() & {"adams", "gram"}:
                wanted = evaluator.play(programs[name], noise, conditions)
                got = Session(bundle.engines, programs[name], bundle.io, batch=len(noise)).run(conditions, noise)
                same.append(_apart(got, wanted))
                other.append(_apart(got, uncached))
    return Found(max(same) <= SAME and min(other) > DIFFERENT, f"{max(same):.0e}, from uncached {min(other):.0e}")


def check_one_set(case: Case) -> Found:
    """One set of engines is for all sizes; how many of their axes are named, and how many tables are given by size."""
    bundle = Bundle.open(case.bundle)
    if len(bundle.manifest.sizes) == 1:
        return Found(None, "one size")
    if not bundle.manifest.shapes:
        return Found(False, bundle.manifest.facts["engines_for_each_size"])
    (own,) = bundle.at().manifest.shapes.values()
    return Found(True, f"{len(own['axes'])} axes, {len(bundle.at().tables())} tables")


def check_drop_in(case: Case) -> Found:
    """The unmodified pipeline with the bundle as its transformer, every step computed, at every size: its own latents."""
    errors, family = [], case.family
    for size in case.sizes:
        settings, pipeline = case.settings(size), family.load(case.directory)
        call: dict[str, Any] = {"height": size[0], "width": size[1], "num_inference_steps": STEPS}
        call |= {"num_frames": settings.frames} if settings.frames > 1 else {}
        call = {name: value for name, value in call.items() if name in family.call or name == "num_inference_steps"}
        if "image" in family.call:  # of the size that is drawn, as the bundle's
            call["image"] = family.call["image"].resize((size[1], size[0]))
        if "max_area" in family.call:  # else the pipeline takes another size of this area
            call["max_area"] = size[0] * size[1]
        wanted = family.run(pipeline, **call)
        with cachec.load(case.bundle) as bundle:
            for name in family.transformers:
                own = getattr(pipeline, name)
                setattr(pipeline, name, bundle.as_transformer(own, pipeline=pipeline, level="uncached"))
            got = family.run(pipeline, **call)
        errors.append(_apart(got.float().numpy(), wanted.float().numpy()))
    return Found(max(errors) <= SAME, f"{max(errors):.0e} at {len(errors)} size{'s' * (len(errors) > 1)}")


def check_rtx(case: Case) -> Found:
    """TensorRT for RTX builds engines in bfloat16; of FLUX for all sizes, from one set of ONNX files."""
    start = time.perf_counter()
    sizes = case.sizes if case.family.name == "flux" else case.sizes[:1]
    compiled = case.compile("rtx.cachec", sizes, "tensorrt-rtx", "bfloat16")
    built = [target for target in compiled.bundle.manifest.targets if target.backend == "tensorrt-rtx"]
    return Found(bool(built), f"{len(built[0].engines)} engines, {time.perf_counter() - start:.0f} s" if built else "none")


def check_pictures(case: Case) -> Found:
    """A bundle alone makes the pictures that the pipeline does, from prompts: of an uncached run, of a decoder's 256 values."""
    bundle, worst = case.bundle, 0.0
    if case.why_alone is not None:
        return Found(None, case.why_alone)
    for size in case.sizes:
        settings, (conditions, _) = case.settings(size), case.given(size)
        with case.loaded(size) as loaded:
            negatives = [NEGATIVE, ""] if negative_name(case.model.io.conditions[0]) in conditions else None
            given = {"negative_prompts": negatives} if case.family.name not in WITHOUT_NEGATIVES else {}
            made = loaded.generate(case.prompts, seeds=[0, 1], level=UNCACHED, **given)
            shape = loaded.session().latent_shape[1:]
        noise = np.stack([make_noise(seed, shape) for seed in (0, 1)])
        wanted = case.model.decode(case.model.generate(conditions, noise, settings), settings)
        worst = max(worst, float(np.abs(made - 255 * wanted).max()))
    return Found(worst <= VALUES, f"{worst:.2f} of 255; {bundle_parts(bundle)}")


def bundle_parts(bundle: Path) -> str:
    """Its components, in words."""
    return ", ".join(Bundle.read_manifest(bundle).components)


RTX = "RTX build"
CHECKS: Mapping[str, Callable[[Case], Found]] = {
    "captured, exact": check_capture,
    "ONNX Runtime, uncached": check_uncached,
    "half computed": check_forecasts,
    "symbolic sizes": check_one_set,
    "drop-in": check_drop_in,
    "alone": check_pictures,
    RTX: check_rtx,
}


@contextmanager
def counting_calls(model: LoadedModel) -> Iterator[list[None]]:
    """As many entries as there were calls of the transformer's last block."""
    calls: list[None] = []
    handle = _last_block(model).register_forward_hook(lambda *_: calls.append(None))
    try:
        yield calls
    finally:
        handle.remove()


@contextmanager
def cached_by_hooks(model: LoadedModel, program: Program, *, calls_a_step: int) -> Iterator[None]:
    """While it holds, calls of the transformer are cached as a Program of features says, by a hook on its last block.

    ``calls_a_step``: branches that are calls of their own are kept apart by their number in the step.
    """
    schedule, rows = program.compute_steps, _rows_over_steps(program)
    kept: dict[tuple[int, int], Any] = {}
    calls = itertools.count()

    def hook(_module: torch.nn.Module, _given: Any, output: Any) -> Any:
        step, branch = divmod(next(calls), calls_a_step)
        if step in schedule:
            kept[step, branch] = output
            return output
        weighted = [(float(rows[step, owner]), kept[owner, branch]) for owner in schedule if rows[step, owner]]
        parts = zip(*(value if isinstance(value, tuple) else (value,) for _, value in weighted), strict=True)
        made = tuple(
            None if some[0] is None else sum(weight * part for (weight, _), part in zip(weighted, some, strict=True))
            for some in parts
        )
        return made if isinstance(output, tuple) else made[0]

    handle = _last_block(model).register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def _last_block(model: LoadedModel) -> torch.nn.Module:
    return model.transformer.get_submodule(model.block)


def _rows_over_steps(program: Program) -> Array:
    """Weights [T, T] of forecasts over the steps that they weigh, instead of over slots."""
    rows, owner = np.zeros((program.num_steps, program.num_steps)), dict[int, int]()
    for one in program.instructions:
        for step in one.rows if FEATURE in one.reads else ():
            for slot in one.reads[FEATURE]:
                rows[step, owner[slot]] += program.coefficients[step, 0, slot]
        for slot in one.writes.get(FEATURE, ()):
            owner[slot] = one.steps[0]
    return rows


def _apart(got: Array, wanted: Array) -> float:
    return float(np.abs(got - wanted).max() / np.abs(wanted).max())
