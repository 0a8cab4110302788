"""Meshes of TPUs that are not here: libtpu compiles for them all the same."""

import importlib.util
import os

import pytest
from jax.experimental import topologies
from jax.sharding import Mesh

from mgsd_jax.parallel import sharding


def tpu_mesh(topology: str, **sizes: int) -> Mesh:
    """The mesh over the chips of a topology such as 'v5e:2x2'; skips the test without libtpu."""
    if importlib.util.find_spec("libtpu") is None:
        pytest.skip("compiles for TPUs: want the package libtpu")
    os.environ["TPU_SKIP_MDS_QUERY"] = "1"  # or it asks a cloud's server what machine this is
    os.environ["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "1"  # no chip is taken: processes may share it
    devices = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    return sharding.make_mesh(**sizes, devices=devices)
