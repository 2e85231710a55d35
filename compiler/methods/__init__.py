"""Forecasting methods by name. One file each; imported only when asked for."""

from cachec.compiler.methods.base import Method
from cachec.runtime.registry import Registry

METHODS = Registry("method", "cachec.methods", {
    "adams": "cachec.compiler.methods.adams:Adams",
    "bns": "cachec.compiler.methods.bns:Bns",
    "disca": "cachec.compiler.methods.disca:Disca",
    "dyweight": "cachec.compiler.methods.dyweight:DyWeight",
    "foca": "cachec.compiler.methods.foca:FoCa",
    "freqca": "cachec.compiler.methods.freqca:FreqCa",
    "gram": "cachec.compiler.methods.gram:Gram",
    "gram-hidden": "cachec.compiler.methods.gram_hidden:GramHidden",
    "hicache": "cachec.compiler.methods.hicache:HiCache",
    "hyca": "cachec.compiler.methods.hyca:HyCa",
    "l2p": "cachec.compiler.methods.l2p:L2p",
    "lesa": "cachec.compiler.methods.lesa:Lesa",
    "linca": "cachec.compiler.methods.linca:LinCa",
    "newton": "cachec.compiler.methods.newton:Newton",
    "reuse": "cachec.compiler.methods.reuse:Reuse",
    "spectrum": "cachec.compiler.methods.spectrum:Spectrum",
    "svd-cache": "cachec.compiler.methods.svd_cache:SvdCache",
    "taylor": "cachec.compiler.methods.taylor:Taylor",
})  # fmt: skip


def get_method(name: str) -> type[Method]:
    """The class of a method.

    Raises:
        InputError: there is no such method; with the nearest name.
    """
    method: type[Method] = METHODS[name]
    return method
