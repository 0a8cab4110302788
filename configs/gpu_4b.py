"""Both stages of Qwen3-VL-4B-Instruct on one GPU of 80 GB, adapters in both.

Command:   python -m mgsd_jax.main --stage=STAGE --config=configs/gpu_4b.py --workdir=DIR
           with generate, grounding, distillation, evaluate, export, report for STAGE; with
           configs/gpu_4b.py:24gb on a smaller card.
Hardware:  one GPU of 80 GB, or of 24 GB (:24gb). Of the smaller one JAX takes three quarters unless
           XLA_PYTHON_CLIENT_MEM_FRACTION=0.92 is set.
Expected:  by XLA's compiler for an H100, and at least for a typical step and for the longest one,
           2.8 tokens of a draft kept a pass in the typical one, 1 in the longest:
           80gb grounding 12.46 GiB, 1.33 and 1.33 s (docs/preflight/gpu_4b_h100.md)
           80gb distillation 20.50 GiB, 1.87 and 6.35 s (docs/preflight/gpu_4b_h100.md)
           80gb evaluate 47.18 GiB, 0.664 and 30.4 s (docs/preflight/gpu_4b_h100.md)
           24gb grounding 9.61 GiB, 1.33 and 1.33 s (docs/preflight/gpu_4b_24gb_h100.md)
           24gb distillation 14.20 GiB, 1.12 and 4.4 s (docs/preflight/gpu_4b_24gb_h100.md)
           24gb evaluate 17.54 GiB, 0.451 and 15 s (docs/preflight/gpu_4b_24gb_h100.md)
           Speed and accuracy: not measured.

There is one copy of the base weights, in bfloat16: the student is the base with adapters, the
teacher is the base without. Distillation continues with grounding's adapters, which learn at ten
times the rate that the release has for all parameters.
"""

import dataclasses
import pathlib
import runpy

from mgsd_jax import config as c

_QWEN3VL = runpy.run_path(str(pathlib.Path(__file__).with_name("qwen3vl.py")))
ADAPTERS = c.LoraConfig(rank=16, alpha=32.0)


def get_config(memory: str = "80gb") -> c.Config:
    """The 4B run with adapters, of each kind of prompt one bucket; `qwen3vl.py` says why these.

    In 24 GB it has 16 prompts a step, one row a microbatch, smaller chunks of logits, and answers
    8 prompts at once, as an answer of 4,096 tokens has 0.6 GB of cache.
    """
    if memory not in ("24gb", "80gb"):
        raise ValueError(f"memory: got {memory!r}, want 24gb or 80gb")
    full: c.Config = _QWEN3VL["get_config"]("4b")
    large = dataclasses.replace(
        full,
        model=dataclasses.replace(full.model, remat="full"),  # as benchmarks/memory.py counts
        mesh=c.MeshConfig(),
        data=dataclasses.replace(full.data, sequence_buckets=(592,)),
        grounding=dataclasses.replace(full.grounding, lora=ADAPTERS, microbatches=4),
        distillation=dataclasses.replace(
            full.distillation,
            optim=c.OptimConfig(lr=1e-5, warmup=0.05),
            lora=ADAPTERS,
            microbatches=8,
        ),
        preflight=c.PreflightConfig(
            topology="h100", stages=("grounding", "distillation", "evaluate")
        ),
    )
    if memory == "80gb":
        return large
    return dataclasses.replace(
        large,
        grounding=dataclasses.replace(large.grounding, microbatches=32, token_chunk=512),
        distillation=dataclasses.replace(
            large.distillation, batch_size=16, steps=2800, microbatches=16, token_chunk=512
        ),
        evaluate=dataclasses.replace(large.evaluate, batch_size=8),
        preflight=dataclasses.replace(large.preflight, hbm_gib=22.0),
    )
