"""``cachec serve``: from flags to a server."""

import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from cachec.runtime.errors import InputError, in_one_line, need
from cachec.serving.limits import Limits

log = logging.getLogger(__name__)
KEY = "CACHEC_API_KEY"
LOGGER = "cachec.serving"


def serve_bundles(
    bundles: Sequence[Path],
    *,
    told: Callable[[str], None],
    host: str = "127.0.0.1",
    port: int = 8000,
    api_key_file: Path | None = None,
    log_requests: bool = False,
    ray: bool = False,
    replicas: str = "1",
    gpus: float = 0.0,
    **rest: Any,
) -> None:
    """Serve until the process is told to stop; ``told`` hears where. ``rest``: limits, and how bundles are opened.

    Raises:
        CachecError: nothing is served: a bundle, a limit, the key or the address cannot be used.
    """
    need("fastapi", "uvicorn", "prometheus_client", extra="serve", purpose="cachec serve")
    from cachec.serving.guard import is_loopback

    if not bundles:
        raise InputError("there is nothing to serve: name a bundle")
    limits = Limits(**{one.name: rest.pop(one.name) for one in fields(Limits) if one.name in rest})
    key, only_here = read_key(api_key_file), is_loopback(host)
    if key is None and not only_here:
        log.warning("everybody who can reach %s can make pictures here: give an API key (--api-key-file)", host)
    if ray and log_requests:
        raise InputError("--log-requests is for one process, and replicas on Ray log by themselves: leave one of both out")
    if ray:
        need("ray", extra="ray", purpose="cachec serve --ray")
        os.environ["RAY_USAGE_STATS_ENABLED"] = "0"  # looked at when Ray is imported, and by what it starts
        from cachec.serving.ray import run_on_ray
        from cachec.serving.served import from_anywhere

        lanes = rest.pop("lanes")
        plan = {"bundles": [from_anywhere(bundle) for bundle in bundles], "replicas": replicas, "gpus": gpus, "lanes": lanes}
        file = None if api_key_file is None else str(api_key_file.resolve())
        run_on_ray(
            {**plan, "limits": limits, "key_file": file, "keyed": key is not None, "options": rest},
            host=host,
            port=port,
            told=told,
        )
        return
    from cachec.serving.app import make_app
    from cachec.serving.server import open_all, serve

    if log_requests:
        logging.getLogger(LOGGER).setLevel(logging.INFO)
    served = open_all(bundles, **rest)
    try:
        serve(
            make_app(served, limits=limits, key=key, log_requests=log_requests, only_here=only_here),
            host=host,
            port=port,
            told=told,
        )
    except KeyboardInterrupt:
        log.info("stopped")
    finally:
        for one in served:
            one.close()


def read_key(file: Path | None) -> str | None:
    """The API key, from a file or the environment.

    Raises:
        InputError: the file cannot be read, or has no key.
    """
    if file is None:
        return os.environ.get(KEY) or None
    try:
        key = file.read_text(encoding="utf-8").partition("\n")[0].strip()
    except (OSError, ValueError) as error:
        raise InputError(f"the API key cannot be read from {file}: {in_one_line(error)}") from error
    if not key:
        raise InputError(f"the first line of {file} is empty: write an API key there, or leave --api-key-file out")
    return key
