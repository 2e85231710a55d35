"""What a model is to the compiler: how it is loaded, what goes in, where it is cut. No maths.

Shapes: ``B`` batch, ``T`` steps.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from cachec.runtime.bundle import Manifest
from cachec.runtime.errors import InputError
from cachec.runtime.model_io import ModelIO
from cachec.runtime.own_levels import check_sigmas
from cachec.runtime.specs import Array
from cachec.runtime.variants import PictureSize, name_shapes

if TYPE_CHECKING:  # text and pictures are made without torch where a family can
    import torch
    from torch import nn

    from cachec.compiler.models.blocks import Body
    from cachec.compiler.models.lora_files import LoraFile
    from cachec.compiler.models.reading import Reading
    from cachec.compiler.models.shards import Stored
    from cachec.compiler.tables.sampling import Sampling

DTYPES = ("float32", "float16", "bfloat16")
UNGUIDED = {"plain": 1.0, "renormalised": 1.0, "extra": 0.0}  # the scale at which the positive branch is all, by rule


@dataclass(frozen=True)
class ModelSpec:
    """A model, and its defaults: sizes in pixels, text length in tokens, guidance scale, steps, frames, and its prompt lists.

    ``sizes`` are those that ``--size all`` compiles, the usual one first; none is listed of a model with one size.
    ``source`` is a Hub id or a directory; ``name`` is what the command line calls it; ``probe`` a file of weights that read
    what its pictures show (``cachec.compiler.evaluation.probe``); ``credit`` whose work what it learned is, for bundles.
    """

    name: str
    source: str
    height: int
    width: int
    text_tokens: int
    guidance: float
    steps: int = 50
    frames: int = 1
    prompts: str = "general"
    packaged: bool = False
    probe: Path | None = None
    sizes: tuple[str, ...] = ()
    credit: str = ""

    @property
    def portable_source(self) -> str:
        """What a manifest names the model by: a packaged one by its short name, not by a path of this machine."""
        return self.name if self.packaged else self.source


@dataclass(frozen=True)
class Settings:
    """What one bundle is compiled for; ``frames`` of a video, 1 for a picture.

    ``true_cfg_scale``: of two branches, where a model takes a guidance scale as an input besides; at 1 it has one branch.
    ``cut``: the module path of the block behind which the forecasts begin; ``None`` is the last one, as the family says.
    ``shorter_texts``: lengths in tokens besides ``text_tokens``, which is the longest, that engines are for, too.
    """

    height: int
    width: int
    text_tokens: int
    guidance: float
    steps: int
    dtype: str
    frames: int = 1
    sigmas: tuple[float, ...] | None = None
    cut: str | None = None
    true_cfg_scale: float = 1.0
    shorter_texts: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.sigmas is not None:
            check_sigmas(self.sigmas, self.steps)
        if self.steps < 1:
            raise InputError(f"steps is {self.steps}; it must be at least 1")
        for name, scale in (("guidance", self.guidance), ("true-cfg-scale", self.true_cfg_scale)):
            if not math.isfinite(scale):
                raise InputError(f"{name} is {scale}; it must be a finite number")
        if (shortest := min((self.text_tokens, *self.shorter_texts))) < 1:
            raise InputError(f"text-tokens is {shortest}; it must be at least 1")
        if self.frames < 1:
            raise InputError(f"frames is {self.frames}; it must be at least 1")
        if self.dtype not in DTYPES:
            raise InputError(f"dtype is {self.dtype!r}; use {', '.join(DTYPES)}")

    def with_steps(self, steps: int) -> Self:
        """With another number of steps, which then take the sampler's own noise levels."""
        return self if steps == self.steps else replace(self, steps=steps, sigmas=None)

    @property
    def sizes(self) -> dict[str, int]:
        """Those of a request, by name, as programs are keyed."""
        frames = {"frames": self.frames} if self.frames > 1 else {}
        return {"height": self.height, "width": self.width, **frames, "text_tokens": self.text_tokens}

    @property
    def facts(self) -> dict[str, str]:
        """Sizes and guidance, as files say what they are of."""
        true = {} if self.true_cfg_scale == 1 else {"true_cfg_scale": self.true_cfg_scale}
        return {name: str(value) for name, value in {**self.sizes, "guidance": self.guidance, **true}.items()}

    @property
    def size(self) -> str:
        """As requests name it: width and height, and of a video the number of frames."""
        return str(PictureSize(self.width, self.height, self.frames))

    @property
    def shape_bucket(self) -> str:
        """The sizes that engines are built for, with the longest texts."""
        return name_shapes([self.size], [self.text_tokens])

    @property
    def by_text(self) -> tuple[Self, ...]:
        """For each length of texts alone, the longest first."""
        lengths = sorted((self.text_tokens, *self.shorter_texts), reverse=True)
        return tuple(replace(self, text_tokens=length, shorter_texts=()) for length in lengths)


