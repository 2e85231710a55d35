"""What calls cost, and who shares them: what ``lanes`` go by when they make calls, and the policy when it reckons them.

All times are in seconds.
"""

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass

PACE_SHARE = 0.05  # of what the last tick took, in the pace of all


@dataclass(frozen=True)
class Meeting:
    """A call of a request on ``rows`` rows, and who may join it: those whose ``meets`` is equal, too; ``None``: nobody.

    ``name``: what costs are called; ``computes``: a run of the model; ``asks``: what a request ``brings`` must be equal, too.
    """

    name: str
    rows: int
    meets: Hashable = ()
    computes: bool = False
    asks: bool = False


@dataclass(frozen=True)
class Costs:
    """Seconds of a call, by its name and the rows of the batch that it is made in, padding included.

    What the host does around them: ``tick`` seconds in every tick, ``request`` for each request in it, and ``call`` for each
    call of each request.
    """

    seconds: Mapping[str, Mapping[int, float]]
    tick: float = 0.0
    request: float = 0.0
    call: float = 0.0

    def bucket(self, name: str, rows: int) -> int:
        """The smallest batch with room for ``rows``, or the largest there is."""
        buckets = self.seconds[name]
        return min((bucket for bucket in buckets if bucket >= rows), default=max(buckets))

    def of(self, name: str, rows: int) -> float:
        return self.seconds[name][self.bucket(name, rows)]

    def scaled(self, factor: float) -> "Costs":
        """All of them so many times as long: as ticks that were seen took, beside what they should have."""
        seconds = {name: {rows: factor * one for rows, one in some.items()} for name, some in self.seconds.items()}
        return Costs(seconds, factor * self.tick, factor * self.request, factor * self.call)

    def aside(self, calls: Sequence[Meeting]) -> float:
        """What a request adds to a tick that it is in, if nobody shares its calls but those of the model."""
        return self.request + sum(self.call + (0.0 if one.computes else self.of(one.name, one.rows)) for one in calls)

    def share(self, group: Sequence[Meeting]) -> bool:
        """Is one call of all their rows better than one for each? Of the model it is, as the policy has found."""
        name, rows = group[0].name, [one.rows for one in group]
        if sum(rows) > max(self.seconds[name]):
            return False
        return group[0].computes or self.of(name, sum(rows)) <= sum(self.of(name, count) for count in rows)


def pace_after(pace: float, seconds: float, reckoned: float) -> float:
    """How many times what they cost ticks take, when one more was seen: others use a machine, too. At least 1."""
    return max(1.0, pace + PACE_SHARE * (seconds / reckoned - pace)) if reckoned > 0 else pace


def groups_of(calls: Mapping[int, tuple[Meeting, bytes]]) -> list[list[int]]:
    """Who makes the next call now, together with whom. ``calls``: that of each request by number, and what it brings.

    Runs of the model wait until all are there, so that most are shared.
    """
    ready = {number: one for number, one in calls.items() if not one[0].computes} or calls
    groups = dict[Hashable, list[int]]()
    for number, (call, brings) in ready.items():
        alone = number if call.meets is None else None
        groups.setdefault((call.name, call.meets, brings if call.asks else b"", alone), []).append(number)
    return list(groups.values())


def seconds_of(parts: Sequence[tuple[Sequence[Meeting], bytes]], costs: Costs) -> float:
    """What a tick takes in which requests make these calls, one after another; beside them stands what each brings."""
    seconds, made = costs.tick + costs.request * len(parts), [0] * len(parts)
    while heads := {place: (calls[made[place]], brings) for place, (calls, brings) in enumerate(parts)
                    if made[place] < len(calls)}:  # fmt: skip
        for group in groups_of(heads):
            calls = [heads[place][0] for place in group]
            rows = [one.rows for one in calls]
            shared = [sum(rows)] if len(group) == 1 or costs.share(calls) else rows
            seconds += sum(costs.of(calls[0].name, count) for count in shared) + costs.call * len(group)
            for place in group:
                made[place] += 1
    return seconds
