"""Makes the helpers of this directory importable (``import fake_tensorrt``)."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parent))
