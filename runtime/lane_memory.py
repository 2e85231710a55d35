"""Memory of ``lanes``: constants of every program once, and for each lane room for a request of any of them."""

from collections.abc import Mapping

import numpy as np

from cachec.runtime.device import Buffer, Device
from cachec.runtime.lane_plan import LanePlan
from cachec.runtime.lane_ports import Ends
from cachec.runtime.lane_request import Key
from cachec.runtime.plan import constant_data, part_of
from cachec.runtime.specs import Array


class View:
    """A lane as one program sees it: where what a request brings goes, the ``ends`` of each call, the latents after it."""

    def __init__(self, plan: LanePlan, device: Device, constants: Buffer, own: Buffer) -> None:
        layout, planned = plan.layout, plan.plan
        self._device, self._buffers = device, dict[str, Buffer]()
        for name, one in planned.buffers.items():
            at = layout.offsets[name]
            where = (constants, at) if at < layout.constant_bytes else (own, at - layout.constant_bytes)
            self._buffers[name] = device.part(*where, one.shape, one.dtype)
        self._noises = [part_of(self._buffers[view.buffer], view) for view in planned.noises]
        self._given = {name: part_of(self._buffers[view.buffer], view) for name, (_, view) in planned.given.items()}
        self.ends = [
            Ends.of(
                call,
                {name: part_of(self._buffers[view.buffer], view) for name, view in call.planned.inputs.items()},
                {name: part_of(self._buffers[view.buffer], view) for name, view in call.planned.outputs.items()},
            )
            for call in plan.calls
        ]
        after = [plan.latents_after(place) for place in range(len(plan.calls))]
        self._latents = [part_of(self._buffers[view.buffer], view) for view in after]

    def take(self, conditions: Mapping[str, Array], noise: Array) -> None:
        """Copy what a request brings to where its calls read it."""
        for buffer in self._noises:
            self._device.upload(noise, buffer)
        for name, buffer in self._given.items():
            self._device.upload(conditions[name], buffer)

    def latents(self, made: int) -> Array:
        """The latents [1, …] after so many calls."""
        return self._device.download(self._latents[made - 1])


class LaneMemory:
    """All memory of lanes, taken at once. ``views``: by lane and program."""

    def __init__(self, plans: Mapping[Key, LanePlan], lanes: int, device: Device) -> None:
        data = {key: constant_data(plan.plan, plan.layout) for key, plan in plans.items()}
        own = max(plan.own_bytes for plan in plans.values())
        constants, end = device.empty((sum(one.nbytes for one in data.values()),), "uint8"), 0
        memory = device.empty((lanes * own,), "uint8")
        self._device, self._first = device, memory[:own]
        self.views: dict[tuple[int, Key], View] = {}
        for key, one in data.items():
            part = constants[end : end + one.nbytes]
            end += one.nbytes
            device.upload(one, part)
            for lane in range(lanes):
                self.views[lane, key] = View(plans[key], device, part, memory[lane * own : (lane + 1) * own])

    def clear_first(self) -> None:
        """Zeros for the first lane: what another program left there may be no place in a table that an engine looks up."""
        self._device.upload(np.zeros(self._first.shape, np.uint8), self._first)
