"""A transformer with other blocks in its body: one that hands out its tokens, and one that forecasts from them, as DisCa does.

Citation: arXiv 2602.05449, and the released code (Tencent-Hunyuan/DisCa). Families say how their blocks hang together
(``Body``); the rest is the same for all of them. ``B`` batch, ``L`` tokens of all streams, ``D`` channels.
"""

import copy
import inspect
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn
from torch._subclasses import FakeTensor

from cachec.compiler.models.base import LoadedModel
from cachec.compiler.models.equal_modules import with_child
from cachec.runtime.abi import history_name
from cachec.runtime.errors import InputError

CACHED = history_name(0)  # the input with the tokens of the newest computed step


@dataclass(frozen=True)
class Body:
    """How a transformer's blocks hang together.

    ``lists``: of all its blocks, in order; the cut is behind the last block of the last one. ``gives``: which argument of the
    block behind each result of such a block is; ``None``: nothing reads it behind the last one. ``width``: channels of a token.
    ``apart``: image and text have weights of their own in the last list.
    """

    lists: tuple[str, ...]
    width: int
    gives: tuple[str | None, ...] = ("hidden_states",)
    apart: bool = False

    @property
    def streams(self) -> tuple[str, ...]:
        """The arguments that are kept of the last block."""
        return tuple(name for name in self.gives if name is not None)

    def kept(self, made: Any) -> torch.Tensor:
        """Tokens of all streams [B, L, D], of what a block gives."""
        values = made if isinstance(made, tuple) else (made,)
        found = [value for name, value in zip(self.gives, values, strict=True) if name is not None]
        return found[0] if len(found) == 1 else torch.cat(found, 1)

    def given_on(self, arguments: dict[str, Any]) -> Any:
        """What a block would give that changes nothing."""
        values = tuple(None if name is None else arguments[name] for name in self.gives)
        return values[0] if len(values) == 1 else values


class OfBlocks(LoadedModel):
    """A family that says how its blocks hang together.

    ``BLOCKS``: the last list of blocks, ``BEFORE``: those before it, in order. ``GIVES`` and ``APART``: see ``Body``; without
    ``GIVES`` nothing is known of them.
    """

    BLOCKS: ClassVar[str]
    BEFORE: ClassVar[tuple[str, ...]] = ()
    GIVES: ClassVar[tuple[str | None, ...]] = ()
    APART: ClassVar[bool] = False
    config: Any

    @property
    def width(self) -> int:
        """Channels of a token."""
        width: int = self.config.num_attention_heads * self.config.attention_head_dim
        return width

    @property
    def body(self) -> Body:
        if not self.GIVES:
            return super().body
        return Body((*self.BEFORE, self.BLOCKS), self.width, self.GIVES, self.APART)


class _Held:
    """A value on its way past calls that do not know it."""

    value: torch.Tensor | None = None

    def take(self) -> torch.Tensor:
        value, self.value = self.value, None
        assert value is not None, "it is put there before"
        return value


class BlockPredictor(nn.Module):
    """What a transformer needs to forecast, beside its own head and tail: fusions, and blocks of its last kind.

    A fusion is Linear(2D → D), SiLU, Linear(D → D), on current and cached tokens side by side; there is one for all streams, or
    one for each. It starts as the current tokens plus the cached ones' change, which it does not know: random, as published.
    The ``count`` blocks start as copies of the model's last ones; where these have no values, neither do they.
    """

    def __init__(self, transformer: nn.Module, body: Body, *, count: int = 2, apart: bool | None = None) -> None:
        super().__init__()
        num = len(body.streams) if (body.apart if apart is None else apart) else 1
        self.fusions = nn.ModuleList(_fusion(body.width) for _ in range(num))
        own = list(transformer.get_submodule(body.lists[-1]).children())
        self.blocks = nn.ModuleList(_copied(own[max(0, len(own) - count + place)]) for place in range(count))


def _fusion(width: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(2 * width, width), nn.SiLU(), nn.Linear(width, width))


