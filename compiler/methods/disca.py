"""DisCa: a few blocks of the model forecast from the current latents and the tokens of the newest computed step.

Citation:
    "DisCa: Accelerating Video Diffusion Transformers with Distillation-Compatible Learnable Feature Caching",
    arXiv 2602.05449, CVPR 2026; architecture and step lists of the released code (Tencent-Hunyuan/DisCa).

The head embeds the current latents and texts; of every token, its embedding h and its value c behind the last block at the
newest computed step are fused, W2 silu(W1 [h; c]); two blocks of the model's last kind and its own tail give the velocity.
HunyuanVideo 1.0 (single-stream blocks) fuses image and text by one pair of matrices, 1.5 (double-stream) by two.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, cast
from weakref import WeakKeyDictionary

from cachec.compiler.methods.base import BlockData, BlockMethod
from cachec.compiler.methods.parameters import Parameters
from cachec.compiler.methods.released import Released, check_names, one_file, read_tensors
from cachec.compiler.models.base import LoadedModel
from cachec.compiler.models.hunyuan_video_released import NUM_BLOCKS, released_shapes, renamed
from cachec.compiler.tables.published import PUBLISHED
from cachec.compiler.tables.schedule import Schedule, interval_schedule
from cachec.runtime.errors import InputError, PredictorError, unknown_name
from cachec.runtime.specs import Array

if TYPE_CHECKING:
    from cachec.compiler.models.blocks import BlockPredictor

NAMES = ("disca-10", "disca-8", "disca-4")  # of the published schedules
LISTS = {(steps, len(computed)): computed for steps, computed in map(PUBLISHED.__getitem__, NAMES)}
INTERVALS = {(20, 2): 10, (20, 3): 8, (8, 2): 4}  # steps and interval, and how many their list computes
FUSIONS = ("model", "joint", "apart")  # as the model's blocks have it; one for all streams; one for each
DEPTH, FUSION = "depth", "fusion"  # facts of a predictor

_MADE: WeakKeyDictionary[LoadedModel, dict[str, "BlockPredictor"]] = (
    WeakKeyDictionary()
)  # one for all sizes: they share weights


@dataclass(frozen=True)
class Disca(BlockMethod):
    """Learned; one slot, of image and text tokens; needs one computed step, and never feeds a forecast back.

    Made for distilled models, whose steps are too far apart for any sum of features. A forecast costs as much as its blocks
    (``depth``) and the attention in them: little of a large model, much of a small one.

    Training (``disca_training.py``): ``updates`` by the squared error alone, then ``adversarial`` ones with ``weight`` times
    the loss against a discriminator on features of the frozen model; ``rate`` of the predictor, ``discriminator_rate``,
    ``batch`` runs an update. Defaults are the paper's, where it says.
    """

    name: ClassVar[str] = "disca"
    summary: ClassVar[str] = "trained blocks on current and cached tokens (DisCa)"
    default_interval: ClassVar[int] = 2
    released: ClassVar[str | None] = "the predictor for HunyuanVideo 1.0 (Hub tencent/DisCa, predictor_540p)"
    depth: int = 2
    fusion: str = "model"
    updates: int = 500
    adversarial: int = 1000
    weight: float = 1.0
    rate: float = 1e-4
    discriminator_rate: float = 1e-2
    batch: int = 4

    def __post_init__(self) -> None:
        if self.fusion not in FUSIONS:
            raise InputError(f"fusion is {self.fusion!r}; disca takes {', '.join(FUSIONS)}")
        for name, least in (("depth", 0), ("updates", 0), ("adversarial", 0), ("batch", 1)):
            if getattr(self, name) < least:
                raise InputError(f"{name} is {getattr(self, name)}; it must be at least {least}")
        for name in ("weight", "rate", "discriminator_rate"):
            if not getattr(self, name) > 0:
                raise InputError(f"{name} is {getattr(self, name)}; it must be above 0")
        if not self.updates + self.adversarial:
            raise InputError("updates and adversarial are both 0: there is nothing to train")

    def interval(self, num_steps: int, interval: int) -> Schedule:
        """The published list where there is one (20 steps, interval 2 or 3; 8 steps, interval 2), else the counter rule."""
        if (num_steps, interval) in INTERVALS:
            return Schedule(num_steps, LISTS[num_steps, INTERVALS[num_steps, interval]])
        return interval_schedule(num_steps, interval)

    def published(self, num_steps: int, budget: int) -> Schedule:
        """The published list of so many steps (10 or 8 of 20, 4 of 8).

        Raises:
            InputError: there is none.
        """
        if (num_steps, budget) not in LISTS:
            known = ", ".join(f"{computed} of {steps}" for steps, computed in LISTS)
            raise InputError(f"DisCa has no list of {budget} steps of {num_steps}; its lists are {known}")
        return Schedule(num_steps, LISTS[num_steps, budget])

    def fit(self, data: BlockData) -> tuple[dict[str, Array], dict[str, str]]:
        from cachec.compiler.methods.disca_training import DiscaTrainer

        trainer = DiscaTrainer(data, self)
        return trainer.run(), trainer.facts()

    def made(self, model: LoadedModel) -> "BlockPredictor":
        """An untrained predictor for a model, as the options say, with gradients.

        Raises:
            InputError: the family does not say how its blocks hang together.
        """
        from cachec.compiler.models.blocks import BlockPredictor

        return BlockPredictor(model.transformer, model.body, count=self.depth, apart=self._apart).requires_grad_(True)

    @classmethod
    def read_released(cls, paths: Sequence[Path], options: Mapping[str, str]) -> Released:
        if options:
            raise unknown_name("option of imported DisCa weights", next(iter(options)), ["none: their files say all"])
        path = one_file(paths, cls.name)
        arrays, _ = read_tensors(path)
        check_names(path, arrays, released_shapes())
        return Released(renamed(arrays), {DEPTH: str(NUM_BLOCKS), FUSION: FUSIONS[1]})

    def outlined(self, model: LoadedModel) -> "BlockPredictor":
        from cachec.compiler.graphs.weights import named_module, without_values
        from cachec.compiler.models.blocks import BlockPredictor

        module, apart = model.transformer if model.stored is None else named_module(model.stored), self._apart
        return cast("BlockPredictor", without_values(BlockPredictor(module, model.body, count=self.depth, apart=apart), module))

    @property
    def _apart(self) -> bool | None:
        return None if self.fusion == FUSIONS[0] else self.fusion == FUSIONS[2]

    def blocks(self, model: LoadedModel, parameters: Parameters | None) -> "BlockPredictor":
        if parameters is None:
            raise PredictorError("disca needs a trained predictor: run cachec train, or import one with cachec import disca")
        known, key = _MADE.setdefault(model, {}), _digest(parameters)
        if key not in known:
            known[key] = load_blocks(model, parameters)
        return known[key]


def load_blocks(model: LoadedModel, parameters: Parameters) -> "BlockPredictor":
    """A predictor with trained weights, in the type and place of the model's.

    Raises:
        PredictorError: the file does not hold one for this model.
        InputError: the family does not say how its blocks hang together.
    """
    import torch

    from cachec.compiler.models.blocks import BlockPredictor

    origin, facts = parameters.origin, parameters.facts
    try:
        depth, apart = int(facts[DEPTH]), facts[FUSION] == FUSIONS[2]
    except (KeyError, ValueError) as error:
        raise PredictorError(f"{origin} does not say what its predictor is made of: {error}") from error
    module = model.transformer if model.stored is None else model.stored.module
    predictor = BlockPredictor(module, model.body, count=depth, apart=apart)
    wanted = {name: list(value.shape) for name, value in predictor.state_dict().items()}
    found = {name: list(value.shape) for name, value in parameters.arrays.items()}
    if wrong := sorted(name for name in wanted.keys() | found.keys() if wanted.get(name) != found.get(name)):
        name = wrong[0]
        raise PredictorError(
            f"{origin} is no DisCa predictor for {model.spec.name}: {name} is {found.get(name, 'missing')}, the model's blocks "
            f"want {wanted.get(name, 'none')}; {len(wrong)} differ in all"
        )
    predictor.load_state_dict({name: torch.from_numpy(array) for name, array in parameters.arrays.items()}, assign=True)
    stored = model.stored is not None
    like = torch.empty(0) if stored else next(model.transformer.parameters())
    return predictor.requires_grad_(False).to(like.device, like.dtype).eval()


def _digest(parameters: Parameters) -> str:
    """The same for predictors with the same weights."""
    digest = hashlib.sha256()
    for name, array in sorted(parameters.arrays.items()):
        digest.update(f"{name} {array.dtype} {array.shape}".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()
