"""Both stages of Qwen3-VL-4B-Instruct on one GPU of 24 GB, adapters in both.

Command:   python -m mgsd_jax.main --stage=STAGE --config=configs/gpu_4b_24gb.py --workdir=DIR
           with generate, grounding, distillation, evaluate, export, report for STAGE.
Hardware:  one GPU of 24 GB. JAX takes three quarters of it unless
           XLA_PYTHON_CLIENT_MEM_FRACTION=0.92 is set.
Expected:  memory by arithmetic, see `benchmarks/memory.py`. Speed and accuracy: not measured.

`gpu_4b.py` with 16 prompts a step, one row a microbatch, and smaller chunks of logits.
"""

import dataclasses
import pathlib
import runpy

from mgsd_jax import config as c

_LARGE = runpy.run_path(str(pathlib.Path(__file__).with_name("gpu_4b.py")))


def get_config() -> c.Config:
    """The run of `gpu_4b.py` in smaller pieces."""
    large: c.Config = _LARGE["get_config"]()
    return dataclasses.replace(
        large,
        grounding=dataclasses.replace(large.grounding, microbatches=32, token_chunk=512),
        distillation=dataclasses.replace(
            large.distillation, batch_size=16, steps=2800, microbatches=16, token_chunk=512
        ),
        evaluate=dataclasses.replace(large.evaluate, batch_size=16),
        preflight=dataclasses.replace(large.preflight, hbm_gib=22.0),
    )
