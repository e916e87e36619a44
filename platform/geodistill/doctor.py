"""Is this machine, or every node of this cluster, fit for a run? What is not, and what to do about it.

Every check gives Findings. What a node can say of itself runs as a task there; what concerns nodes together is compared here.
"""

import os
import resource
import shutil
import socket
import time
import uuid
from dataclasses import dataclass
from datetime import timedelta
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

import numpy as np
import ray
from packaging.requirements import Requirement

from geodistill.cluster import free_port, on_node
from geodistill.config import Config
from geodistill.data.files import open_folder

Verdict = Literal["ok", "look", "wrong"]
SAME = ("ray", "torch", "transformers", "deepspeed", "pyarrow")  # must agree over the nodes of a cluster
MEGABYTES, GIB = 16, 2**30
DISK_LEAST, DISK_GOOD = 2 * GIB, 20 * GIB
OPEN_FILES, CLOCK = 65536, 2.0


@dataclass
class Finding:
    """what: the check; found: in words; remedy: where it is not ok."""

    what: str
    found: str
    verdict: Verdict = "ok"
    remedy: str = ""


def packages() -> Finding:
    """Are the packages that this one needs there, in versions that it works with?"""
    wrong = []
    for text in metadata.requires("geodistill") or []:
        need = Requirement(text)
        if need.marker and not need.marker.evaluate({"extra": ""}):
            continue
        try:
            have = metadata.version(need.name)
        except metadata.PackageNotFoundError:
            have = ""
        if not have or not need.specifier.contains(have, prereleases=True):
            wrong.append(f"{need.name}{need.specifier} (here: {have or 'none'})")
    found = ", ".join(f"{name} {metadata.version(name)}" for name in SAME if name not in " ".join(wrong))
    if wrong:
        return Finding("packages", "; ".join(wrong), "wrong", "pip install -c constraints.txt -e .")
    return Finding("packages", found)


def gpus(wanted: bool) -> Finding:
    """Cards that torch can use; wanted: by cluster.use_gpu."""
    import torch

    if torch.cuda.is_available():
        cards = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
        names = ", ".join(f"{card.name} {card.total_memory / GIB:.0f} GiB" for card in cards)
        if wanted and not torch.cuda.is_bf16_supported():
            return Finding("GPUs", names, "look", "these cards have no bf16: set cluster.precision=fp32")
        return Finding("GPUs", names if wanted else f"{names}, not used: cluster.use_gpu=false")
    if not wanted:
        return Finding("GPUs", "none, and none asked for (cluster.use_gpu=false)")
    if torch.version.cuda is None:
        return Finding(
            "GPUs", f"torch {torch.__version__} is built for CPUs", "wrong", "install a torch with CUDA, or the cuda image"
        )
    remedy = (
        "install NVIDIA's driver (nvidia-smi must list the cards); in a container start it with GPUs (--gpus, nvidia.com/gpu)"
    )
    return Finding("GPUs", "none that torch can use", "wrong", remedy)


def shared_memory(object_store: float) -> Finding:
    """Does /dev/shm hold Ray's object store [bytes]?"""
    try:
        size = shutil.disk_usage("/dev/shm").total
    except FileNotFoundError:
        return Finding("shared memory", "no /dev/shm", "look", "Ray keeps objects in files then, which is slow")
    found = f"/dev/shm {size / GIB:.1f} GiB, object store {object_store / GIB:.1f} GiB"
    if size < object_store:
        return Finding(
            "shared memory", found, "wrong", "give the container more (--shm-size, emptyDir of medium Memory), or Ray less"
        )
    return Finding("shared memory", found)


def disk(folder: str) -> Finding:
    """Free space below a local folder."""
    path = Path(folder)
    while not path.exists():
        path = path.parent
    free = shutil.disk_usage(path).free
    found = f"{free / GIB:.0f} GiB at {folder}"
    if free < DISK_GOOD:
        verdict: Verdict = "wrong" if free < DISK_LEAST else "look"
        return Finding("free disk", found, verdict, "free some, or choose another run= or checkpoints= folder")
    return Finding("free disk", found)


def open_files() -> Finding:
    """How many files a process may have open."""
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    found = "unlimited" if most == resource.RLIM_INFINITY else str(most)
    if most != resource.RLIM_INFINITY and most < OPEN_FILES:
        return Finding("open files", found, "look", f"Ray wants {OPEN_FILES}: ulimit -n, or LimitNOFILE, before `ray start`")
    return Finding("open files", found)


def compiler() -> Finding:
    """Is there a C++ compiler?"""
    found = next((name for name in ("g++", "clang++", "c++") if shutil.which(name)), "")
    remedy = "install g++: DeepSpeed and torch.compile build small parts when they are first used"
    return Finding("compiler", found) if found else Finding("compiler", "none", "look", remedy)


