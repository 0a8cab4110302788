"""distillation of Qwen3-VL-4B-Instruct.

Command:   python -m mgsd_jax.main --stage=distillation \\
               --config=configs/distillation_4b.py --workdir=DIR
Hardware:  a TPU slice of 16 v5e chips (v5e:4x4), or more memory.
Expected:  by the compiler (docs/preflight/4b_v5e-4x4.md), 7.42 GiB of a chip's 15.75 and at least
           8.31 s for a step that samples 65,536 tokens and reads 196,608. Speed and accuracy: not
           measured.
"""

import pathlib
import runpy

from mgsd_jax import config as c

_SHARED = runpy.run_path(str(pathlib.Path(__file__).with_name("qwen3vl.py")))


def get_config() -> c.Config:
    """The shared recipe at this size."""
    return _SHARED["recipe"]("4B", ("grounding", "distillation"))
