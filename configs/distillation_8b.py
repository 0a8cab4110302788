"""distillation of Qwen3-VL-8B-Instruct.

Command:   python -m mgsd_jax.main --stage=distillation \\
               --config=configs/distillation_8b.py --workdir=DIR
Hardware:  a TPU slice of 16 v5e chips (v5e:4x4), or more memory.
Expected:  speed not measured; fits, by docs/preflight/8b_v5e-4x4.md.
"""

import pathlib
import runpy

from mgsd_jax import config as c

_SHARED = runpy.run_path(str(pathlib.Path(__file__).with_name("qwen3vl.py")))


def get_config() -> c.Config:
    """The shared recipe at this size."""
    return _SHARED["recipe"]("8B", ("grounding", "distillation"))