def _copied(block: nn.Module) -> nn.Module:
    """A block with parameters of its own."""
    named = [one for one in block.parameters() if isinstance(one, FakeTensor)]
    empty = [nn.Parameter(torch.empty(one.shape, dtype=one.dtype, device="meta"), requires_grad=False) for one in named]
    return copy.deepcopy(block, {id(one): other for one, other in zip(named, empty, strict=True)})


class KeepingTransformer(nn.Module):
    """The ``transformer`` as it is, whose second result are its tokens behind the last block [B, L, D]."""

    def __init__(self, transformer: nn.Module, body: Body) -> None:
        super().__init__()
        self._held, (*_, last) = _Held(), body.lists
        blocks = list(transformer.get_submodule(last))  # type: ignore[call-overload]
        keeping = _Keeping(blocks[-1], body, self._held)
        self.transformer = with_child(transformer, last, nn.ModuleList([*blocks[:-1], keeping]))

    def forward(self, **given: Any) -> tuple[torch.Tensor, torch.Tensor]:
        made = self.transformer(**given)
        return made[0] if isinstance(made, tuple) else made, self._held.take()


class _Keeping(nn.Module):
    def __init__(self, block: nn.Module, body: Body, held: _Held) -> None:
        super().__init__()
        self.block, self._body, self._held = block, body, held

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        made = self.block(*args, **kwargs)
        self._held.value = self._body.kept(made)
        return made


class PredictingTransformer(nn.Module):
    """The model with a predictor's blocks for its body; it takes ``feature_0`` [B, L, D] beside the model's own inputs.

    ``capturable``: makes of a transformer what ``torch.export`` takes (``LoadedModel.capturable``). Head and tail are the
    transformer's own.
    """

    def __init__(self, transformer: nn.Module, body: Body, predictor: BlockPredictor, capturable: Any) -> None:
        super().__init__()
        self._held, (*before, last) = _Held(), body.lists
        twin, own = transformer, list(transformer.get_submodule(last))  # type: ignore[call-overload]
        for name in before:
            twin = with_child(twin, name, _Instead(twin.get_submodule(name).children(), []))
        twin = capturable(with_child(twin, last, _Instead(own, predictor.blocks)))
        blocks = list[nn.Module](getattr(twin, last))
        template, passes = (blocks[0], False) if blocks else (own[-1], True)
        fused = _Fused(template, predictor.fusions, body, self._held, passes=passes)
        self.transformer = with_child(twin, last, _Instead(own, [fused, *blocks[1:]]))

    def forward(self, **given: Any) -> torch.Tensor:
        self._held.value = given.pop(CACHED)
        made = self.transformer(**given)
        velocity: torch.Tensor = made[0] if isinstance(made, tuple) else made
        return velocity


class _Instead(nn.ModuleList):
    """Goes over other blocks than it holds: a head or tail that reads a certain block finds the model's own."""

    def __init__(self, own: Iterable[nn.Module], others: Iterable[nn.Module]) -> None:
        super().__init__(own)
        self.others = nn.ModuleList(others)

    def __iter__(self) -> Iterator[nn.Module]:
        return iter(self.others)


class _Fused(nn.Module):
    """A block on its streams fused with the cached ones; ``passes``: no block, only what it would be given."""

    def __init__(self, block: nn.Module, fusions: nn.ModuleList, body: Body, held: _Held, *, passes: bool) -> None:
        super().__init__()
        self._signature = inspect.signature(block.forward)
        self.block, self.fusions = (None if passes else block), fusions
        self._body, self._held = body, held

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        given, cached = self._signature.bind(*args, **kwargs), self._held.take()
        names, arguments = self._body.streams, given.arguments
        sizes = [arguments[name].shape[1] for name in names]
        if sum(sizes) != cached.shape[1]:
            raise InputError(f"{cached.shape[1]} cached tokens are given, and the model has {sum(sizes)}")
        for place, (name, past) in enumerate(zip(names, torch.split(cached, sizes, 1), strict=True)):
            fusion = self.fusions[min(place, len(self.fusions) - 1)]
            arguments[name] = fusion(torch.cat([arguments[name], past], -1))
        return self._body.given_on(arguments) if self.block is None else self.block(*given.args, **given.kwargs)
