"""Transformers that are told a second time, where the step ends: bases of DisCa, and flow maps in general.

As in DisCa (arXiv 2602.05449, and its released code) both times are embedded and averaged, (time_in(t) + time_r_in(r)) / 2.
HunyuanVideo-1.5 adds them, and has its own second time (``use_meanflow``, ``timestep_r``), so that it needs no class of ours.
Pipelines of diffusers tell one time: within :func:`telling` they tell both.

``B`` batch, ``T`` steps, ``D`` channels of an embedded time.
"""

import copy
import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
from diffusers.models.embeddings import TimestepEmbedding
from torch import nn

from cachec.compiler.models.distilled import DISTILLED, distilled_facts
from cachec.compiler.models.equal_modules import EqualModule
from cachec.compiler.tables.sampling import Sampling
from cachec.runtime.abi import TARGET_TIMESTEP
from cachec.runtime.errors import InputError, ModelUnavailableError
from cachec.runtime.specs import Array

ModelMixin = diffusers.ModelMixin  # of which pipelines look for here, to see that classes of a module of ours are models
OWN_SECOND_TIME = "timestep_r"  # what HunyuanVideo-1.5 calls it


class _Projection(nn.Module):
    """Sinusoids of both times, [B, 2, C] of [B, 2]; of one time, or of a guidance scale, as they are: [B, C] of [B].

    ``only_first``: of the first time alone, where the second one is not read.
    """

    def __init__(self, single: nn.Module, *, only_first: bool = False) -> None:
        super().__init__()
        self.single, self._only_first = single, only_first

    def forward(self, times: torch.Tensor) -> torch.Tensor:
        if times.ndim == 2 and self._only_first:
            times = times[:, 0]
        projected: torch.Tensor = self.single(times.flatten())
        return projected if times.ndim == 1 else projected.view(-1, 2, projected.shape[-1])


class _MeanEmbedding(EqualModule):
    """Both times embedded, and their mean [B, D]. The first one's weights keep their names; ``second`` has the other's."""

    def __init__(self, original: nn.Module) -> None:
        super().__init__(original)
        self.second = copy.deepcopy(original)

    def forward(self, projected: torch.Tensor) -> torch.Tensor:
        first = self.linear_2(self.act(self.linear_1(projected[:, 0])))
        mean: torch.Tensor = (first + self.second(projected[:, 1])) / 2
        return mean


def _told_twice(base: Any, *, first_only: Sequence[str] = ()) -> Any:
    """A subclass of a diffusers transformer with ``time_text_embed``, whose call takes ``target_timestep`` [B] besides.

    Both times go through the base's own ``forward`` side by side, [B, 2]. ``first_only``: submodules that embed the first.
    """
    signature = inspect.signature(base.forward)
    second = inspect.Parameter(TARGET_TIMESTEP, inspect.Parameter.KEYWORD_ONLY, default=None)

    @wraps(base.__init__)
    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        base.__init__(self, *args, **kwargs)
        embed = self.time_text_embed
        embed.time_proj, embed.timestep_embedder = _Projection(embed.time_proj), _MeanEmbedding(embed.timestep_embedder)
        for path in first_only:
            other = self.get_submodule(path)
            other.time_proj = _Projection(other.time_proj, only_first=True)

    @wraps(base.forward)
    def forward(self: Any, *args: Any, target_timestep: torch.Tensor | None = None, **kwargs: Any) -> Any:
        if target_timestep is None:
            raise InputError(
                f"{type(self).__name__} was told one time, and needs a second: where the step ends. Compile its pipeline, "
                f"or hand its transformer {TARGET_TIMESTEP}, the next told time (0 at the end)"
            )
        given = signature.bind(self, *args, **kwargs)
        given.arguments["timestep"] = torch.stack([given.arguments["timestep"], target_timestep], 1)
        return base.forward(*given.args, **given.kwargs)

    parameters = list(signature.parameters.values())
    forward.__signature__ = signature.replace(parameters=[*parameters, second])  # type: ignore[attr-defined]
    name = base.__name__.replace("Transformer2DModel", "FlowMap").replace("Transformer3DModel", "FlowMap")
    return type(name, (base,), {"__init__": init, "forward": forward, "__module__": __name__, "__doc__": forward.__doc__})


FluxFlowMap = _told_twice(diffusers.FluxTransformer2DModel)
HunyuanVideoFlowMap = _told_twice(diffusers.HunyuanVideoTransformer3DModel, first_only=("context_embedder.time_text_embed",))
QwenImageFlowMap = _told_twice(diffusers.QwenImageTransformer2DModel)
SD3FlowMap = _told_twice(diffusers.SD3Transformer2DModel)

FLOW_MAPS = (FluxFlowMap, HunyuanVideoFlowMap, QwenImageFlowMap, SD3FlowMap)


