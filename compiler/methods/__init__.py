"""Forecasting methods by name. One file each; imported only when asked for."""

import importlib

from cachec.compiler.methods.base import Method
from cachec.runtime.errors import unknown_name

METHODS = {
    "adams": "cachec.compiler.methods.adams:Adams",
    "bns": "cachec.compiler.methods.bns:Bns",
    "foca": "cachec.compiler.methods.foca:FoCa",
    "gram": "cachec.compiler.methods.gram:Gram",
    "gram-hidden": "cachec.compiler.methods.gram_hidden:GramHidden",
    "hicache": "cachec.compiler.methods.hicache:HiCache",
    "l2p": "cachec.compiler.methods.l2p:L2p",
    "lesa": "cachec.compiler.methods.lesa:Lesa",
    "newton": "cachec.compiler.methods.newton:Newton",
    "reuse": "cachec.compiler.methods.reuse:Reuse",
    "spectrum": "cachec.compiler.methods.spectrum:Spectrum",
    "taylor": "cachec.compiler.methods.taylor:Taylor",
}


def get_method(name: str) -> type[Method]:
    """The class of a method.

    Raises:
        InputError: there is no such method; with the nearest name.
    """
    if name not in METHODS:
        raise unknown_name("method", name, METHODS)
    module, _, attribute = METHODS[name].partition(":")
    method: type[Method] = getattr(importlib.import_module(module), attribute)
    return method
