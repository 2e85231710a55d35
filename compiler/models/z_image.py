"""Z-Image (``ZImagePipeline``). Read Tongyi-MAI/Z-Image, arXiv 2511.22699.

Cut: the tokens after the last block, before the final layer. What is captured is a module of the same weights on tensors with a
batch (``z_image_equal``); the pipeline hands lists. It negates what the transformer gives.
"""

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from torch import nn
from torch.nn.functional import pad

from cachec.compiler.models.base import Settings
from cachec.compiler.models.from_pictures import FromPictures
from cachec.compiler.models.inputs import ragged_mask
from cachec.compiler.models.reading import Seen
from cachec.compiler.models.z_image_equal import ZImageEqual
from cachec.runtime.model_io import ModelIO

LATENTS, TEXTS, MASK = "x", "cap_feats", "cap_mask"


class ZImageModel(FromPictures):
    """A Z-Image pipeline."""

    DEFAULTS = "z-image"
    TWIN = "ZImageImg2ImgPipeline"
    ARGUMENTS: ClassVar = {TEXTS: "prompt_embeds"}
    BLOCKS, GIVES = "layers", ("x",)
    SIGN = -1.0

    @property
    def io(self) -> ModelIO:
        return ModelIO(LATENTS, "t", (TEXTS, MASK), guidance="extra", text=(TEXTS, MASK))

    @property
    def side(self) -> int:
        side: int = self.pipeline.vae_scale_factor * self.config.all_patch_size[0]
        return side

    @property
    def width(self) -> int:
        width: int = self.config.dim
        return width

    def capturable(self, transformer: nn.Module) -> nn.Module:
        return ZImageEqual(transformer)

    def embeddings(self, settings: Settings, random: Callable[..., torch.Tensor]) -> dict[str, torch.Tensor]:
        texts = random(settings.text_tokens, self.config.cap_feat_dim)
        return {TEXTS: texts, MASK: ragged_mask(texts)}

    def arguments(self, conditions: Mapping[str, torch.Tensor], settings: Settings) -> dict[str, Any]:
        pairs = zip(conditions[TEXTS], conditions[MASK].bool(), strict=True)
        return {self.ARGUMENTS[TEXTS]: [text[mask] for text, mask in pairs]}

    def taken(self, given: Mapping[str, Any], settings: Settings) -> dict[str, torch.Tensor]:
        texts = given[TEXTS]
        lengths = torch.tensor([len(text) for text in texts], device=texts[0].device)
        whole = torch.stack([pad(text, (0, 0, 0, settings.text_tokens - len(text))) for text in texts])
        return {TEXTS: whole, MASK: torch.arange(settings.text_tokens, device=lengths.device) < lengths[:, None]}

    def conditions_of(self, tokens: Mapping[str, torch.Tensor], seen: Seen, settings: Settings) -> dict[str, torch.Tensor]:
        """The pipeline takes padding out."""
        (call,) = seen.calls
        ids, mask = (tokens[name] for name in call.names)
        states = self.pipeline.text_encoder(input_ids=ids, attention_mask=mask.bool(), output_hidden_states=True).hidden_states[
            -2
        ]
        return {TEXTS: states * mask[..., None], MASK: mask.bool()}

    def state(self, given: Mapping[str, Any]) -> torch.Tensor:
        return torch.cat(given[LATENTS], 1).movedim(1, 0)  # of each sample one frame [C, 1, H, W]

    def answer(self, velocity: torch.Tensor, given: Mapping[str, Any]) -> Any:
        return list(velocity[:, :, None])

    def constants(self, settings: Settings) -> dict[str, Any]:
        return {}

    def thin(self, config: Mapping[str, Any]) -> dict[str, Any]:
        width = 2 * config["dim"] // config["n_heads"]
        return {"n_layers": 1, "n_refiner_layers": 1, "n_heads": 2, "n_kv_heads": 2, "dim": width}