def named_in_index(transformer: nn.Module) -> tuple[str, str]:
    """The module and the class that ``model_index.json`` names a transformer by."""
    return (__name__ if isinstance(transformer, FLOW_MAPS) else "diffusers"), type(transformer).__name__


def second_time(transformer: nn.Module) -> str | None:
    """What the transformer calls the second time that it is told; ``None``: it is told one."""
    if isinstance(transformer, FLOW_MAPS):
        return TARGET_TIMESTEP
    config: Any = getattr(transformer, "config", None) or {}
    return OWN_SECOND_TIME if config.get("use_meanflow") else None


def check_second_time(transformer: nn.Module, directory: Path) -> None:
    """Raise ``ModelUnavailableError`` if ``directory`` says that it was distilled, and its transformer is told one time."""
    if distilled_facts(directory) is not None and second_time(transformer) is None:
        raise ModelUnavailableError(
            f"{directory / DISTILLED} says that the model was distilled, but its transformer, a {type(transformer).__name__}, "
            "has no second time input: download or distil it again"
        )


def flow_map_kind(transformer: nn.Module) -> Any:
    """The class of a transformer that is told a second time, for one that is not.

    Raises:
        InputError: nobody has said how this kind is told a second time, or it is told one already.
    """
    kind: Any = type(transformer)
    if second_time(transformer) is not None:
        raise InputError(f"the transformer is told a second time already ({kind.__name__}): distil the model it was made of")
    if kind is diffusers.HunyuanVideo15Transformer3DModel:
        return kind
    if (found := next((one for one in FLOW_MAPS if one.__base__ is kind), None)) is None:
        known = sorted({*(one.__base__.__name__ for one in FLOW_MAPS), "HunyuanVideo15Transformer3DModel"})
        raise InputError(f"a {kind.__name__} has no second time input that is known; those of {', '.join(known)} have")
    return found


def make_flow_map(transformer: nn.Module) -> nn.Module:
    """A transformer in float32 with the weights of ``transformer``, told a second time, which changes nothing yet.

    So a training begins at the teacher's plain steps. Of a mean of two embeddings the first is twice the teacher's, the second
    nothing. (Two copies would agree with it only where both times are one.)

    Raises as :func:`flow_map_kind`.
    """
    kind, config = flow_map_kind(transformer), dict(transformer.config)  # type: ignore[arg-type]
    own = kind is type(transformer)
    student: Any = kind.from_config({**config, "use_meanflow": True} if own else config)
    missing = student.load_state_dict(transformer.state_dict(), strict=False).missing_keys
    with torch.no_grad():
        if own:
            _begin_at_zero(student.time_embed.timestep_embedder_r)
        else:
            first: Any = student.time_text_embed.timestep_embedder
            for name, value in first.second.state_dict().items():
                value.copy_(first.get_parameter(name))
            for parameter in first.linear_2.parameters():
                parameter.mul_(2)
            _begin_at_zero(first.second)
    assert all("second" in name or "timestep_embedder_r" in name for name in missing), "all else is the teacher's"
    made: nn.Module = student.eval()
    return made


def _begin_at_zero(embedding: TimestepEmbedding) -> None:
    """An embedding that adds nothing until it has learned to."""
    embedding.linear_2.weight.zero_()
    embedding.linear_2.bias.zero_()


def targets_of(told: Array) -> Array:
    """Where each step ends, as a model is told [T]: the next told time, and 0 after the last."""
    return np.append(told[1:], np.zeros(1)).astype(np.float32)


@contextmanager
def telling(pipeline: Any, part: str, timestep: str, sampling: Sampling) -> Iterator[None]:
    """Within it, the ``part`` of the pipeline that is told ``timestep`` is told where each step of ``sampling`` ends, too.

    Nothing is done to a transformer that is told one time.
    """
    own, transformer = vars(pipeline), getattr(pipeline, part)
    if sampling.targets is None:
        yield
        return
    own[part] = _Teller(transformer, timestep, sampling.timesteps, sampling.targets)
    try:
        yield
    finally:
        own[part] = transformer


class _Teller(nn.Module):
    """Stands in a transformer's place in its pipeline, which tells one time, and tells both: ``told`` [T], ``targets`` [T]."""

    def __init__(self, transformer: nn.Module, timestep: str, told: Array, targets: Array) -> None:
        super().__init__()
        vars(self).update(_whole=transformer)  # not as a child: it is the pipeline's
        self._timestep, self._signature = timestep, inspect.signature(transformer.forward)
        self._told, self._targets = torch.from_numpy(told), torch.from_numpy(targets)
        self._second = second_time(transformer)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(vars(self)["_whole"], name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        given = self._signature.bind(*args, **kwargs)
        time = given.arguments[self._timestep]
        nearest = (time.reshape(-1, 1).float().cpu() - self._told).abs().argmin(1)
        target = self._targets[nearest].reshape(time.shape).to(time)
        whole: Callable[..., Any] = vars(self)["_whole"]
        return whole(*given.args, **{**given.kwargs, str(self._second): target})
