"""How a method keeps the features of a model."""

from cachec.compiler.graphs.coding import Coding
from cachec.compiler.methods.base import CodedMethod, Method
from cachec.compiler.methods.parameters import Parameters
from cachec.compiler.models.base import Settings
from cachec.passes import Graphs
from cachec.passes.base import outputs
from cachec.runtime.abi import COMPUTE, FEATURE


def coding_of(split: Graphs, settings: Settings, method: Method, parameters: Parameters | None) -> Coding | None:
    """How a method keeps the features of split graphs. Raises as ``Method.coding``."""
    if not isinstance(method, CodedMethod):
        return None
    feature = outputs(split.modules[COMPUTE])[FEATURE].meta["val"]
    return method.coding(tuple(map(int, feature.shape[1:])), settings, parameters)
