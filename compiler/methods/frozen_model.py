"""The frozen model and a predictor that is trained on it, as modules: what DisCa's training asks of them.

Shapes: ``P`` runs, ``T`` steps, ``B`` samples of an update, ``L`` tokens, ``D`` channels.
"""

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import torch
from torch import nn

from cachec.compiler.graphs.capture import joined
from cachec.compiler.methods.base import BlockData
from cachec.compiler.models.blocks import CACHED, BlockPredictor, KeepingTransformer, PredictingTransformer
from cachec.runtime.abi import TARGET_TIMESTEP

Drawn = Mapping[str, torch.Tensor]  # samples: their ``run``, ``branch``, ``step`` and ``anchor`` [B]


class FrozenModel:
    """Samples of recorded runs, the model's answers at them, and the predictor's. The model's weights stay as they are."""

    def __init__(self, data: BlockData, predictor: BlockPredictor) -> None:
        self._data, model = data, data.model
        self._io, self._body, self._device = model.io, model.body, torch.device(data.device)
        self._transformer = self._there(model.transformer)
        self.predictor = predictor.to(self._device).float()
        built = KeepingTransformer(model.capturable(self._transformer), self._body)
        self._keeping = built.eval()
        self._predicting = PredictingTransformer(self._transformer, self._body, self.predictor, model.capturable).eval()
        self._constants = {name: self._moved(value) for name, value in model.constants(data.settings).items()}
        self._pairs = [(step, max(s for s in data.schedule.compute if s < step)) for step in data.schedule.forecast]
        self._steps = data.sampling.euler

    @property
    def facts(self) -> dict[str, Any]:
        """What the predictor is made of."""
        apart = len(self.predictor.fusions) > 1
        return {
            "depth": len(self.predictor.blocks),
            "fusion": "apart" if apart else "joint",
            "num_held_out": self._data.held_out,
        }

    def computing(self) -> AbstractContextManager[Any]:
        """Within it, a model in low precision takes the predictor's float32."""
        dtype = next(self._transformer.parameters()).dtype
        return nullcontext() if dtype == torch.float32 else torch.autocast(self._device.type, dtype)

    def _there(self, transformer: nn.Module) -> nn.Module:
        """The transformer on the device, in the precision that it is evaluated in; a copy, unless it is so already."""
        dtype = getattr(torch, self._data.precision)
        like = next(transformer.parameters())
        if (like.device, like.dtype) == (self._device, dtype):
            return transformer
        return copy.deepcopy(transformer).to(self._device, dtype)

    def _moved(self, value: Any) -> Any:
        return value.to(self._device) if isinstance(value, torch.Tensor) else value

    def draw(self, batch: int, generator: torch.Generator) -> Drawn:
        """Random runs, branches of guidance and forecast steps, with the computed step before each."""
        data = self._data

        def some(high: int) -> torch.Tensor:
            return torch.randint(high, (batch,), generator=generator)

        pairs = torch.tensor(self._pairs)[some(len(self._pairs))]
        run, branch = some(len(data.states) - data.held_out), some(len(data.branches))
        return {"run": run, "branch": branch, "step": pairs[:, 0], "anchor": pairs[:, 1]}

    def held_out(self, most: int) -> Iterator[Drawn]:
        """Some held-out runs at every forecast step, of the positive branch."""
        data = self._data
        runs = torch.arange(len(data.states) - data.held_out, len(data.states))[:most]
        for step, anchor in self._pairs:
            of_all = {"branch": len(data.branches) - 1, "step": step, "anchor": anchor}
            yield {"run": runs, **{name: torch.full_like(runs, value) for name, value in of_all.items()}}

    @torch.no_grad()
    def answers(self, drawn: Drawn) -> tuple[torch.Tensor, torch.Tensor]:
        """Tokens [B, L, D] at the anchors, and the velocity at the steps."""
        batch = len(drawn["run"])
        states = torch.cat([self._states(drawn, drawn[name]) for name in ("anchor", "step")])
        conditions = {name: torch.cat([value, value]) for name, value in self._conditions(drawn).items()}
        steps = torch.cat([drawn[name] for name in ("anchor", "step")])
        velocity, tokens = self._keeping(**self._given(states, steps, conditions))
        return tokens[:batch].float(), self._kept(velocity, states)[batch:]

    def forecast(self, drawn: Drawn, tokens: torch.Tensor) -> torch.Tensor:
        """The predictor's velocity at the steps, from tokens of the anchors."""
        states, conditions = self._states(drawn, drawn["step"]), self._conditions(drawn)
        given = self._given(states, drawn["step"], conditions)
        return self._kept(self._predicting(**given, **{CACHED: tokens.to(given[self._io.latents].dtype)}), states)

    def features(self, drawn: Drawn, velocity: torch.Tensor, depths: Sequence[float]) -> list[torch.Tensor]:
        """Features [B, L, D] of the frozen model at some depths, at the latents that a velocity leads to."""
        states, steps = self._states(drawn, drawn["step"]), drawn["step"]
        assert self._steps is not None, "the trainer has looked"
        carry, gain = (torch.from_numpy(one[steps.numpy()].astype(np.float32)).to(self._device) for one in self._steps)
        each = (-1, *[1] * (states.ndim - 1))
        moved = carry.view(each) * states + gain.view(each) * velocity.float()
        later = (steps + 1).clamp(max=self._data.schedule.num_steps - 1)
        seen: list[torch.Tensor] = []
        handles = [block.register_forward_hook(lambda _module, _given, made: seen.append(_tokens(made)))
                   for block in self._looked_at(depths)]  # fmt: skip
        try:
            self._keeping(**self._given(moved, later, self._conditions(drawn)))
        finally:
            for handle in handles:
                handle.remove()
        return seen

    def feature_widths(self, depths: Sequence[float]) -> list[int]:
        """Channels of those features."""
        return [self._body.width for _ in self._looked_at(depths)]

    def _looked_at(self, depths: Sequence[float]) -> list[nn.Module]:
        whole = self._keeping.transformer
        blocks = [block for name in self._body.lists for block in whole.get_submodule(name).children()]
        places = dict.fromkeys(max(0, round(depth * len(blocks)) - 1) for depth in depths)
        return [blocks[place] for place in places]

    def _states(self, drawn: Drawn, steps: torch.Tensor) -> torch.Tensor:
        return torch.from_numpy(self._data.states[drawn["run"].numpy(), steps.numpy()]).to(self._device)

    def _times(self, steps: torch.Tensor) -> dict[str, torch.Tensor]:
        """What the model is told at the steps."""
        sampling = self._data.sampling
        series = {self._io.timestep: sampling.timesteps, TARGET_TIMESTEP: sampling.targets}
        told = {name: values[steps.numpy()] for name, values in series.items() if values is not None}
        return {name: torch.from_numpy(values).to(self._device) for name, values in told.items()}

    def _conditions(self, drawn: Drawn) -> dict[str, torch.Tensor]:
        pairs = list(zip(drawn["branch"].tolist(), drawn["run"].tolist(), strict=True))
        found = {name: [self._data.branches[branch][name][run] for branch, run in pairs] for name in self._io.conditions}
        return {name: torch.from_numpy(np.stack(values)).to(self._device) for name, values in found.items()}

    def _given(self, states: torch.Tensor, steps: torch.Tensor, conditions: Drawn) -> dict[str, Any]:
        """Keywords of the transformer's call at these steps."""
        io, dtype = self._io, next(self._transformer.parameters()).dtype
        whole = joined({io.latents: states, **self._times(steps), **conditions}, io)
        typed = {name: value.to(dtype) if value.is_floating_point() else value for name, value in whole.items()}
        return {**typed, **self._constants}

    def _kept(self, velocity: torch.Tensor, states: torch.Tensor) -> torch.Tensor:
        """What of an output moves the latents."""
        begin, end = self._io.output or (0, states.shape[self._io.axis])
        return velocity.narrow(self._io.axis, begin, end - begin)


def _tokens(made: Any) -> torch.Tensor:
    """Of all streams that a block gives."""
    return torch.cat([one for one in made if one is not None], 1) if isinstance(made, tuple) else made
