"""Features through an invertible network, where some channels are easy to repeat, some to continue by lines or parabolas.

Citation:
    "LinCa", arXiv 2608.17973, ECCV 2026; network, orders and Hermite polynomials are those of the released code (QHR69/LinCa,
    Apache-2.0), whose weights for FLUX.1-dev, Qwen-Image and Qwen-Image-Edit can be imported.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from cachec.compiler.methods.base import CodedMethod, TrainingData
from cachec.compiler.methods.hicache import hermite_rows
from cachec.compiler.methods.parameters import Parameters
from cachec.compiler.methods.released import Released, check_names, read_tensors
from cachec.compiler.models.base import Settings
from cachec.compiler.tables.coefficients import ForecastTable
from cachec.compiler.tables.schedule import Schedule
from cachec.runtime.errors import InputError, PredictorError, unknown_name
from cachec.runtime.specs import Array

if TYPE_CHECKING:
    from cachec.compiler.graphs.coding import Coding

SIGMA = 0.71
SPLIT, SEGMENTS = "split", "segments"  # facts: channels of order 0, 1 and 2; lengths of the segments in steps


@dataclass(frozen=True)
class LinCa(CodedMethod):
    """Orders 0, 1 and 2 in three parts of the channels of z = Phi(F); warm-up 3 steps, 3 slots, hidden cut.

    Phi is ``blocks`` blocks: a square matrix over the channels, then a coupling of their halves, a += s F(b), b += s G(a), with
    MLPs of width ``hidden``. Shares ``linear`` and ``curved`` of the channels, the last ones, are continued by Hermite
    polynomials (sigma 0.71, as FreqCa) of order 1 and 2 over the last three computed steps, the others repeated; the feature
    is Phi^-1 of that. The run has ``segments`` with a Phi each: a computed feature is kept in the codes of all of them, so a
    slot is as many features, and a forecast runs all inverses, of which one counts. Trained on uncached runs (``updates`` by
    AdamW at ``rate``) over random intervals from 3 to 12. Exact on constants, whatever Phi is. What is not linear cannot be
    folded: a product with D^2 weights for each block and segment stays in every forecast.
    """

    name: ClassVar[str] = "linca"
    summary: ClassVar[str] = "an invertible network before and behind extrapolation of three orders (LinCa)"
    needs_training: ClassVar[bool] = True
    released: ClassVar[str | None] = (
        "QHRQQQ/LinCa on the Hub: FLUX.1-dev, Qwen-Image and Qwen-Image-Edit, a file for each segment"
    )
    default_interval: ClassVar[int] = 6
    min_budget: ClassVar[int] = 3
    blocks: int = 1
    hidden: int = 128
    segments: int = 3
    linear: float = 0.125
    curved: float = 0.125
    updates: int = 2000
    rate: float = 1e-3

    def __post_init__(self) -> None:
        for name in ("blocks", "hidden", "segments", "updates"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if not (self.linear >= 0 and self.curved >= 0 and self.linear + self.curved <= 1):
            raise InputError(
                f"linear is {self.linear} and curved {self.curved}; they are shares of the channels, together up to 1"
            )
        if not self.rate > 0:
            raise InputError(f"rate is {self.rate}; it must be more than 0")

    def check_channels(self, channels: int) -> None:
        self.split(channels)

    def split(self, channels: int) -> tuple[int, int, int]:
        """Channels of order 0, 1 and 2.

        Raises:
            InputError: one of them has none, or the channels have no halves.
        """
        first, second = round(self.linear * channels), round(self.curved * channels)
        parts = (channels - first - second, first, second)
        if channels % 2 or min(parts) < 1:
            raise InputError(f"{channels} channels cannot be parted into {parts} and into halves: change linear and curved")
        return parts

    def fit(self, data: TrainingData) -> tuple[dict[str, Array], dict[str, str]]:
        from cachec.compiler.methods.linca_training import train_linca

        return train_linca(data, self)

    def table(self, schedule: Schedule, sigmas: Array, parameters: Parameters | None) -> ForecastTable:
        lengths = _numbers(parameters, SEGMENTS)
        if sum(lengths) != schedule.num_steps:
            raise PredictorError(f"linca has segments of {lengths} steps, and the schedule has {schedule.num_steps}")
        orders = [hermite_rows(schedule, order, SIGMA, warmup=0) for order in range(3)]
        ends = np.cumsum(lengths)
        active = [(np.arange(schedule.num_steps) >= end - n) & (np.arange(schedule.num_steps) < end)
                  for n, end in zip(lengths, ends, strict=True)]  # fmt: skip
        rows = [np.where(of_segment[:, None], row, 0.0) for of_segment in active for row in orders]
        gates = [] if len(lengths) == 1 else [np.where(of_segment[:, None], orders[0], 0.0) for of_segment in active]
        return ForecastTable.of_rows(schedule, *rows, *gates)

    def coding(self, feature: tuple[int, ...], settings: Settings, parameters: Parameters | None) -> "Coding":
        from cachec.compiler.methods.linca_net import invertible_coding, net_of

        split, lengths = _numbers(parameters, SPLIT), _numbers(parameters, SEGMENTS)
        assert parameters is not None, "it has facts"
        if sum(split) != feature[-1]:
            raise PredictorError(f"linca's channels {split} are not the {feature[-1]} of a feature: train it for this model")
        try:
            nets = [net_of(_of_segment(parameters.arrays, number)) for number in range(len(lengths))]
        except (RuntimeError, LookupError, ValueError) as error:
            raise PredictorError(f"{parameters.origin} does not hold networks of LinCa: {error}") from error
        return invertible_coding(nets, split)

    @classmethod
    def read_released(cls, paths: Sequence[Path], options: Mapping[str, str]) -> Released:
        """A file of ``LearnedDecompositionPredictor`` for each segment, in order.

        ``split`` is the released configuration's ``split_dims``, as 2304,384,384; ``segments`` the lengths, as 17,17,16.
        """
        from cachec.compiler.methods.linca_net import shapes_of

        for name in options:
            if name not in (SPLIT, SEGMENTS):
                raise unknown_name("option of import linca", name, (SPLIT, SEGMENTS))
        split, lengths = (_given(options, name) for name in (SPLIT, SEGMENTS))
        if len(split) != 3 or len(lengths) != len(paths):
            raise InputError(
                f"{len(paths)} files are given for segments {lengths} with channels {split}: one each, of three orders"
            )
        found, license_text = dict[str, Array](), "Apache-2.0"
        for number, path in enumerate(paths):
            arrays, metadata = read_tensors(path)
            license_text = metadata.get("license", license_text)
            arrays = {name: value for name, value in arrays.items() if not name.endswith(".weight_inv")}
            blocks = max(1, len({n.split(".")[2] for n in arrays if n.startswith("net.blocks.")}))
            hidden = arrays.get("net.blocks.0.revnet.F.0.bias", np.zeros(1)).size
            check_names(path, arrays, shapes_of(sum(split), blocks, hidden))
            found |= {f"segment{number}.{name}": value for name, value in arrays.items()}
        facts = {"steps": str(sum(lengths)), SPLIT: json.dumps(split), SEGMENTS: json.dumps(lengths)}
        return Released(found, facts, license_text)


def _of_segment(arrays: Mapping[str, Array], number: int) -> dict[str, Array]:
    prefix = f"segment{number}."
    return {name.removeprefix(prefix): value for name, value in arrays.items() if name.startswith(prefix)}


def _numbers(parameters: Parameters | None, name: str) -> list[int]:
    if parameters is None or name not in parameters.facts:
        raise PredictorError("linca needs a trained network: run cachec train or import, or let cachec compile train one")
    numbers: list[int] = json.loads(parameters.facts[name])
    return numbers


def _given(options: Mapping[str, str], name: str) -> list[int]:
    parts = options.get(name, "").split(",")
    if not all(part.strip().isdigit() and int(part) > 0 for part in parts):
        raise InputError(f"import linca needs --set {name}=N,N,N of whole numbers, got {options.get(name, 'nothing')}")
    return [int(part) for part in parts]
