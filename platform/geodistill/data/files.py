"""Folders, local or s3://, through pyarrow: every access to raw data and shards goes through here."""

import errno
import hashlib
import json
import os
import re
import shutil
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache, partial
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pyarrow as pa
from filelock import FileLock
from pyarrow import fs


def absolute_path(folder: str) -> str:
    """A local path made absolute; a URI and "" stay as they are."""
    return str(Path(folder).absolute()) if folder and "://" not in folder else folder


def open_folder(folder: str | Path, create: bool = False) -> fs.FileSystem:
    """The file system whose root is `folder`, a local path or a URI such as s3://bucket/key. Raises ValueError.

    s3:// takes endpoint, region and credentials from the environment (AWS_ENDPOINT_URL, AWS_REGION, AWS_ACCESS_KEY_ID ...) or
    from the machine's role.
    """
    if "://" not in str(folder):
        found, path = fs.LocalFileSystem(), str(Path(folder).absolute())
    else:
        try:
            found, path = _remote(str(folder))
        except (OSError, ValueError) as error:
            shown = re.sub(r"(?<=://)[^/]*@|\?.*", "", str(folder))  # without what may be secret
            raise ValueError(f"{shown} cannot be opened ({error}); give a local path or s3://bucket/key") from error
    if create:
        found.create_dir(path, recursive=True)
    return fs.SubTreeFileSystem(path, found)


@lru_cache(maxsize=256)
def _remote(uri: str) -> tuple[fs.FileSystem, str]:
    """(file system, path in it) of a URI. One of S3 tries each request up to ten times, and for longer than pyarrow's own."""
    parts = urlsplit(uri)
    if parts.scheme != "s3":
        return fs.FileSystem.from_uri(uri)
    if parts.username or parts.query:
        raise ValueError(
            "endpoint, region and credentials come from the environment or the machine's role, never from an address"
        )
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
    options: dict[str, Any] = {"endpoint_override": endpoint, "region": region}
    if not options["endpoint_override"] and not options["region"]:
        options["region"] = fs.resolve_s3_region(parts.hostname or "")
    if endpoint:
        _reach(endpoint)
    retry = fs.AwsStandardS3RetryStrategy(max_attempts=10)
    options = {key: value for key, value in options.items() if value}
    return fs.S3FileSystem(retry_strategy=retry, **options), f"{parts.hostname}{parts.path}"


def _reach(endpoint: str, attempts: int = 5) -> None:
    """Raise OSError where nobody listens at an endpoint: of a wrong address S3's own retries would tell after minutes."""
    if any(name.lower() in ("http_proxy", "https_proxy", "all_proxy") for name in os.environ):
        return
    parts = urlsplit(endpoint if "//" in endpoint else f"//{endpoint}")
    port = parts.port or (80 if parts.scheme == "http" else 443)
    for attempt in range(attempts):
        try:
            socket.create_connection((parts.hostname or "", port), timeout=10).close()
            return
        except OSError as error:
            if attempt == attempts - 1:
                raise OSError(f"nobody listens at AWS_ENDPOINT_URL={endpoint}: {error}") from error
            time.sleep(2.0**attempt)


def retried(work: Callable[[], Any], attempts: int = 6) -> Any:
    """What `work` returns; again after a second, two, four ... where storage fails (OSError), up to `attempts` times.

    Not where trying again cannot help: a missing file, no right to it, a full disk.
    """
    hopeless = (FileNotFoundError, PermissionError, NotADirectoryError, IsADirectoryError)
    for attempt in range(attempts):
        try:
            return work()
        except OSError as error:
            if attempt == attempts - 1 or isinstance(error, hopeless) or error.errno == errno.ENOSPC:
                raise
            time.sleep(2.0**attempt)
    raise AssertionError


def exists(files: fs.FileSystem, name: str) -> bool:
    """Is there a file of that name?"""
    return files.get_file_info(name).is_file


@contextmanager
def writing(files: fs.FileSystem, name: str) -> Iterator[pa.NativeFile]:
    """A stream to `name`, which appears whole or not at all."""
    with files.open_output_stream(name + ".tmp") as stream:
        yield stream
    files.move(name + ".tmp", name)


def write_json(files: fs.FileSystem, name: str, value: dict) -> None:
    with writing(files, name) as stream:
        stream.write(json.dumps(value, indent=1).encode())


def read_json(files: fs.FileSystem, name: str) -> dict:
    def read() -> bytes:
        with files.open_input_stream(name) as stream:
            return stream.read()

    return json.loads(retried(read))


def sha256_of(files: fs.FileSystem, name: str) -> str:
    with files.open_input_stream(name) as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def upload(local: Path, folder: str, name: str) -> None:
    """Copy a local folder to `folder`/`name`."""
    files = open_folder(folder, create=True)
    files.create_dir(name)
    here = fs.LocalFileSystem()
    retried(lambda: fs.copy_files(str(local), name, source_filesystem=here, destination_filesystem=files))


def local(folder: str | Path, weights: bool = True) -> Path:
    """A local folder with the files that lie in `folder`: that folder itself where it is local; else a copy, made once for all
    processes of a node (below ~/.cache/geodistill, or GEODISTILL_CACHE) and anew where files there have changed. weights=False:
    without *.safetensors. Empty where there is nothing. Raises ValueError, OSError where the store cannot be read."""
    if "://" not in str(folder):
        return Path(folder)
    there = open_folder(folder)
    listed = retried(lambda: there.get_file_info(fs.FileSelector("", allow_not_found=True)))
    found = sorted((one.path, one.size, one.mtime_ns) for one in listed if one.is_file)
    wanted = [one for one in found if weights or not one[0].endswith(".safetensors")]
    digest = hashlib.sha256(json.dumps([str(folder), wanted]).encode()).hexdigest()[:24]
    cache = Path(os.environ.get("GEODISTILL_CACHE", "~/.cache/geodistill")).expanduser()
    copy, part = cache / digest, cache / f"{digest}.part"
    cache.mkdir(parents=True, exist_ok=True)
    with FileLock(cache / f"{digest}.lock"):
        if not copy.is_dir():
            shutil.rmtree(part, ignore_errors=True)
            part.mkdir()
            for name, *_ in wanted:
                destination, here = str(part / Path(name).name), fs.LocalFileSystem()
                retried(partial(fs.copy_files, name, destination, source_filesystem=there, destination_filesystem=here))
            part.rename(copy)
    return copy
