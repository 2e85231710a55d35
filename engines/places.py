"""Where bundles are: a directory, the Hugging Face Hub, or a tar in the OCI image layout, which registries take.

A bundle's files are named by their hashes and listed by its manifest, so that each of them is a layer, and a copy anywhere is
checked as the bundle itself is.
"""

import errno
import hashlib
import importlib.util
import io
import json
import logging
import re
import shutil
import tarfile
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

from cachec.runtime.bundle import FORMAT, MANIFEST, Bundle, is_inside
from cachec.runtime.errors import BundleError, InputError, in_one_line, missing_extra, shortened
from cachec.runtime.files import cache_folder, check_file, hash_file, reason_of, writing
from cachec.runtime.version import VERSION
from cachec.runtime.work import fresh_folder
from cachec.runtime.write import check_output

log = logging.getLogger(__name__)

HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*(?:@[\w./-]+)?", re.ASCII)  # owner/name, and a revision
LAYOUT, INDEX = "oci-layout", "index.json"
TITLE = "org.opencontainers.image.title"  # of a layer: its name in the bundle
EMPTY = b"{}"
CHUNK = 1 << 20
OTHER_CACHE = "let HF_HOME name another place"
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def find_bundle(place: str | Path) -> Path:
    """The directory of a bundle: of itself, of the copy of a Hub id (``owner/name``, ``owner/name@revision``), or of a tar.

    Copies are kept in the Hub's own cache and in cachec's; a tar is unpacked once.

    Raises:
        BundleError: the Hub has nothing of this name, or a file is no tar with a bundle.
    """
    path = Path(place)
    if path.is_dir():
        return path
    if path.is_file():
        return _unpacked(path)
    if not path.exists() and HUB_ID.fullmatch(str(place)):
        return pull(str(place))
    return path


# --- the Hub


def pull(name: str, out: Path | None = None) -> Path:
    """Fetch a bundle from the Hub; into the directory ``out``, by default into the Hub's cache. Returns where it is.

    What is fetched for ``out`` lies beside it until all is there: the same call goes on with it.

    Raises:
        BundleError: it is not there, cannot be fetched, or is no bundle.
        OutputError: ``out`` exists already, or there is no room for it, or in the Hub's cache.
    """
    hub = _hub("fetching a bundle from the Hub")
    repository, _, revision = name.partition("@")
    part = None
    if out is not None:
        check_output(out, force=False)
        part = out.resolve().with_name(f".{out.resolve().name}.{name.replace('/', '--')}.part")
    try:
        found = Path(hub.snapshot_download(repository, revision=revision or None, local_dir=part))
    except Exception as error:  # the library's errors, its client's, and OSError
        if isinstance(error, OSError) and error.errno in FULL:
            with writing(out) if out is not None else writing(Path(hub.constants.HF_HUB_CACHE), advice=OTHER_CACHE):
                raise
        raise BundleError(f"there is no directory {name}, and the Hub does not give it: {in_one_line(error)}") from error
    try:
        Bundle.open(found)
    except BundleError:
        if part is not None:  # else the same call would find it again
            shutil.rmtree(part)
        raise
    if out is not None:
        with writing(out):
            found = found.replace(out)
    return found


def push(root: Path, name: str, *, private: bool = False) -> str:
    """Put a bundle on the Hub as ``owner/name``, in one commit: what is there is replaced at once. Returns its address.

    Raises:
        BundleError: there is no bundle at ``root``, or it is damaged.
        InputError: the Hub does not take it, in its words.
    """
    hub = _hub("putting a bundle on the Hub")
    if not HUB_ID.fullmatch(name) or "@" in name:
        raise InputError(f"{shortened(name)} is no name on the Hub: give owner/name")
    bundle = Bundle.open(root, verify=True)
    files = [MANIFEST, *bundle.manifest.files]
    try:
        api = hub.HfApi()
        api.create_repo(name, private=private, exist_ok=True)
        done = api.upload_folder(
            repo_id=name, folder_path=root, allow_patterns=files, delete_patterns="*", commit_message=_message(bundle)
        )
    except Exception as error:  # the library's errors, its client's, and OSError
        raise InputError(f"the Hub does not take {name}: {in_one_line(error)}") from error
    return str(done.repo_url)


def _message(bundle: Bundle) -> str:
    return f"{bundle.manifest.model['name']}, {bundle.manifest.method['name']}, by cachec {VERSION}"


def _hub(purpose: str) -> Any:
    if importlib.util.find_spec("huggingface_hub") is None:
        raise missing_extra("huggingface_hub", "hub", purpose)
    import huggingface_hub

    return huggingface_hub


# --- a tar