class LoadedModel(ABC):
    """A pipeline with its weights, and what the compiler must know of it.

    ``transformer`` is the module that is captured; ``block`` the module path of its last block.
    """

    spec: ModelSpec
    pipeline: Any

    @property
    @abstractmethod
    def transformer(self) -> "nn.Module":
        """Raises ``ModelUnavailableError`` if it was loaded without."""

    @property
    def stored(self) -> "Stored | None":
        """The transformer's files, if its weights are exactly theirs: then it is compiled from them, and not held in memory."""
        return None

    def thin_twin(self, settings: Settings) -> "tuple[LoadedModel, Settings] | None":
        """A small model of the same make, with random weights, and small sizes for it: one block of each kind, few heads.

        What capture and passes do to it, they do to this model. ``None``: a family has none.
        """
        return None

    @property
    def expert(self) -> "tuple[LoadedModel, float] | None":
        """A model with a second transformer in the transformer's place, and the told time below which that one answers."""
        return None

    def capturable(self, transformer: "nn.Module") -> "nn.Module":
        """What is captured in the transformer's place, over the very same parameters: a module that ``torch.export`` takes.

        It takes the inputs of ``io`` and the constants by name.
        """
        return transformer

    @property
    def device(self) -> "torch.device":
        """Where the transformer is: example inputs and constants are there, too."""
        return next(self.transformer.parameters()).device

    @property
    def sampler(self) -> str:
        """What the pipeline's sampler is called."""
        return type(self.pipeline.scheduler).__name__

    @property
    @abstractmethod
    def block(self) -> str:
        """Path of the last block of the body, as in ``transformer.named_modules()``."""

    @property
    def body(self) -> "Body":
        """How the blocks hang together, for predictors that are made of them; ``InputError`` where nobody has said."""
        raise InputError(
            f"the family of {self.spec.name} does not say how its blocks hang together (Body): take another method"
        )

    @property
    @abstractmethod
    def io(self) -> ModelIO:
        """Which input plays which part."""

    def branch_scale(self, settings: Settings) -> float:
        """The scale at which the two branches of guidance are combined.

        Raises:
            InputError: there is a second scale, and the model has one only.
        """
        if settings.true_cfg_scale != 1:
            raise InputError(f"{self.spec.name} has no true_cfg_scale: it has one scale of guidance, which is --guidance")
        return settings.guidance

    @property
    def branch_setting(self) -> str:
        """Which of the settings :meth:`branch_scale` is."""
        return "guidance"

    def is_guided(self, settings: Settings) -> bool:
        """Do requests at the settings' guidance scale have a negative branch? At other scales the positive one is all."""
        rule, scale = self.io.guidance, self.branch_scale(settings)
        return rule is not None and scale > UNGUIDED[rule]

    def conditions(self, settings: Settings) -> tuple[str, ...]:
        """What a request brings besides noise, by name."""
        io = self.io
        return io.request_conditions if self.is_guided(settings) else io.conditions

    @property
    @abstractmethod
    def weights_hash(self) -> str:
        """SHA-256 over the transformer's weight files; over its tensors, if it is in memory and not what its files say.

        Another one with LoRAs fused.
        """

    @property
    def plain_hash(self) -> str:
        """The same without LoRAs."""
        return self.weights_hash

    @property
    def loras(self) -> Sequence[Mapping[str, Any]]:
        """What is fused: by LoRA the ``name`` of a file, its ``sha256``, its ``scale``, and ``part``, of two transformers."""
        return ()

    def fuse(self, loras: "Sequence[LoraFile]") -> None:
        """Take weights with all of these fused, before anything is made of them; none is in memory for it.

        Raises:
            InputError: the model's weights are in memory; or a file does not fit, or does not say which of two transformers
                it is for.
        """
        raise InputError(
            f"the weights of {self.spec.name} are in memory: fuse the LoRA there (pipe.load_lora_weights, pipe.fuse_lora, "
            "pipe.unload_lora_weights)"
        )

    def hashing_weights(self) -> AbstractContextManager[None]:
        """Within it, ``weights_hash`` is made beside other work, if that takes long: it may be asked for late."""
        return nullcontext()

    @abstractmethod
    def example_inputs(self, settings: Settings, *, batch: int = 2) -> "dict[str, torch.Tensor]":
        """Random inputs of the right shapes, pairwise distinct, batch first."""

    @abstractmethod
    def constants(self, settings: Settings) -> dict[str, Any]:
        """What is baked into the graph: flags, and tensors that depend on the resolution only."""

    @abstractmethod
    def sampling(self, settings: Settings) -> "Sampling":
        """The pipeline's own sampler at the settings' sizes and steps, over the transformer's outputs."""

    @abstractmethod
    def encode(
        self, prompts: Sequence[str], settings: Settings, names: Sequence[str], negatives: Sequence[str] | None = None
    ) -> dict[str, Array]:
        """Conditions for the prompts, batch first: the inputs ``names`` of the transformer.

        Guided requests want ``negative_<name>``, too, of the ``negatives`` (by default empty), and ``guidance_scale`` [B].
        """

    def part_counts(self) -> Mapping[str, int]:
        """Parameters of text encoders and decoder, by name, as far as their configurations are there."""
        return {}

    def reading(self, settings: Settings) -> "Reading":
        """How its prompts are read, for bundles without torch; loads the text encoders. ``InputError``: it is not known."""
        raise InputError(f"how {self.spec.name} reads prompts is not known")

    def pictured(self, latents: "torch.Tensor", settings: Settings) -> "torch.Tensor":
        """What :meth:`decode` gives, on tensors, to be captured. ``InputError``: it is not known."""
        raise InputError(f"how {self.spec.name} decodes latents is not known")

    @property
    def decoder(self) -> "nn.Module | None":
        """The module whose weights :meth:`pictured` reads, loaded; ``None``: there is none."""
        return None

    def release_text_encoders(self) -> None:
        """Let go of text encoders that :meth:`encode` loads again when it needs them; of others, nothing."""

    @abstractmethod
    def decode(self, latents: Array, settings: Settings) -> Array:
        """Pictures [B, H, W, 3], float32 in [0, 1], from packed latents."""

    @abstractmethod
    def generate(self, conditions: Mapping[str, Array], noise: Array, settings: Settings) -> Array:
        """Latents from the untouched pipeline's own denoise loop: the eager baseline."""

    # what an unmodified pipeline hands its transformer, and gets: for what stands in the transformer's place

    def taken(self, given: Mapping[str, Any], settings: Settings) -> "dict[str, torch.Tensor]":
        """The conditions as the graphs take them, from what the pipeline hands its transformer, by name; ``None`` is left out.

        Texts shorter than ``settings.text_tokens`` are padded where there is a mask.
        """
        return {name: given[name] for name in self.io.conditions}

    def state(self, given: Mapping[str, Any]) -> "torch.Tensor":
        """What sampling moves [B, …], in what the pipeline hands its transformer as latents."""
        state: torch.Tensor = given[self.io.latents]
        return state

    def answer(self, velocity: "torch.Tensor", given: Mapping[str, Any]) -> Any:
        """What the transformer gives its pipeline for this velocity [B, …]: a list where it gives lists."""
        return velocity

    def says_nothing(self, name: str, value: Any) -> bool:
        """Does the model not look at this input, though it is none that is compiled?"""
        return False

    def apart(self) -> "LoadedModel":
        """A model that answers these questions, and keeps no pipeline from being freed."""
        return self

    def scheduled(self, settings: Settings) -> Any:
        """The pipeline's scheduler as it is at the start of a run, its timesteps set; ``None``: a family does not tell."""
        return None

    @staticmethod
    def check_scheduler(scheduler: Any) -> None:
        """Raise ``InputError`` unless runs with this scheduler of diffusers can be compiled. A family may take any."""

    @property
    def sizes_of(self) -> "Callable[[str, torch.Tensor], Mapping[str, Any]]":
        """What a user of the pipeline says for an input that is baked in (``constants``), by the names of the call.

        The function holds nothing of the model.
        """
        return lambda name, value: {name: list(value.shape)}


