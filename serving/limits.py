"""What a server takes: every limit in one place, each refused in words where it is met."""

from dataclasses import dataclass, fields

from cachec.runtime.errors import InputError

EDITS = "/v1/images/edits"
STRENGTHS = (0.2, 0.4, 0.6, 0.8)  # of requests with a picture that lanes are made ready for where nobody says


@dataclass(frozen=True)
class Limits:
    """Of one server, all bundles together where nothing else is said.

    ``queue``: samples that may wait for a bundle, beside those in its lanes. Of a request: ``samples`` (``n``), ``prompt`` in
    characters, ``pixels`` of all its samples and frames, ``body`` in bytes, ``picture`` bytes of a body with one. Seconds:
    ``body_seconds`` until a head is there, and again until its body is, ``seconds`` until a request is made, ``grace`` for
    what runs when the server stops. ``kept``: results that wait.
    """

    queue: int = 64
    samples: int = 8
    prompt: int = 4000
    pixels: int = 256_000_000
    body: int = 1_000_000
    picture: int = 20_000_000
    body_seconds: float = 10.0
    seconds: float = 600.0
    grace: float = 30.0
    kept: int = 64

    def __post_init__(self) -> None:
        for one in fields(self):
            least = 0 if one.name in ("queue", "grace") else 1e-3
            if not getattr(self, one.name) >= least:
                raise InputError(f"the limit {one.name} is {getattr(self, one.name)}; it must be {least:g} or more")

    def body_at(self, path: str) -> int:
        """Bytes of a request to this path."""
        return self.picture if path == EDITS else self.body
