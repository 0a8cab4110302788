"""evaluate of Qwen3-VL-8B-Instruct.

Command:   python -m mgsd_jax.main --stage=evaluate --config=configs/evaluate_8b.py --workdir=DIR
Hardware:  a TPU slice of 16 v5e chips (v5e:4x4), or more memory.
Expected:  by the compiler (docs/preflight/evaluate_8b_v5e-4x4.md), 7.62 GiB of a chip's 15.75 and
           at least 11.5 s for a batch of 32 boards, 65,536 tokens. Speed and accuracy: not
           measured.
"""

import pathlib
import runpy

from mgsd_jax import config as c

_SHARED = runpy.run_path(str(pathlib.Path(__file__).with_name("qwen3vl.py")))


def get_config() -> c.Config:
    """The shared recipe at this size."""
    return _SHARED["recipe"]("8B", ("evaluate",))
