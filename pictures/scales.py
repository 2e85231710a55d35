"""Scales of guidance that a request asks for, checked against what a bundle has."""

from dataclasses import dataclass
from typing import Self

from cachec.runtime.errors import InputError
from cachec.runtime.session import LoadedBundle


@dataclass(frozen=True)
class Scales:
    """``guidance``, and the ``true`` one beside an embedded one."""

    guidance: float
    true: float

    @classmethod
    def of(cls, loaded: LoadedBundle, *, guidance: float | None, true: float | None, negative: bool) -> Self:
        """Those of a request; ``None`` is the bundle's. ``negative``: it has a negative prompt.

        Raises:
            InputError: the bundle's model takes no such scale, or its Programs have no negative branch.
        """
        check_scales(loaded, guidance=guidance, true=true, negative=negative)
        settings = loaded.manifest.settings
        return cls(
            float(settings["guidance"] if guidance is None else guidance),
            float(settings["true_cfg_scale"] if true is None else true),
        )

    def of_branches(self, setting: str) -> float:
        """The scale at which two branches are combined, by the setting that it is."""
        return self.guidance if setting == "guidance" else self.true


def check_scales(loaded: LoadedBundle, *, guidance: float | None, true: float | None, negative: bool) -> None:
    """Raise ``InputError`` unless requests of a bundle can have these scales, and a negative prompt if they have one."""
    io = loaded.io
    two_branches = any(program.key.guided for program in loaded.programs.values())
    if negative and not two_branches:
        raise InputError(
            "--negative-prompt: the bundle's requests have no negative branch"
            + (
                "; compile it at a scale that has one (--guidance, or --true-cfg-scale beside an embedded one)"
                if io.guidance
                else ", as its model has none: leave it out"
            )
        )
    if true is not None and not two_branches:
        raise InputError(f"--true-cfg-scale {true:g}: the bundle's requests have no negative branch; compile it with one")
    if guidance is not None and not two_branches and "guidance" not in io.conditions:
        raise InputError(
            f"--guidance {guidance:g}: the bundle's requests have no guidance scale: leave it out, or compile at one"
        )
