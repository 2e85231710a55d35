"""TensorRT for RTX: built without a GPU, finished on the user's when it is loaded."""

from cachec.engines.tensorrt import OnnxPlanBuilder, TensorRTFamily
from cachec.engines.tensorrt_library import TENSORRT_RTX


class TensorRTRtxEngine(TensorRTFamily):
    """TensorRT for RTX 1."""

    name = "tensorrt-rtx"
    vendor = TENSORRT_RTX


ENGINE = TensorRTRtxEngine
BUILDER = OnnxPlanBuilder(TensorRTRtxEngine, ("level", "workspace"))
