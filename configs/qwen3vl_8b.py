"""Qwen3-VL-8B-Instruct, every stage, with the settings of the public release.

Command:   python -m mgsd_jax.main --stage=grounding --config=configs/qwen3vl_8b.py --workdir=DIR
Hardware:  twice the memory of configs/qwen3vl_4b.py, which says what is in it.
Expected:  not measured (no pretrained weights at hand). Published macro average: 17.2 -> 35.6.
"""

import dataclasses
import pathlib
import runpy

from mgsd_jax import config as c


def get_config() -> c.Config:
    """The 4B recipe with the 8B weights: the release changes nothing else."""
    small: c.Config = runpy.run_path(str(pathlib.Path(__file__).with_name("qwen3vl_4b.py")))[
        "get_config"
    ]()
    return dataclasses.replace(
        small, model=dataclasses.replace(small.model, path="models/Qwen3-VL-8B-Instruct")
    )
