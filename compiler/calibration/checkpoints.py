"""Where a training stands, in a file that is the old one or the new one, never a part."""

import io
import json
from pathlib import Path
from typing import Any

import torch

from cachec.runtime.files import write_file


def write_checkpoint(path: Path, state: Any, **parts: Any) -> None:
    """Keep a dataclass of plain numbers, and tensors by name, as ``state_dict()`` gives them.

    Raises:
        OutputError: the file cannot be written.
    """
    buffer = io.BytesIO()
    torch.save({**parts, "state": json.dumps(vars(state))}, buffer)
    write_file(path, buffer.getbuffer())


def read_checkpoint(path: Path, device: torch.device | str) -> tuple[dict[str, Any], dict[str, Any]]:
    """What :func:`write_checkpoint` kept: the fields of ``state``, and the parts, their tensors on ``device``."""
    content: dict[str, Any] = torch.load(path, weights_only=True, map_location=device)
    return json.loads(content.pop("state")), content