def storage(key: str, folder: str, mark: str = "") -> Finding:
    """Can `folder` be written and read, and how fast? mark: a file that another node wrote there and that must be seen here."""
    name, data = f".doctor-{uuid.uuid4().hex}", os.urandom(MEGABYTES * 2**20)
    try:
        files = open_folder(folder, create=True)
        if mark and not files.get_file_info(mark).is_file:
            remedy = "put it on s3://, or on a file system that all nodes see (NFS, EFS ...)"
            return Finding(key, f"{folder} is another folder on this node", "wrong", remedy)
        start = time.perf_counter()
        with files.open_output_stream(name) as stream:
            stream.write(data)
        written = time.perf_counter()
        with files.open_input_stream(name) as stream:
            same = stream.read() == data
        read = time.perf_counter()
        for _ in range(5):
            files.get_file_info(name)
        asked = time.perf_counter()
        files.delete_file(name)
    except (OSError, ValueError) as error:
        remedy = (
            "check the address, the rights, and AWS_ENDPOINT_URL, AWS_REGION and credentials in the environment of every node"
        )
        return Finding(key, f"{folder}: {error}", "wrong", remedy)
    if not same:
        return Finding(key, f"{folder} gave back other bytes than were written", "wrong", "do not use this storage")
    rates = MEGABYTES / (written - start), MEGABYTES / (read - written)
    latency = (asked - read) / 5
    found = f"{folder}: writes {rates[0]:.0f} MB/s, reads {rates[1]:.0f} MB/s, answers in {1000 * latency:.1f} ms"
    if latency > 0.5 or min(rates) < 5:
        return Finding(key, found, "look", "that is slow: use storage nearer to the nodes")
    return Finding(key, found)


def ports(wanted: dict[str, int]) -> Finding:
    """Which of the ports {what for: port} of this machine are taken?"""
    taken = []
    for what, port in wanted.items():
        with socket.socket() as free:
            free.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                free.bind(("127.0.0.1", port))
            except OSError:
                taken.append(f"{port} ({what})")
    if taken:
        return Finding("ports", f"taken: {', '.join(taken)}", "look", "choose another port for it, or end what listens there")
    return Finding("ports", ", ".join(f"{port} ({what})" for what, port in wanted.items()) + " are free")


def token(address: str) -> Finding:
    """Does Ray ask for its token? address: of the node that this process runs on."""
    mode = os.environ.get("RAY_AUTH_MODE", "")
    if mode == "token" or address.startswith("127."):
        return Finding("Ray's token", f"RAY_AUTH_MODE={mode or 'not set'}")
    remedy = "export RAY_AUTH_MODE=token before `ray start`, on every node: who reaches Ray's ports can run anything"
    return Finding("Ray's token", f"RAY_AUTH_MODE={mode or 'not set'}", "look", remedy)


def meet(port_of_first: int, host: str, rank: int, world: int, use_gpu: bool) -> tuple[str, float]:
    """An all-reduce with the other processes of `world`: ("", GB/s that each gave and took), or (the reason why not, 0)."""
    import torch
    import torch.distributed as dist

    assert not dist.is_initialized(), "a process of its own"
    backend = "nccl" if use_gpu else "gloo"
    try:
        dist.init_process_group(
            backend, init_method=f"tcp://{host}:{port_of_first}", rank=rank, world_size=world, timeout=timedelta(seconds=60)
        )
        device = torch.device("cuda" if use_gpu else "cpu")
        values = torch.full((MEGABYTES * 2**18,), float(rank + 1), device=device)
        dist.all_reduce(values)
        expected = world * (world + 1) / 2
        if float(values.min()) != expected or float(values.max()) != expected:
            return f"{backend} gave a wrong sum", 0.0
        start = time.perf_counter()
        for _ in range(3):
            dist.all_reduce(values)
        if use_gpu:
            torch.cuda.synchronize()
        took = (time.perf_counter() - start) / 3
        return "", 2 * (world - 1) / world * values.nbytes / took / 1e9
    except (RuntimeError, ValueError) as error:
        return f"{backend}: {str(error).splitlines()[0]}", 0.0
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def look_at_node(config: Config, object_store: float, mark: str) -> dict[str, Any]:
    """What a node finds of itself, and its versions, for comparison."""
    found = [packages(), gpus(config.cluster.use_gpu), shared_memory(object_store), open_files(), compiler()]
    found += [storage(key, folder, mark if key == "run" else "") for key, folder in places(config).items()]
    if "://" not in config.run:
        found.append(disk(config.run))
    versions = {name: metadata.version(name) for name in SAME}
    return {"found": found, "versions": versions}


def places(config: Config) -> dict[str, str]:
    """The folders that a run writes, by the settings that name them."""
    named = {"run": config.run, "data.shards": config.data.shards, "checkpoints": config.checkpoints}
    return {key: folder for key, folder in named.items() if folder and (key == "run" or not folder.startswith(config.run))}


