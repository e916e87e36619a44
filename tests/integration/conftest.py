"""A real local Ray for the integration tests, one for the whole session."""

import os
from pathlib import Path

import pytest
from tiny import settings, train

from geodistill.config import Config


@pytest.fixture(scope="session")
def ray_cluster():
    """Started by the project's own `connect`, stopped at the end; never joins another cluster."""
    import ray

    from geodistill.cluster import connect

    os.environ["RAY_ADDRESS"] = "local"
    connect()
    yield
    ray.shutdown()


@pytest.fixture(scope="session")
def first(ray_cluster, tmp_path_factory) -> Config:
    """A prepared data set, a teacher, a baseline and a distilled student, all trained by one worker over two micro-batches."""
    from geodistill.data.prepare import prepare

    config = settings(tmp_path_factory.mktemp("train") / "one")
    prepare(config, parallel=True)
    train(settings(Path(config.run), "role=teacher"), "finetune")
    train(config, "finetune")
    train(config, "distill")
    return config
