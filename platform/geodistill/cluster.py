"""Join the Ray cluster this process runs in, or start a local one."""

import logging
import math
import os
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import ray
from ray.util.placement_group import placement_group, remove_placement_group
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from geodistill.cli import JobFailed
from geodistill.config import ClusterConfig

Nodes = list[dict[str, float]]  # the resources of each

# What every process of a run needs in its environment; set before deepspeed is imported anywhere.
ENVIRONMENT = {
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",  # a report costs one poll of the controller: 0.2 s instead of 2 s
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",  # or every line of a worker is printed twice
    # On a CPU the trainer shares its cores with data tasks; OpenMP threads that spin for a late one cost a fifth of the speed.
    "GOMP_SPINCOUNT": "2000",
    "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_HUB_OFFLINE": "1",
}


_started = False  # by `connect`, in this process


def free_port() -> int:
    """A port of this machine that nobody listens at."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def connect() -> None:
    """Initialise Ray once: the cluster of RAY_ADDRESS or of this machine, else a local Ray of its own.

    A local Ray gets at least four logical CPUs: they are only accounting, and with two of them one trainer and its
    data tasks would wait for each other for ever. RAY_ADDRESS=local asks for a Ray of its own in any case.
    """
    if ray.is_initialized():
        return
    os.environ.update({k: v for k, v in ENVIRONMENT.items() if k not in os.environ})
    address = os.environ.get("RAY_ADDRESS", "auto")
    # A submitted job brings its runtime environment along (runtime-env.yaml), and Ray refuses a second one.
    submitted = "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ
    runtime_env = None if submitted else {"env_vars": dict(ENVIRONMENT)}
    if address != "local":
        try:
            ray.init(address=address, runtime_env=runtime_env, log_to_driver=True)
            return
        except ConnectionError as error:
            if "RAY_ADDRESS" in os.environ:
                raise JobFailed(
                    f"no Ray answers at RAY_ADDRESS={address}: start it, correct the address, or set RAY_ADDRESS=local for a "
                    f"Ray of this job's own ({error})"
                ) from error
    global _started
    _started = True
    os.environ.pop("RAY_ADDRESS", None)
    port = free_port()
    # Ray Train frees the workers of a finished run through the dashboard's API: without it, or with another cluster's, they
    # are held for ever.
    api = {"RAY_API_SERVER_ADDRESS": f"http://127.0.0.1:{port}"}
    os.environ.update(api)
    ray.init(
        address="local",
        num_cpus=max(4, os.cpu_count() or 1),
        include_dashboard=True,
        dashboard_host="127.0.0.1",
        dashboard_port=port,
        runtime_env={"env_vars": {**ENVIRONMENT, **api}},
        log_to_driver=True,
        # Ray ends a process that was idle for a second: each window of data would start, and import torch, in a new one. And it
        # remembers 100,000 calls that have ended, some 3 KB each: the looks at workers alone are ten a second.
        _system_config={"idle_worker_killing_time_threshold_ms": 600_000, "task_events_max_num_task_in_gcs": 10_000},
    )


def quiet_data() -> Any:
    """Ray Data's DataContext in this process, without its progress bars and what it tells of every execution: jobs tell their own
    progress, and the log files of Ray have the rest."""
    import ray.data

    logging.getLogger("ray.data").setLevel(logging.WARNING)
    logging.getLogger("ray.data._internal.progress").setLevel(logging.ERROR)  # that there are no bars
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    return context


def on_node(node: str, work: Callable, *arguments: Any, gpus: int = 0) -> ray.ObjectRef:
    """`work` as a task on a node, which takes none of its CPUs."""
    strategy = NodeAffinitySchedulingStrategy(node, soft=False)
    options = {"num_cpus": 0, "num_gpus": gpus, "scheduling_strategy": strategy, "max_retries": 0}
    return ray.remote(work).options(**options).remote(*arguments)


def nothing() -> None:
    """What a node does to show that it is there."""


def answering(seconds: float = 20.0) -> Nodes:
    """The nodes that answer: Ray counts a lost one for half a minute more, and would wait for it without an end."""
    asked = {on_node(node["NodeID"], nothing): node for node in ray.nodes() if node["Alive"]}
    done, late = ray.wait([*asked], num_returns=len(asked), timeout=seconds)
    for task in late:
        ray.cancel(task, force=True)
    found: Nodes = []
    for task in done:
        with suppress(ray.exceptions.RayError):
            ray.get(task)
            found.append(asked[task]["Resources"])
    return found


def nodes() -> Nodes:
    """The nodes that Ray takes for alive."""
    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


def total(nodes: Nodes, name: str) -> float:
    """How much of a resource the nodes have together."""
    return sum(node.get(name, 0.0) for node in nodes)


def places(nodes: Nodes, cpus: float, gpu: bool) -> int:
    """How many processes of `cpus` CPUs, and a GPU each where `gpu`, the nodes hold: none can lie on two of them."""
    return sum(int(min(node.get("CPU", 0.0) / cpus, node.get("GPU", 0.0) if gpu else math.inf) + 1e-9) for node in nodes)


def can_grow() -> bool:
    """May nodes join this Ray? Not one that `connect` has started here. Of others Ray does not tell whether they have an
    autoscaler, or somebody who starts nodes."""
    return not _started


def wait_for(
    fits: Callable[[Nodes], int], bundles: list[dict[str, float]], seconds: float, told: threading.Event | None = None
) -> int:
    """What `fits` makes of the nodes that answer, once that is not 0; 0 after `seconds`, or once `told` is set. Until then an
    autoscaler is asked for `bundles`, by a placement group: it adds to what other jobs ask for, and ends with this one."""
    until, asked = time.time() + seconds, None
    try:
        while not (found := fits(answering())) and time.time() < until and not (told and told.is_set()):
            asked = asked or placement_group(bundles)
            time.sleep(1)
        return found
    finally:
        if asked:
            remove_placement_group(asked)


def need(
    who: str,
    fits: Callable[[Nodes], int],
    lacks: Callable[[Nodes], str],
    bundles: list[dict[str, float]],
    seconds: float,
    told: threading.Event | None = None,
    again: bool = False,
) -> int:
    """What `fits` makes of the nodes, which are waited for where some may join; 0 only where `told` is set meanwhile.

    again: after a failure, where they are waited for in any case. Raises ValueError with what `lacks` says.
    """
    if not again:
        if found := fits(nodes()):
            return found
        if not can_grow():
            raise ValueError(lacks(nodes()))
        print(f"[{who}] {lacks(nodes())}; until then it waits, up to {seconds:.0f} s, for nodes that join", flush=True)
    found = wait_for(fits, bundles, seconds, told)
    if not found and not (told and told.is_set()):
        raise ValueError(lacks(nodes()))
    return found


def need_one(who: str, cluster: ClusterConfig) -> None:
    """Return once there is a node for an actor that holds a model, as `need` does: Ray Data would wait for it without an end."""
    resources = {"CPU": 0.5} | ({"GPU": 1.0} if cluster.use_gpu else {})
    lacks = "cluster.use_gpu=true needs a GPU, but this Ray has none; set cluster.use_gpu=false"
    lacks = lacks if cluster.use_gpu else "half a CPU is needed, but this Ray has none: start a node that has"
    need(who, lambda found: places(found, 0.5, cluster.use_gpu), lambda _: lacks, [resources], cluster.wait)
