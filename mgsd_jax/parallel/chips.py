"""What the makers' sheets say of a chip, and how much of its memory a program may have."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Chip:
    """One device: of a TPU slice, or a GPU."""

    name: str
    flops: float  # dense bfloat16 peak, FLOP/s
    hbm_gib: float  # what libtpu 0.0.52 leaves to programs: a little less than the sheet says
    hbm_bytes_per_s: float
    link_bytes_per_s: float  # between chips, in one direction, all links of a chip together


# By `jax.Device.device_kind`. Sources: https://docs.cloud.google.com/tpu/docs/{v5e,v6e,v5p}.
CHIPS = {
    "TPU v5 lite": Chip("v5e", 197e12, 15.75, 819e9, 200e9),
    "TPU v6 lite": Chip("v6e", 918e12, 31.24, 1600e9, 400e9),
    "TPU v5": Chip("v5p", 459e12, 95.73, 2765e9, 600e9),
}

# By the same name, and of NVIDIA's data sheets: bfloat16 without sparsity, NVLink in one direction.
# Memory is in whole GiB, a little less than the driver shows.
GPUS = {
    "NVIDIA H100 80GB HBM3": Chip("h100", 989e12, 79.0, 3350e9, 450e9),
    "NVIDIA H200": Chip("h200", 989e12, 139.0, 4800e9, 450e9),
    "NVIDIA A100-SXM4-80GB": Chip("a100-80g", 312e12, 79.0, 2039e9, 300e9),
    "NVIDIA A100-SXM4-40GB": Chip("a100-40g", 312e12, 39.0, 1555e9, 300e9),
}
