"""Which loads each system is asked, and the minutes they take: rates follow what was measured of systems, not of loads."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from bench.serving_loads import WITHIN, Load

CACHED = ("lanes", "one at a time", "whole requests")
SLOW = ("lanes uncached", "diffusers eager")  # asked less where it is of how much they do at most
EXACT, WITH_EXACT = "exact", "and exact"
ORDERS = ("lanes fifo", "lanes shortest")  # without deadlines
START = 25.0  # seconds until a server is there, about


@dataclass(frozen=True)
class Setting:
    """How a model is asked. ``shares``: of what lanes serve at most; ``own``: of what a slow system does itself, beside ``at``.

    ``exact``: shares where one request of ten computes every step.
    ``few`` requests suffice where only the simulator is held to them, at the shares of ``checks``. ``balanced``: shares where
    that level is asked alone. ``flat``: requests over which memory is watched; ``alone`` and ``loop``: requests one by one of
    each kind, and in the closed loop; ``beside``: in a closed loop before and after each load, as a shared machine is not
    always as fast.
    """

    systems: tuple[str, ...]
    count: int
    shares: tuple[float, ...]
    at: float
    own: Mapping[str, float] = field(default_factory=dict)
    checks: tuple[float, ...] = ()
    few: int = 0
    alone: int = 15
    loop: int = 96
    beside: int = 0
    flat: int = 0
    balanced: tuple[float, ...] = ()
    exact: tuple[float, ...] = ()


SETTINGS = {
    "tiny-flux": Setting(
        ("lanes", *ORDERS, "lanes no batch", "one at a time", "whole requests", "lanes uncached", "diffusers eager"),
        count=1000,
        shares=(0.5, 0.9, 1.1, 1.5),
        at=1.1,
        own={"lanes uncached": 1.5, "diffusers eager": 4.0},
        checks=(0.5, 0.9, 1.5),
        few=300,
        beside=96,
        flat=10_000,
        balanced=(0.9, 1.1),
        exact=(1.1,),
    ),
    "flux-shaped": Setting((*CACHED, "lanes uncached"), count=40, shares=(0.9, 1.4), at=1.4, alone=3, loop=16),
}


def setting_of(system, setting):
    """The setting with fewer requests where a system is slow."""
    if system not in SLOW:
        return setting
    return replace(setting, alone=max(1, setting.alone // 3), loop=max(8, setting.loop // 6), beside=setting.beside // 6)


def loads_of(system, setting, first, found):
    """The loads of a system. ``first``: what is known of lanes; ``found``: of this system."""
    most, own = first["busy"]["rate"], found["busy"]["rate"]
    kinds = tuple(first["facts"]["kinds"])

    def at(rate, count=setting.count, of=kinds, mix="mixed"):
        return Load(float(f"{rate:.3g}"), count, of, rate < 0.97 * own, mix)

    if system in CACHED:
        loads = [at(share * most) for share in setting.shares]
        if system == "lanes" and setting.balanced:
            seconds = first["facts"]["seconds"]
            faster = sum(seconds.values()) / len(seconds) / seconds["balanced"]
            loads += [at(share * most * faster, of=("balanced",), mix="balanced") for share in setting.balanced]
        if setting.exact and EXACT in first["idle"]:
            drawn, alone = one_of_ten(kinds), first["idle"]
            less = sum(alone[kind] for kind in kinds) / len(kinds) / (sum(alone[kind] for kind in drawn) / len(drawn))
            loads += [at(share * most * less, of=drawn, mix=WITH_EXACT) for share in setting.exact]
        if system == "lanes":
            loads += [at(share * most, setting.few) for share in setting.checks if share not in setting.shares]
        return loads
    if system in ORDERS:
        return [at(setting.at * most), *(at(share * most, setting.few) for share in setting.checks)]
    if system == "lanes no batch":
        return [at(setting.at * most)]
    if system in setting.own:
        return [at(setting.own[system] * own), at(setting.at * most)]
    return [at(share * most) for share in setting.shares]


def one_of_ten(kinds):
    """Every kind as often as the others, and one of ten exact."""
    return (*kinds * 9, *(EXACT,) * len(kinds))


def seconds_of(load, found):
    """What a load takes, about."""
    slowest = max(found["idle"].values())
    return load.count / load.rate + WITHIN * slowest


def flat_seconds(setting, found):
    """Until the server's memory has been watched, beside the loads that it has had by then."""
    left = [one.count for one in loads_of("lanes", setting, found, found) if one.name not in found["loads"]]
    served = sum(left) + (len(left) + 1) * setting.beside * bool(left)
    return max(0, setting.flat - served) / (found["busy"]["rate"] * fastest(found)[1])


def fastest(found):
    """The kind that takes least, and how much more of it than of all kinds alike lanes serve."""
    seconds = found["facts"]["seconds"]
    kind = min(seconds, key=seconds.get)
    return kind, sum(seconds.values()) / len(seconds) / seconds[kind]


def plan(data, setting):
    """Lines of a table, and minutes in all: those that are there count for nothing."""
    lines, total, first = [], 0.0, data["systems"]["lanes"]
    for system in setting.systems:
        found = data["systems"][system]
        left = 0.0
        for load in loads_of(system, setting, first, found):
            there = load.name in found["loads"]
            took = 0.0 if there else seconds_of(load, first if system != "diffusers eager" else found)
            if not there:
                took += setting_of(system, setting).beside / found["busy"]["rate"]
            left += took
            how = "keeps up" if load.keeps_up else "cut"
            lines.append([system, load.mix, load.rate, load.count, how, _minutes(there, took)])
        if system == "lanes" and setting.flat:
            there = "flat" in found
            took = 0.0 if there else flat_seconds(setting, found)
            left += took
            lines.append([system, fastest(found)[0], "8 clients", setting.flat, "memory", _minutes(there, took)])
        total += left + START * (left > 0)
    return lines, total / 60


def _minutes(there, seconds):
    return "there" if there else f"{seconds / 60:.1f} min"