def examine(config: Config) -> dict[str, list[Finding]]:
    """The findings of every node of the Ray that this process is connected to, by its address; "together": of nodes together."""
    nodes = [node for node in ray.nodes() if node["Alive"]]
    mark = f".doctor-{uuid.uuid4().hex}"
    files = open_folder(config.run, create=True)
    with files.open_output_stream(mark) as stream:
        stream.write(b"seen")
    found: dict[str, list[Finding]] = {}
    versions = []
    waits = [
        on_node(node["NodeID"], look_at_node, config, node["Resources"].get("object_store_memory", 0), mark) for node in nodes
    ]
    for node, wait in zip(nodes, waits, strict=True):
        head = " (head)" if "node:__internal_head__" in node["Resources"] else ""
        name = f"{node['NodeManagerAddress']}{head}"
        name = name if name not in found else f"{name} {node['NodeID'][:6]}"
        try:
            result = ray.get(wait, timeout=600)
        except ray.exceptions.RayError as error:
            reason = str(getattr(error, "cause", error)).strip().splitlines()[-1]
            remedy = "install this package on the node, or send it along (--working-dir . --runtime-env runtime-env.yaml)"
            found[name] = [Finding("a task", reason, "wrong", remedy)]
        else:
            found[name] = result["found"]
            versions.append(result["versions"])
    files.delete_file(mark)
    found["together"] = [
        agreement(versions),
        clock(nodes),
        network(config, [node for node in nodes if not config.cluster.use_gpu or node["Resources"].get("GPU")]),
        token(ray.util.get_node_ip_address()),
        ports({"the endpoint": config.sweep.port}),
    ]
    return found


def agreement(versions: list[dict[str, str]]) -> Finding:
    """Do all nodes have the same versions of what they send each other?"""
    differ = [name for name in SAME if len({one[name] for one in versions}) > 1]
    if differ:
        words = "; ".join(f"{name}: {', '.join(sorted({one[name] for one in versions}))}" for name in differ)
        return Finding(
            "versions", f"nodes differ: {words}", "wrong", "install the same on all nodes (constraints.txt), or one image"
        )
    return Finding("versions", f"the same on {len(versions)} node{'s' * (len(versions) > 1)}")


def clock(nodes: list[dict]) -> Finding:
    """How far the clocks of nodes are from this one's at least [s]."""
    apart = 0.0
    for node in nodes:
        before = time.time()
        there = ray.get(on_node(node["NodeID"], now), timeout=60)
        apart = max(apart, before - there, there - time.time())
    found = f"at most {apart:.1f} s apart" if apart > 0 else "agree"
    if apart > CLOCK:
        return Finding("clocks", found, "look", "start NTP (chrony) on all nodes: S3 refuses requests that are minutes off")
    return Finding("clocks", found)


def now() -> float:
    """The time of a node [s]."""
    return time.time()


def network(config: Config, nodes: list[dict]) -> Finding:
    """An all-reduce over all nodes, over two processes where there is one."""
    use_gpu = config.cluster.use_gpu
    if not nodes:
        return Finding("NCCL", "no node with a GPU", "wrong", "start one, or set cluster.use_gpu=false")
    cards = int(nodes[0]["Resources"].get("GPU", 0))
    places = nodes if len(nodes) > 1 else nodes * (min(2, cards) if use_gpu else 2)
    name = "NCCL" if use_gpu else "gloo"
    host = places[0]["NodeManagerAddress"]
    port = ray.get(on_node(places[0]["NodeID"], free_port))
    waits = [
        on_node(node["NodeID"], meet, port, host, rank, len(places), use_gpu, gpus=int(use_gpu))
        for rank, node in enumerate(places)
    ]
    try:
        results = ray.get(waits, timeout=180)
    except ray.exceptions.RayError as error:
        results = [(type(error).__name__, 0.0)]
    reasons = [reason for reason, _ in results if reason]
    if reasons:
        remedy = "open all ports between the nodes; where a machine has several networks name the right one (NCCL_SOCKET_IFNAME, "
        return Finding(name, reasons[0], "wrong", f"{remedy}GLOO_SOCKET_IFNAME); NCCL_DEBUG=INFO tells more")
    rate = float(np.min([rate for _, rate in results]))
    where = f"{len(nodes)} nodes" if len(nodes) > 1 else f"{len(places)} processes of one node"
    return Finding(name, f"all-reduce over {where}: {rate:.2f} GB/s" if len(places) > 1 else "one process: nothing to reduce")


def doctor_text(found: dict[str, list[Finding]]) -> str:
    """The findings in words, node by node; what is not ok with its remedy."""
    marks = {"ok": "ok   ", "look": "LOOK ", "wrong": "WRONG"}
    lines = []
    for node, findings in found.items():
        lines.append(node)
        for one in findings:
            lines.append(f"  {marks[one.verdict]} {one.what:14} {one.found}")
            if one.remedy:
                lines.append(f"        {'':14} -> {one.remedy}")
    return "\n".join(lines)
