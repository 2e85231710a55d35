"""Classes by name: those of this package, those that a program registers, and those of installed packages."""

import importlib
from collections.abc import Iterator, Mapping
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from cachec.runtime.errors import InputError, missing_extra, unknown_name


class Registry(Mapping[str, Any]):
    """A mapping from names to classes, each imported when it is asked for.

    ``known`` are this package's own, as ``module:Class``, whose packages come with ``extra``; installed packages add theirs as
    entry points of ``group``. A name means one class: where two packages bring one, neither is taken.
    """

    def __init__(self, kind: str, group: str, known: Mapping[str, str], *, extra: str = "compile") -> None:
        self._kind, self._group, self._extra = kind, group, extra
        self._known: dict[str, Any] = dict(known)

    def register(self, name: str, cls: type | str) -> None:
        """Let ``name`` mean ``cls``, a class or ``module:Class``.

        Raises:
            InputError: the name means another class already.
        """
        if self._known.get(name, cls) != cls:
            raise InputError(f"{self._kind} {name!r} means {self._known[name]} already: register {cls} under another name")
        self._known[name] = cls

    def __getitem__(self, name: str) -> Any:
        """The class.

        Raises:
            InputError: nothing has this name, with the nearest one; or two packages have it, with both.
            MissingExtraError: a package that this one's class needs is not installed.
        """
        claims = [self._known[name]] if name in self._known else []
        claims += [point for point in entry_points(group=self._group) if point.name == name]
        if not claims:
            raise unknown_name(self._kind, name, self)
        if len(claims) > 1:
            both = " and ".join(_package(claim) for claim in claims)
            raise InputError(f"{self._kind} {name!r} comes with {both}: uninstall one of them")
        (found,) = claims
        if isinstance(found, EntryPoint):
            return found.load()
        if isinstance(found, str):
            return self._import(name, found)
        return found

    def __contains__(self, name: object) -> bool:
        return name in set(self)

    def __iter__(self) -> Iterator[str]:
        return iter(sorted({*self._known, *(point.name for point in entry_points(group=self._group))}))

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def _import(self, name: str, place: str) -> Any:
        module, _, attribute = place.partition(":")
        try:
            return getattr(importlib.import_module(module), attribute)
        except ModuleNotFoundError as error:
            if error.name is None or error.name.startswith(__package__.partition(".")[0]):
                raise
            raise missing_extra(error.name, self._extra, f"{self._kind} {name!r}") from error


def _package(claim: Any) -> str:
    """The package that a class is of, by what names it."""
    if isinstance(claim, EntryPoint):
        return claim.module.partition(".")[0] if claim.dist is None else claim.dist.name
    place: str = claim if isinstance(claim, str) else claim.__module__
    return place.partition(".")[0]
