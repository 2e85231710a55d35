"""What a compilation, its calibration and its engines will take, and what can be won: read off graphs, before anything runs.

Shapes and counts are facts, seconds are floors: a GPU at its published peak, which no program reaches.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from torch import fx

from cachec.compiler.calibration.statistics import CalibrationCost, calibration_cost
from cachec.compiler.calibration.uses import NUM_RUN
from cachec.compiler.graphs.costs import memory_facts, output_bytes, parameter_counts, run_costs, step_value_bytes
from cachec.compiler.models.base import ModelSpec, Settings
from cachec.compiler.planning.gpus import GpuFigures, find_measured
from cachec.engines.tensorrt import build_memory, plan_bytes
from cachec.passes import Graphs
from cachec.passes.base import outputs
from cachec.runtime.abi import COMPUTE, FEATURE, FORECAST, VELOCITY
from cachec.runtime.program import Cut
from cachec.runtime.room import in_bytes, scaled
from cachec.runtime.specs import itemsize

DECODER = "vae"  # the part that turns latents into pictures
COMPILE_MEMORY = 1.7e9  # bytes, whatever the model's size: weights are streamed. FLUX.1-dev took 1.61e9; bench/SIZES.md


@dataclass(frozen=True)
class Estimate:
    """Sizes are bytes, ``nodes`` by graph, ``parameters`` by part: ``hoisted`` are of others, ``predictor``'s not the model's.

    ``branches``: 2 where guidance has a negative one. ``computed`` and ``forecast`` are FLOPs of one step of the whole model,
    nothing hoisted, as others count them. They, ``feature`` and ``velocity`` (what a slot of the hidden and of the output cut
    holds) and ``activations`` are of one sample. ``work``: what is computed, in computed steps. ``step_values``: what the
    prologue leaves for a request. ``others``: weights of text encoders and decoder, where known. ``calibration``: of the usual
    prompts, without a fine reference.
    """

    spec: ModelSpec
    settings: Settings
    budget: int
    work: float
    batch: int
    branches: int
    nodes: Mapping[str, int]
    parameters: Mapping[str, int]
    weights: int
    activations: int
    step_values: int
    feature: int
    velocity: int
    computed: int
    forecast: int
    calibration: CalibrationCost
    others: Mapping[str, int] = field(default_factory=dict)

    @property
    def cuts(self) -> tuple[Cut, ...]:
        """That the method may have, the cheaper one last: blocks of its own forecast behind the hidden one alone."""
        return ("hidden",) if self.parameters["predictor"] else ("hidden", "output")

    @property
    def rows(self) -> int:
        """That the model runs on: of each sample one, or one for each branch of guidance."""
        return self.batch * self.branches

    @property
    def model_flops(self) -> int:
        """Of a request with all steps computed."""
        return self.rows * self.settings.steps * self.computed

    def run_flops(self, cut: str) -> float:
        """Of a request with ``budget`` steps computed. On the output cut a forecast is a sum of a few latents."""
        forecast = self.forecast if cut == "hidden" else 0
        return self.rows * (self.work * self.computed + (self.settings.steps - self.budget) * forecast)

    def slots(self, cut: str) -> int:
        """Bytes if every computed step is kept: most methods keep fewer. What blocks forecast from is the newest one's."""
        kept = 1 if cut == "hidden" and self.parameters["predictor"] else self.budget
        return kept * (self.rows * self.feature if cut == "hidden" else self.batch * self.velocity)

    def gpu_memory(self, cut: str) -> int:
        """Bytes of the transformer at work, without text encoders and VAE."""
        return self.weights + self.slots(cut) + self.rows * self.activations + self.step_values

    @property
    def whole_request(self) -> tuple[int, int]:
        """Bytes from prompt to picture, beside activations of text encoders and decoder: all kept; each for its phase."""
        decoder = self.others.get(DECODER, 0)
        texts = sum(self.others.values()) - decoder
        return self.needed + texts + decoder, max(self.needed, texts, decoder)

    @property
    def build_memory(self) -> float:
        """Bytes of the host that a build of TensorRT takes at most."""
        return build_memory(self.weights)

    @property
    def build_disk(self) -> float:
        """Bytes of TensorRT's engines at most."""
        return plan_bytes(self.weights)

    @property
    def total(self) -> int:
        """Parameters of the model."""
        return self.parameters["body"] + self.parameters["tail"]

    @property
    def needed(self) -> int:
        """Bytes of GPU memory, on either cut."""
        return max(map(self.gpu_memory, self.cuts))

    @property
    def short(self) -> str:
        """In one line."""
        return (
            f"{in_count(self.total)} parameters, {in_bytes(self.weights)}; a computed step is {in_flops(self.computed)}; with "
            f"{self.budget} of {self.settings.steps} computed at best {self.ratio(self.cuts[-1]):.2f} times fewer FLOPs; "
            f"at work {in_bytes(self.needed)} of memory; compiling takes {in_bytes(COMPILE_MEMORY)} of memory and "
            f"{in_bytes(self.weights)} of disk"
        )

    def ratio(self, cut: str) -> float:
        """How many times fewer FLOPs a request takes than one with all steps computed."""
        return self.model_flops / self.run_flops(cut)

    def on(self, gpu: GpuFigures) -> dict[str, Any]:
        """On one GPU, in seconds: what its peak allows at best; whether the transformer fits; what others measured."""
        settings = self.settings
        measured = find_measured(self.spec.source, settings.height, settings.width, gpu.name)
        return {
            "step": self.rows * self.computed / gpu.peak,
            "request": self.run_flops(self.cuts[-1]) / gpu.peak,
            "all_computed": self.model_flops / gpu.peak,
            "fits": self.needed <= gpu.memory,
            "measured": None if measured is None else asdict(measured),
            "source": gpu.source,
        }

    def to_json(self, gpus: tuple[GpuFigures, ...]) -> dict[str, Any]:
        """Everything, with names and in units that do not change: bytes, FLOPs, seconds."""
        cuts = {
            cut: {
                "slots": self.slots(cut),
                "flops": self.run_flops(cut),
                "ratio_of_flops": self.ratio(cut),
            }
            for cut in self.cuts
        }
        names = (
            "budget",
            "work",
            "batch",
            "branches",
            "nodes",
            "parameters",
            "weights",
            "activations",
            "step_values",
            "feature",
            "velocity",
        )
        return {
            "model": self.spec.source,
            "settings": asdict(self.settings),
            **{name: getattr(self, name) for name in names},
            "step_flops": {"computed": self.computed, "forecast": self.forecast},
            "cuts": cuts,
            "gpu_memory": self.needed,
            "others": dict(self.others),
            "whole_request": dict(zip(("kept", "by_phase"), self.whole_request, strict=True)),
            "floor": {gpu.name: self.on(gpu) for gpu in gpus},
            "compile": {"memory": COMPILE_MEMORY, "disk": self.weights},
            "calibration": {"prompts": NUM_RUN, **asdict(self.calibration)},
            "tensorrt_build": {"memory": self.build_memory, "disk": self.build_disk},
        }


