"""The engines of a bundle's other parts: loaded when they are wanted, and let go when a request's phase is over."""

import logging
import threading
from collections.abc import Mapping, Sequence

from cachec.engines.targets import Fit, find_fit
from cachec.runtime.bundle import Bundle, Target
from cachec.runtime.components import Component
from cachec.runtime.device import DeviceName
from cachec.runtime.engine import HOST, Call, Engine, LoadOptions
from cachec.runtime.errors import BundleError, in_one_line, shortened
from cachec.runtime.specs import Array

log = logging.getLogger(__name__)


class Part:
    """One component of a bundle. Its engines have fixed sizes, are made for one sample, and run one at a time."""

    def __init__(self, name: str, bundle: Bundle, device: DeviceName, threads: int | None) -> None:
        self.name = name
        self._bundle, self._device, self._threads = bundle, device, threads
        self._component = Component.from_json(bundle.manifest.components[name])
        self._bound: dict[str, _Bound] = {}
        self._lock = threading.Lock()

    @property
    def engines(self) -> tuple[str, ...]:
        return tuple(self._component.memory)

    def run(self, engine: str, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """What an engine gives for one sample; of ``inputs`` [1, …] those that it takes.

        Raises:
            BundleError: nothing of it runs here.
            InputError: an input does not fit.
        """
        with self._lock:
            if engine not in self._bound:
                self._bound[engine] = self._load(engine)
            return self._bound[engine].run(inputs)

    def _load(self, engine: str) -> "_Bound":
        fit = best_fit(self._component.targets, self._device, self.name)
        target, kind = fit.target, fit.backend
        assert kind is not None, "it fits"
        if engine not in target.engines:
            raise BundleError(f"{self.name} has no engine {shortened(engine)}, which requests need: compile the bundle again")
        artifact = target.engines[engine]
        weights = {name: self._bundle.path(path) for name, path in target.weights.items() if name == engine}
        options = LoadOptions(fit.device, self._threads, weights, target.needs)
        log.info("loading %s, %s, on %s", self.name, engine, fit.device)
        files = {engine: self._bundle.path(artifact.path)}
        return _Bound(kind.load(files, {engine: artifact.signature}, options)[engine])

    def release(self) -> None:
        """Let its engines and their memory go; they are loaded again when they are wanted."""
        with self._lock:
            for bound in self._bound.values():
                bound.close()
            self._bound.clear()


class _Bound:
    """An engine, bound to buffers of its own."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        device = engine.device.for_session()
        context = engine.context(device)
        shapes = {spec.name: spec.resolve({}) for spec in engine.signature.inputs}
        if scratch := context.scratch_bytes(shapes):
            context.scratch = device.empty((scratch,), "uint8")
        self._device = device
        self._inputs = {spec.name: device.empty(spec.resolve({}), spec.dtype) for spec in engine.signature.inputs}
        self._outputs = {spec.name: device.empty(spec.resolve({}), spec.dtype) for spec in engine.signature.outputs}
        self._call: Call = context.bind(self._inputs, self._outputs)

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        for name, buffer in self._inputs.items():
            self._engine.signature.input(name).check(inputs[name])
            self._device.upload(inputs[name], buffer)
        self._call.run()
        return {name: self._device.download(buffer) for name, buffer in self._outputs.items()}

    def close(self) -> None:
        self._engine.close()


def best_fit(targets: Sequence[Target], device: DeviceName, name: str) -> Fit:
    """The best target of a component on ``device``; else on the host.

    Raises:
        BundleError: none fits; with all reasons.
    """
    reasons: list[str] = []
    for where in dict.fromkeys((device, HOST)):
        fits = [find_fit(target, where) for target in targets]
        if good := sorted((fit for fit in fits if fit.fits), key=lambda fit: fit.rank):
            if where != device:
                log.warning("%s runs on %s, since nothing of it runs on %s:%s", name, where, device, "".join(reasons))
            return good[0]
        reasons += [f"\n  {in_one_line(fit.target)}: {in_one_line(fit.reason, 400)}" for fit in fits]
    raise BundleError(f"nothing of {name} runs here:{''.join(reasons)}")
