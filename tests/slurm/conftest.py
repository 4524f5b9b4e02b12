"""One cluster for the session; where none can be had its tests skip and say why, and fail under `DISTFT_CI=1`."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from .cluster import Cluster, NoClusterError


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Four idle nodes. A test that takes a node away or sets it down brings it back."""
    cluster = Cluster(tmp_path_factory.mktemp("slurm"))
    try:
        cluster.up()
    except NoClusterError as error:
        if os.environ.get("DISTFT_CI"):
            pytest.fail(f"{error}; .ci/run installs SLURM")
        pytest.skip(str(error).splitlines()[0])
    yield cluster
    cluster.down()
