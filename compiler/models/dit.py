"""DiT (``DiTPipeline``): classes instead of texts, one size. Read facebookresearch/DiT, arXiv 2212.09748.

Cut: the tokens after the last block, before the final norm and projection. The network also gives a variance, which sampling
leaves out. The negative branch has the class of nothing.
"""

import copy
from collections.abc import Callable, Mapping, Sequence
from types import SimpleNamespace
from typing import Any, ClassVar

import torch

from cachec.compiler.models.base import Settings
from cachec.compiler.models.inputs import without_variance
from cachec.compiler.models.pipeline_model import PipelineModel
from cachec.compiler.models.reading import Reading
from cachec.pictures.classes import Classes
from cachec.runtime.errors import InputError
from cachec.runtime.model_io import ModelIO

LABELS = "class_labels"
NOTHING = 1000  # the class of no picture, as the pipeline has it


class DiTModel(PipelineModel):
    """A DiT pipeline. A prompt is the number of a class or its name; an empty one is nothing."""

    DEFAULTS = "dit"
    GIVES = ("hidden_states",)
    ARGUMENTS: ClassVar = {LABELS: LABELS}
    TOKENIZER = None
    LENGTH = None

    @property
    def io(self) -> ModelIO:
        return ModelIO("hidden_states", "timestep", (LABELS,), output=without_variance(self.config), guidance="plain")

    @property
    def side(self) -> int:
        """There is one size."""
        scale = 2 ** (len(self.vae_config["block_out_channels"]) - 1) if self.vae_config else 8
        side: int = self.config.sample_size * scale
        return side

    def check_sizes(self, settings: Settings) -> None:
        if (settings.height, settings.width, settings.frames) != (self.side, self.side, 1):
            given = f"{settings.width}x{settings.height}" + (f", {settings.frames} frames" if settings.frames > 1 else "")
            raise InputError(f"{given} is asked for; {self.spec.name} draws {self.side}x{self.side} pixels only")

    def small(self, settings: Settings) -> Settings:
        return settings

    def embeddings(self, settings: Settings, random: Callable[..., torch.Tensor]) -> dict[str, torch.Tensor]:
        return {LABELS: (random().abs() * NOTHING).long() % NOTHING}

    def arguments(self, conditions: Mapping[str, torch.Tensor], settings: Settings) -> dict[str, Any]:
        return {LABELS: conditions[LABELS].tolist()}

    def text(self, prompts: Sequence[str], settings: Settings) -> dict[str, Any]:
        return {LABELS: self._classes.numbers(list(prompts)).tolist()}

    @property
    def _classes(self) -> Classes:
        return Classes(LABELS, self.pipeline.labels, NOTHING)

    def reading(self, settings: Settings) -> Reading:
        return Reading(self, settings, self._classes)

    def sized(self, settings: Settings) -> dict[str, Any]:
        return {"num_inference_steps": settings.steps}

    def thin(self, config: Mapping[str, Any]) -> dict[str, Any]:
        return {"num_layers": 1, "num_attention_heads": 2}

    def _run(self, call: Mapping[str, Any], noise: torch.Tensor) -> torch.Tensor:
        """The pipeline makes its own noise and gives pictures only: its sampler and autoencoder are ones that hand on ours."""
        made: list[torch.Tensor] = []

        def begin(latents: torch.Tensor, _timestep: Any) -> torch.Tensor:
            del scheduler.scale_model_input
            return torch.cat([noise] * (len(latents) // len(noise)))

        def decode(latents: torch.Tensor) -> SimpleNamespace:
            made.append(latents)
            return SimpleNamespace(sample=latents)

        twin = copy.copy(self.pipeline)
        scheduler = copy.deepcopy(twin.scheduler)
        scheduler.scale_model_input = begin
        vae = SimpleNamespace(config=SimpleNamespace(scaling_factor=1.0), decode=decode)
        vars(twin).update(scheduler=scheduler, vae=vae)
        twin(**{name: value for name, value in call.items() if not name.startswith("negative_")}, output_type="pt")
        return made[0]