def pack(root: Path, out: Path, *, force: bool = False) -> Path:
    """Write a bundle as a tar in the OCI image layout, a layer for each file: ``oras cp --from-oci-layout`` takes it.

    Raises:
        BundleError: there is no bundle at ``root``, or it is damaged.
        OutputError: ``out`` exists already, or cannot be written.
    """
    check_file(out, force=force)
    bundle = Bundle.open(root, verify=True)
    entries = {name: (str(entry["sha256"]), int(entry["bytes"])) for name, entry in bundle.manifest.files.items()}
    entries[MANIFEST] = hash_file(root / MANIFEST), (root / MANIFEST).stat().st_size
    layers = [
        {**_descriptor("application/octet-stream", *entry), "annotations": {TITLE: name}} for name, entry in entries.items()
    ]
    manifest = {
        "schemaVersion": 2,
        "mediaType": "application/vnd.oci.image.manifest.v1+json",
        "artifactType": f"application/vnd.{FORMAT}",
        "config": _descriptor("application/vnd.oci.empty.v1+json", hashlib.sha256(EMPTY).hexdigest(), len(EMPTY)),
        "layers": layers,
    }
    text = json.dumps(manifest).encode()
    digest = hashlib.sha256(text).hexdigest()
    whole = {
        **_descriptor(manifest["mediaType"], digest, len(text)),
        "annotations": {"org.opencontainers.image.ref.name": "latest"},
    }
    part = out.with_name(f".{out.name}.part")
    with writing(out):
        out.parent.mkdir(parents=True, exist_ok=True)
        try:
            with tarfile.open(part, "w") as tar:
                _add(tar, LAYOUT, json.dumps({"imageLayoutVersion": "1.0.0"}).encode())
                _add(tar, INDEX, json.dumps({"schemaVersion": 2, "manifests": [whole]}).encode())
                for content in (EMPTY, text):
                    _add(tar, f"blobs/sha256/{hashlib.sha256(content).hexdigest()}", content)
                for sha256, path in {entry[0]: root / name for name, entry in entries.items()}.items():
                    tar.add(path.resolve(), f"blobs/sha256/{sha256}", filter=_plain)
            part.replace(out)
        finally:
            part.unlink(missing_ok=True)
    return out


def _descriptor(kind: Any, sha256: str, size: int) -> dict[str, Any]:
    return {"mediaType": kind, "digest": f"sha256:{sha256}", "size": size}


def _add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    entry = tarfile.TarInfo(name)
    entry.size = len(content)
    tar.addfile(entry, io.BytesIO(content))


def _plain(entry: tarfile.TarInfo) -> tarfile.TarInfo:
    """Nothing of the machine that packs: no owner, no time."""
    entry.uid = entry.gid = entry.mtime = 0
    entry.uname = entry.gname = ""
    return entry


def _unpacked(path: Path) -> Path:
    """A folder in this machine's cache with what a tar holds; there already, if it was unpacked before.

    Raises:
        BundleError: it is no bundle in the OCI image layout, or damaged.
    """
    try:
        with tarfile.open(path, "r:") as tar:  # not compressed: files are read by their places
            text = _read(tar, _only(json.loads(_read(tar, INDEX))["manifests"], path)["digest"])
            layers = {str(one["annotations"][TITLE]): str(one["digest"]) for one in json.loads(text)["layers"]}
            out = cache_folder() / "bundles" / hashlib.sha256(text).hexdigest()
            if not (out / MANIFEST).is_file():
                _unpack(tar, layers, out)
    except (tarfile.TarError, KeyError, TypeError, ValueError) as error:
        raise BundleError(f"{path} is no bundle as cachec pack writes it: {in_one_line(error)}") from error
    except OSError as error:
        raise BundleError(f"{path} cannot be read: {reason_of(error)}") from error
    return out


def _only(manifests: Any, path: Path) -> Mapping[str, Any]:
    if len(manifests) != 1:
        raise BundleError(f"{path} holds {len(manifests)} artifacts, and a bundle is one")
    one: Mapping[str, Any] = manifests[0]
    return one


def _unpack(tar: tarfile.TarFile, layers: Mapping[str, str], out: Path) -> None:
    """Copy the layers into a folder beside ``out``, which then takes its place: it is whole or not there."""
    with fresh_folder(out.parent, f".{out.name}-") as folder:
        for name, digest in layers.items():
            if not is_inside(name):
                raise BundleError(f"a layer is called {shortened(name)}, which leaves the bundle: do not trust this file")
            target = folder / "whole" / name
            with writing(target):
                target.parent.mkdir(parents=True, exist_ok=True)
                with _blob(tar, digest) as source, target.open("wb") as file:
                    while content := source.read(CHUNK):
                        file.write(content)
        Bundle.open(folder / "whole")  # all hashes, before it is anybody's
        with writing(out):
            try:
                (folder / "whole").replace(out)
            except OSError:
                if not (out / MANIFEST).is_file():  # else another process was first
                    raise


def _blob(tar: tarfile.TarFile, digest: str) -> IO[bytes]:
    algorithm, _, value = digest.partition(":")
    source = tar.extractfile(f"blobs/{algorithm}/{value}") if algorithm == "sha256" else None
    if source is None:
        raise BundleError(f"it has no file for {shortened(digest)}: the copy is incomplete")
    return source


def _read(tar: tarfile.TarFile, name: str) -> bytes:
    """A small file of the layout, or a blob by its digest, which it must have."""
    if not name.startswith("sha256:"):
        source = tar.extractfile(name)
        return b"" if source is None else source.read(CHUNK)
    with _blob(tar, name) as blob:
        content = blob.read(8 * CHUNK)
    if hashlib.sha256(content).hexdigest() != name.partition(":")[2]:
        raise BundleError(f"{shortened(name)} has other bytes than its name says: the copy is damaged")
    return content
