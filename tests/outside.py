"""A family from outside: the package of ``examples/auraflow_family``, found by its entry point as an installed one is."""

import sys
import tomllib
from pathlib import Path

SOURCE = Path(__file__).resolve().parent.parent / "examples" / "auraflow_family"


def install(site: Path) -> None:
    """Let this process find the package: its file, and what an installer writes of it into ``site``."""
    project = tomllib.loads((SOURCE / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    metadata = site / f"{project['name'].replace('-', '_')}-{project['version']}.dist-info"
    metadata.mkdir(parents=True)
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n")
    groups = [f"[{group}]\n" + "\n".join(f"{name} = {place}" for name, place in points.items())
              for group, points in project["entry-points"].items()]  # fmt: skip
    (metadata / "entry_points.txt").write_text("\n".join(groups))
    sys.path += [str(SOURCE), str(site)]
