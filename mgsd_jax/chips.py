"""What the makers' sheets say of a chip, and how much of its memory a program may have."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Chip:
    """One device of a TPU slice."""

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
