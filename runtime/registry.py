"""Classes by name: those of this package, those that a program registers, and those of installed packages."""

import importlib
from collections.abc import Iterator, Mapping
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from cachec.runtime.errors import InputError, missing_extra, unknown_name


class Registry(Mapping[str, Any]):
    """A mapping from names to classes, each imported when it is asked for.

    ``known`` are this package's own, as ``module:Class``, whose packages come with ``extra``; installed packages add theirs as
    entry points of ``group``. A name means one class: this package's own come first.
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
            InputError: nothing has this name; with the nearest one.
            MissingExtraError: a package that this one's class needs is not installed.
        """
        found = self._known.get(name) or self._installed().get(name)
        if found is None:
            raise unknown_name(self._kind, name, self)
        if isinstance(found, EntryPoint):
            return found.load()
        if isinstance(found, str):
            return self._import(name, found)
        return found

    def __contains__(self, name: object) -> bool:
        return name in self._known or name in self._installed()

    def __iter__(self) -> Iterator[str]:
        return iter(sorted({*self._known, *self._installed()}))

    def __len__(self) -> int:
        return len({*self._known, *self._installed()})

    def _import(self, name: str, place: str) -> Any:
        module, _, attribute = place.partition(":")
        try:
            return getattr(importlib.import_module(module), attribute)
        except ModuleNotFoundError as error:
            if error.name is None or error.name.startswith(__package__.partition(".")[0]):
                raise
            raise missing_extra(error.name, self._extra, f"{self._kind} {name!r}") from error

    def _installed(self) -> dict[str, EntryPoint]:
        return {point.name: point for point in entry_points(group=self._group)}