def estimate(
    plain: Graphs,
    engine: Graphs,
    spec: ModelSpec,
    settings: Settings,
    *,
    budget: int,
    batch: int,
    branches: int = 1,
    work: float | None = None,
    others: Mapping[str, int] | None = None,
) -> Estimate:
    """Read it off the graphs as the passes leave them, ``plain``, and as engines are built from them.

    ``work``: in computed steps, if it is less than that of ``budget`` whole ones. ``others``: parameters of other parts.
    Without a forecast graph, as on the output cut, what concerns one is 0.
    """
    results = outputs(plain.modules[COMPUTE])
    memory = memory_facts(engine)
    return Estimate(
        spec=spec,
        settings=settings,
        budget=budget,
        work=budget if work is None else work,
        batch=batch,
        branches=branches,
        nodes={name: len(module.graph.nodes) for name, module in engine.modules.items()},
        parameters=parameter_counts(plain, engine),
        weights=memory["weights"],
        activations=memory["activations"],
        step_values=batch * branches * step_value_bytes(engine, budget),
        feature=output_bytes(results[FEATURE]),
        velocity=output_bytes(results[VELOCITY]),
        computed=run_costs(plain.modules[COMPUTE])[1],
        forecast=run_costs(plain.modules[FORECAST])[1] if FORECAST in plain.modules else 0,
        calibration=calibration_cost(_one(results[VELOCITY]), _one(results[FEATURE]), settings, NUM_RUN, 0),
        others={name: count * itemsize(settings.dtype) for name, count in (others or {}).items()},
    )


def _one(result: fx.Node) -> tuple[int, ...]:
    """Shape of one sample of it."""
    return tuple(map(int, result.meta["val"].shape[1:]))


def in_flops(count: float) -> str:
    """As people write it."""
    return f"{scaled(count)}FLOP"


def in_count(count: int) -> str:
    """As people write it."""
    return f"{count / 1e9:.2f} billion" if count >= 1e9 else f"{count / 1e6:.2f} million"
