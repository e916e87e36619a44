"""A real local Ray for the integration tests, one for the whole session."""

import os

import pytest


@pytest.fixture(scope="session")
def ray_cluster():
    """Started by the project's own `connect`, stopped at the end; never joins another cluster."""
    import ray

    from geodistill.cluster import connect

    os.environ["RAY_ADDRESS"] = "local"
    connect()
    yield
    ray.shutdown()
