"""Workers as actors of Ray: one for every GPU of the cluster, or on the CPU one for every few cores.

Ray is started without its dashboard, and reports nothing to anybody.
"""

import logging
import os
import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from cachec.compiler.calibration.workers import Answer, Crew, Hands, Lost, Place, Recipe, Worker
from cachec.runtime.device import CPU, CUDA
from cachec.runtime.errors import InputError, in_one_line, need

log = logging.getLogger(__name__)

CORES = 4  # of a worker on the CPU; all that a machine has if it has fewer
SECONDS_TO_ANSWER = 5.0  # for a cluster


@dataclass(frozen=True)
class RayCrew(Crew):
    """Actors of the cluster at ``address``, ``host:port``; ``None``: of one on this machine, for this work only.

    ``kind`` of device, ``cpu`` or ``cuda``; ``None``: GPUs if there are any.
    """

    address: str | None
    kind: str | None
    cores: int = CORES

    def check(self) -> None:
        """Find out in seconds whether there is a Ray, and a cluster at the address: Ray itself tries for minutes.

        Raises:
            MissingExtraError: Ray is not installed.
            InputError: the address is none, or nobody answers there.
        """
        need("ray", extra="ray", purpose="--workers ray")
        if self.address is None:
            return
        host, _, port = self.address.rpartition(":")
        if not host or not (port.isascii() and port.isdigit() and 0 < int(port) < 2**16):
            raise InputError(f"--workers ray:{self.address} names no cluster: write ray:HOST:PORT")
        try:
            socket.create_connection((host.strip("[]"), int(port)), SECONDS_TO_ANSWER).close()
        except OSError as error:
            raise InputError(
                f"no Ray cluster answers at {self.address} ({in_one_line(error)}): start one there with ray start --head, join "
                "it here with ray start --address, or take --workers ray"
            ) from error

    @contextmanager
    def start(self, recipe: Recipe[Any, Any, Any]) -> Iterator["Actors"]:
        os.environ["RAY_USAGE_STATS_ENABLED"] = "0"  # looked at when Ray is imported, and by what it starts
        import ray

        self._connect(ray)
        try:
            yield Actors(ray, recipe, self.shares(ray))
        finally:
            ray.shutdown()  # ends the actors, too

    def _connect(self, ray: Any) -> None:
        own = {"address": "local", "include_dashboard": False}
        given = own if self.address is None else {"address": self.address}
        try:
            ray.init(**given, logging_level=logging.ERROR)
        except (ConnectionError, RuntimeError, ValueError) as error:
            where = "on this machine" if self.address is None else f"at {self.address}"
            raise InputError(f"Ray cannot be used {where}: {in_one_line(error)}") from error

    def shares(self, ray: Any) -> list["Share"]:
        """What every worker gets.

        Raises:
            InputError: there is no GPU, and GPUs are asked for.
        """
        nodes = {node["NodeID"]: node["Resources"] for node in ray.nodes() if node["Alive"]}
        gpus = [node for node, has in nodes.items() for _ in range(int(has.get("GPU", 0)))]
        if self.kind == CUDA and not gpus:
            raise InputError("device is cuda, but no machine of the Ray cluster has a GPU: use --device cpu")
        if gpus and self.kind != CPU:
            return [Share(node, {"num_gpus": 1, "num_cpus": 0}, Place(self.kind)) for node in gpus]
        shares = []
        for node, has in nodes.items():
            cores = int(has.get("CPU", 0))
            count = max(1, cores // self.cores) if cores else 0
            shares += [Share(node, {"num_cpus": cores // count}, Place(self.kind, cores // count)) for _ in range(count)]
        if not shares:
            raise InputError("no machine of the Ray cluster has a core for Ray: start them with ray start --num-cpus")
        return shares


@dataclass(frozen=True)
class Share:
    """A worker's part of a machine: which ``node`` of the cluster, what is reserved there, and what the tool is told."""

    node: str
    reserved: dict[str, int]
    place: Place


class Actors(Hands):
    """Actors that work. What they answer is fetched when it is there."""

    def __init__(self, ray: Any, recipe: Recipe[Any, Any, Any], shares: Sequence[Share]) -> None:
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        self._ray = ray
        self.names = [f"{number} of {len(shares)} on Ray" for number in range(1, len(shares) + 1)]
        kind = ray.remote(Worker)
        self._actors = [
            kind.options(**one.reserved, scheduling_strategy=NodeAffinitySchedulingStrategy(one.node, soft=False)).remote()
            for one in shares
        ]
        asked = [actor.open.remote(recipe, one.place) for actor, one in zip(self._actors, shares, strict=True)]
        self._asked: dict[Any, int] = {answer: worker for worker, answer in enumerate(asked)}

    def give(self, worker: int, task: Any) -> None:
        self._asked[self._actors[worker].do.remote(task)] = worker

    def hear(self, seconds: float) -> list[tuple[int, Answer]]:
        ready, _ = self._ray.wait(list(self._asked), num_returns=1, timeout=seconds)
        return [(self._asked.pop(answer), self._fetch(answer)) for answer in ready]

    def _fetch(self, answer: Any) -> Answer:
        try:
            found: Answer = self._ray.get(answer)
        except self._ray.exceptions.RayError as error:
            log.debug("a worker is lost", exc_info=error)
            cause = getattr(error, "cause", None) or error  # an exception of the worker's, where it is not its death
            return Lost(f"is lost: {type(cause).__name__}: {in_one_line(cause)}")
        return found
