"""What programs are compiled for, without it: a slice by libtpu, a GPU by JAX's plugin for CUDA."""

import contextlib
import dataclasses
import importlib.metadata
import os
from collections.abc import Sequence

import jax
from jax.experimental import topologies
from jax.sharding import Mesh

from mgsd_jax.config import Config
from mgsd_jax.parallel import sharding
from mgsd_jax.parallel.axes import AXES
from mgsd_jax.parallel.chips import CHIPS, GPUS, Chip

# By platform: packages that hold its compiler, and what installs the first.
_PACKAGES = {
    "tpu": (("libtpu",), "libtpu"),
    "gpu": (("jax-cuda13-pjrt", "jax-cuda12-pjrt"), "'jax[cuda13]'"),
}


@dataclasses.dataclass(frozen=True)
class _Cores:
    """The multiprocessors of a GPU, of NVIDIA's data sheets and CUDA programming guide."""

    capability: int  # compute capability, the first number
    count: int
    lanes: int  # float32 operations that one starts in a cycle
    shared: int  # bytes of shared memory of one; a block gets all but 1 KiB
    l2: int  # bytes of the cache before the memory
    ghz: float


_AMPERE = _Cores(8, 108, 64, 164 << 10, 40 << 20, 1.41)
_HOPPER = _Cores(9, 132, 128, 228 << 10, 50 << 20, 1.98)
_CORES = {"h100": _HOPPER, "h200": _HOPPER, "a100-80g": _AMPERE, "a100-40g": _AMPERE}


def target_mesh(config: Config) -> Mesh:
    """The mesh of `config.mesh` over the chips of `config.preflight.topology`."""
    name = config.preflight.topology
    devices = _gpu(name) if name in _CORES else _slice(name)
    sizes = {axis: getattr(config.mesh, axis) for axis in AXES}
    return sharding.make_mesh(**sizes, devices=devices)


def find_chip(mesh: Mesh) -> Chip:
    """The chips of a mesh. Raises ValueError for a kind whose data sheet is not known."""
    kind, known = mesh.devices.flat[0].device_kind, CHIPS | GPUS
    if kind not in known:
        raise ValueError(f"preflight.topology: got chips {kind!r}, want one of {sorted(known)}")
    return known[kind]


def compiler(mesh: Mesh) -> tuple[str, str]:
    """(name, version) of the package that holds the compiler."""
    return _installed(mesh.devices.flat[0].platform)


def _installed(platform: str) -> tuple[str, str]:
    """`compiler` for 'tpu' or 'gpu'. Raises ValueError where it is not installed."""
    wanted, install = _PACKAGES[platform]
    for package in wanted:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            return package, importlib.metadata.version(package)
    raise ValueError(f"preflight: package {wanted[0]} not found; install it: pip install {install}")


def _slice(name: str) -> Sequence[object]:
    _installed("tpu")
    # libtpu would ask a cloud's server what machine this is, and would run in one process alone.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    try:
        return list(topologies.get_topology_desc(platform="tpu", topology_name=name).devices)
    except (jax.errors.JaxRuntimeError, ValueError) as error:
        raise ValueError(
            f"preflight.topology: got {name!r}, want a slice such as v5e:4x4, v6e:2x4, "
            f"v5p:2x2x2, or one of {', '.join(_CORES)} ({str(error).splitlines()[0]})"
        ) from None


def _gpu(name: str) -> Sequence[object]:
    """One GPU, described in the text form of XLA's GpuTargetConfigProto."""
    package, _ = _installed("gpu")
    kind, chip = next((kind, chip) for kind, chip in GPUS.items() if chip.name == name)
    cores, registers = _CORES[name], 65536
    described = f"""
      platform_name: "CUDA"
      device_description_str: "{kind}"
      dnn_version_info {{ major: 9 minor: 10 }}
      runtime_version {{ major: {package[8:10]} }}
      gpu_device_info {{
        cuda_compute_capability {{ major: {cores.capability} }}
        core_count: {cores.count}
        fpus_per_core: {cores.lanes}
        clock_rate_ghz: {cores.ghz}
        threads_per_warp: 32
        threads_per_block_limit: 1024
        threads_per_core_limit: 2048
        block_dim_limit_x: {2**31 - 1}
        block_dim_limit_y: {2**16 - 1}
        block_dim_limit_z: {2**16 - 1}
        registers_per_core_limit: {registers}
        registers_per_block_limit: {registers}
        shared_memory_per_block: {48 << 10}
        shared_memory_per_block_optin: {cores.shared - 1024}
        shared_memory_per_core: {cores.shared}
        l2_cache_size: {cores.l2}
        memory_bandwidth: {chip.hbm_bytes_per_s:.0f}
        device_memory_size: {chip.hbm_gib * 2**30:.0f}
      }}
    """
    topology = topologies.get_topology_desc(
        platform="cuda", topology="1x1x1", target_config=described
    )
    return list(topology.devices)
