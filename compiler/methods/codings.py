"""How a method keeps the features of a model."""

from cachec.compiler.graphs.coding import Coding
from cachec.compiler.methods.base import CodedMethod, Method
from cachec.compiler.methods.parameters import Parameters
from cachec.compiler.models.base import Settings
from cachec.passes import Graphs
from cachec.passes.base import outputs
from cachec.runtime.abi import COMPUTE, FEATURE
from cachec.runtime.errors import InputError


def coding_of(split: Graphs, settings: Settings, method: Method, parameters: Parameters | None) -> Coding | None:
    """How a method keeps the features of split graphs. Raises as ``CodedMethod.coding``."""
    if not isinstance(method, CodedMethod):
        return None
    shape = tuple(map(int, outputs(split.modules[COMPUTE])[FEATURE].meta["val"].shape[1:]))
    if len(shape) != 2:
        raise InputError(f"{method.name} takes features of tokens with channels, and at this cut they are {list(shape)}")
    return method.coding(shape, settings, parameters)
