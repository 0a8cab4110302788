"""What the makers' sheets say of a chip, and how much of its memory a program may have."""

import dataclasses
from collections.abc import Sequence

# What it takes data to go from one chip of a TPU slice to the next, however small they are. Source:
# https://jax-ml.github.io/scaling-book/sharding, "A note on ICI latency". The same page measured
# 8 us for a small gather over three hops of v5e, so that 2.7 us a hop is what one may meet.
HOP_SECONDS = 1e-6


@dataclasses.dataclass(frozen=True)
class Chip:
    """One device: of a TPU slice, or a GPU."""

    name: str
    flops: float  # dense bfloat16 peak, FLOP/s
    hbm_gib: float  # that programs may have; of a TPU what libtpu 0.0.52 leaves
    hbm_bytes_per_s: float
    link_bytes_per_s: float  # of one link to a neighbour in one direction; of a GPU all together
    ring: int = 0  # a side of this length, or a multiple of it, is closed to a ring; 0: none is

    def hops(self, side: int) -> int:
        """From a chip to the farthest of a row of chips."""
        return side // 2 if self._is_ring(side) else side - 1

    def links(self, sides: Sequence[int]) -> int:
        """To the neighbours of a corner of a slice: one along each side, two where it is a ring."""
        return sum(1 + self._is_ring(side) for side in sides if side > 1)

    def _is_ring(self, side: int) -> bool:
        return self.ring > 0 and side % self.ring == 0


# By `jax.Device.device_kind`. Sources: https://docs.cloud.google.com/tpu/docs/{v5e,v6e,v5p,tpu7x};
# rings and what a link carries: https://jax-ml.github.io/scaling-book/tpus.
CHIPS = {
    "TPU v5 lite": Chip("v5e", 197e12, 15.75, 819e9, 50e9, ring=16),
    "TPU v6 lite": Chip("v6e", 918e12, 31.24, 1600e9, 100e9, ring=16),
    "TPU v5": Chip("v5p", 459e12, 95.73, 2765e9, 100e9, ring=4),
    # A device is one half of a chip of this generation, and has half of what the sheet says of one.
    "TPU7x": Chip("tpu7x", 1153.5e12, 94.74, 3690e9, 50e9, ring=4),
}

# By the same name, and of NVIDIA's data sheets: bfloat16 without sparsity, NVLink in one direction.
# Memory is in whole GiB, a little less than the driver shows.
GPUS = {
    "NVIDIA H100 80GB HBM3": Chip("h100", 989e12, 79.0, 3350e9, 450e9),
    "NVIDIA H200": Chip("h200", 989e12, 139.0, 4800e9, 450e9),
    "NVIDIA A100-SXM4-80GB": Chip("a100-80g", 312e12, 79.0, 2039e9, 300e9),
    "NVIDIA A100-SXM4-40GB": Chip("a100-40g", 312e12, 39.0, 1555e9, 300e9),
}
