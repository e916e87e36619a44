"""Folders, local or s3://, through pyarrow: every file of a run, its data and its models is reached through here.

One file: `open_folder` and the functions that take what it returns. A folder that a library reads: `local`; writes: `written`.
"""

import errno
import hashlib
import json
import os
import re
import shutil
import socket
import tempfile
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

MOST_COPIED = 5 * 10**9  # bytes of a file that S3 moves or copies by itself


def absolute_path(folder: str) -> str:
    """A local path made absolute; a URI and "" stay as they are."""
    return str(Path(folder).absolute()) if folder and "://" not in folder else folder


def open_folder(folder: str | Path, create: bool = False) -> fs.FileSystem:
    """The file system whose root is `folder`, a local path or a URI such as s3://bucket/key. Raises ValueError.

    s3:// takes endpoint, region and credentials from the environment (AWS_ENDPOINT_URL, AWS_REGION, AWS_ACCESS_KEY_ID ...) or
    from the machine's role.
    """
    found, path = located(folder)
    if create:
        found.create_dir(path, recursive=True)
    return fs.SubTreeFileSystem(path, found)


def beside(file: str | Path, create: bool = False) -> tuple[fs.FileSystem, str]:
    """(the folder that holds a file, the file's name in it), as `open_folder` does."""
    folder, name = os.path.split(str(file))
    return open_folder(folder or ".", create), name


def located(folder: str | Path) -> tuple[fs.FileSystem, str]:
    """(file system, path in it) of a folder, as Ray takes them. Raises ValueError."""
    if "://" not in str(folder):
        return fs.LocalFileSystem(), str(Path(folder).absolute())
    try:
        return _remote(str(folder))
    except (OSError, ValueError) as error:
        shown = re.sub(r"(?<=://)([^/]*:.*@|[^/]*@)|\?.*", "", str(folder))  # without what may be secret
        raise ValueError(f"{shown} cannot be opened ({error}); give a local path or s3://bucket/key") from error


@lru_cache(maxsize=256)
def _remote(uri: str) -> tuple[fs.FileSystem, str]:
    """(file system, path in it) of a URI. One of S3 tries each request up to ten times, and for longer than pyarrow's own."""
    if not uri.startswith("s3://"):
        return fs.FileSystem.from_uri(uri)
    bucket, _, key = uri.removeprefix("s3://").partition("/")  # not as a URL: a key may hold what has a meaning there, # for one
    if "@" in bucket or ":" in bucket or "?" in uri:
        raise ValueError(
            "endpoint, region and credentials come from the environment or the machine's role, never from an address"
        )
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
    options: dict[str, Any] = {"endpoint_override": endpoint, "region": region}
    if not options["endpoint_override"] and not options["region"]:
        options["region"] = fs.resolve_s3_region(bucket)
    if endpoint:
        _reach(endpoint)
    retry = fs.AwsStandardS3RetryStrategy(max_attempts=10)
    options = {key: value for key, value in options.items() if value}
    return fs.S3FileSystem(retry_strategy=retry, **options), f"{bucket}/{key}" if key else bucket


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
        size = stream.tell()
    if size < MOST_COPIED:
        files.move(name + ".tmp", name)
    else:
        _copy(files, name + ".tmp", files, name)
        files.delete_file(name + ".tmp")


def _copy(source: fs.FileSystem, name: str, destination: fs.FileSystem, other: str) -> None:
    """A file, through this process."""
    with source.open_input_stream(name) as read, destination.open_output_stream(other) as out:
        while piece := read.read(2**24):
            out.write(piece)


def write_text(files: fs.FileSystem, name: str, text: str) -> None:
    def write() -> None:
        with writing(files, name) as stream:
            stream.write(text.encode())

    retried(write)


def read_text(files: fs.FileSystem, name: str) -> str:
    def read() -> bytes:
        with files.open_input_stream(name) as stream:
            return stream.read()

    return retried(read).decode()


def write_json(files: fs.FileSystem, name: str, value: Any) -> None:
    write_text(files, name, json.dumps(value, indent=1))


def read_json(files: fs.FileSystem, name: str) -> dict:
    return json.loads(read_text(files, name))


def read_lines(files: fs.FileSystem, name: str) -> list[dict]:
    """The whole lines of a file of JSON lines: a process that was killed may have left half of one. [] where there is none."""
    lines = read_text(files, name).split("\n")[:-1] if exists(files, name) else []
    return [json.loads(line) for line in lines]


def sha256_of(files: fs.FileSystem, name: str) -> str:
    with files.open_input_stream(name) as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def upload(here: Path, folder: str) -> None:
    """Copy a local folder into `folder`."""
    files = open_folder(folder, create=True)
    retried(lambda: fs.copy_files(str(here), "", source_filesystem=fs.LocalFileSystem(), destination_filesystem=files))


@contextmanager
def written(folder: str | Path) -> Iterator[Path]:
    """A local folder to write into: `folder` itself where it is local, else an empty one that is copied there at the end."""
    if "://" not in str(folder):
        Path(folder).mkdir(parents=True, exist_ok=True)
        yield Path(folder)
        return
    with tempfile.TemporaryDirectory() as here:
        yield Path(here)
        upload(Path(here), str(folder))


def replace_folder(source: str, destination: str) -> None:
    """Put a copy of the folder `source` in the place of `destination`."""
    files, there = located(destination)
    if files.get_file_info(there).type == fs.FileType.Directory:
        files.delete_dir(there)
    read, out = open_folder(source), open_folder(destination, create=True)
    for one in read.get_file_info(fs.FileSelector("", recursive=True)):
        if one.is_file:
            if "/" in one.path:
                out.create_dir(os.path.dirname(one.path), recursive=True)
            retried(partial(_copy, read, one.path, out, one.path))  # not copy_files: S3 copies 5 GB at most by itself


def lock(name: str) -> FileLock:
    """A lock among the processes of this node."""
    cache = _cache()
    cache.mkdir(parents=True, exist_ok=True)
    return FileLock(cache / f"{_digest(name)}.lock")


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:24]


def _cache() -> Path:
    return Path(os.environ.get("GEODISTILL_CACHE", "~/.cache/geodistill")).expanduser()


def local(folder: str | Path, weights: bool = True) -> Path:
    """A local folder with the files that lie in `folder`: that folder itself where it is local; else a copy, made once for all
    processes of a node (below ~/.cache/geodistill, or GEODISTILL_CACHE) and anew where files there have changed; older ones go
    after a day. weights=False: without *.safetensors. Empty where there is nothing. Raises ValueError, OSError where the store
    cannot be read."""
    if "://" not in str(folder):
        return Path(folder)
    there = open_folder(folder)
    listed = retried(lambda: there.get_file_info(fs.FileSelector("", allow_not_found=True)))
    found = sorted((one.path, one.size, one.mtime_ns) for one in listed if one.is_file)
    wanted = [one for one in found if weights or not one[0].endswith(".safetensors")]
    copies = _cache() / _digest(str(folder))
    copy, part = copies / _digest(json.dumps(wanted)), copies / "part"
    with lock(str(folder)):
        if not copy.is_dir():
            copies.mkdir(exist_ok=True)
            for old in copies.iterdir():  # who has one open keeps it
                if time.time() - old.stat().st_mtime > 86_400:
                    shutil.rmtree(old)
            shutil.rmtree(part, ignore_errors=True)
            part.mkdir()
            for name, *_ in wanted:
                destination, here = str(part / Path(name).name), fs.LocalFileSystem()
                retried(partial(fs.copy_files, name, destination, source_filesystem=there, destination_filesystem=here))
            part.rename(copy)
    return copy