class Family(LoadedModel):
    """A kind of pipeline, as ``register_family`` takes it: how a model of it is found, beside what every model says."""

    @classmethod
    @abstractmethod
    def make_spec(cls, name: str, source: str) -> ModelSpec:
        """The family's defaults, for a model that has no short name."""

    @classmethod
    @abstractmethod
    def load(cls, spec: ModelSpec, directory: Path, *, with_transformer: bool) -> Self:
        """Load the pipeline in ``directory``, on the CPU in float32; without its transformer for text and pictures alone."""

    @classmethod
    def outline(cls, spec: ModelSpec, directory: Path) -> Self:
        """The pipeline for questions that its configuration answers: what its graphs are like. By default it is loaded.

        A family that needs no weights for it can plan a model that is not there.
        """
        return cls.load(spec, directory, with_transformer=True)

    @classmethod
    @abstractmethod
    def wrap(cls, spec: ModelSpec, pipeline: Any, directory: Path | None) -> Self:
        """A pipeline that is in memory already; ``directory`` has its files, if that is known."""


def settings_of(manifest: Manifest) -> Settings:
    """The settings that a bundle was compiled for."""
    names = ("height", "width", "text_tokens", "guidance", "true_cfg_scale", "steps", "dtype", "frames", "cut")
    own, sigmas = {name: manifest.settings[name] for name in names}, manifest.settings.get("sigmas")
    return Settings(**own, sigmas=sigmas and tuple(sigmas), shorter_texts=tuple(manifest.settings["shorter_texts"]))


def check_prompts(prompts: Sequence[str]) -> None:
    """Raise ``InputError`` if there is no prompt, or an empty one."""
    if not prompts:
        raise InputError("no prompt given: pass -p 'some text'")
    for index, prompt in enumerate(prompts):
        if not prompt.strip():
            raise InputError(f"prompt {index + 1} is empty: pass -p 'some text'")


def tensors_from(arrays: Mapping[str, Array]) -> "dict[str, torch.Tensor]":
    """Torch views of numpy arrays."""
    import torch

    return {name: torch.from_numpy(array) for name, array in arrays.items()}
