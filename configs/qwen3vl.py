"""Qwen3-VL-4B and 8B Instruct by the settings of the public release, on a slice of TPUs.

Command:   python -m mgsd_jax.main --stage=STAGE --config=configs/qwen3vl.py:4b --workdir=DIR
           with generate, grounding, distillation, evaluate, export, report for STAGE; :8b is the
           larger model. With the folders of public benchmarks in `--set evaluate.benchmarks=...`
           (or data.exclude) from --stage=generate on, their boards stay out of training.
Hardware:  a TPU slice of 16 v5e chips (v5e:4x4), or more memory.
Expected:  by the compiler, of a chip's 15.75 GiB, and at least for a step of 131,072 tokens in
           grounding, 65,536 sampled and 196,608 read in distillation, 65,536 in evaluate:
           4b grounding 1.72 GiB, 1.55 s (docs/preflight/4b_v5e-4x4.md)
           4b distillation 7.42 GiB, 8.31 s (docs/preflight/4b_v5e-4x4.md)
           4b evaluate 4.63 GiB, 6.97 s (docs/preflight/evaluate_4b_v5e-4x4.md)
           8b grounding 2.86 GiB, 2.74 s (docs/preflight/8b_v5e-4x4.md)
           8b distillation 13.92 GiB, 13.8 s (docs/preflight/8b_v5e-4x4.md)
           8b evaluate 7.62 GiB, 11.5 s (docs/preflight/evaluate_8b_v5e-4x4.md)
           Speed and accuracy: not measured (no pretrained weights at hand). Published macro
           averages: 11.2 -> 30.5 for 4B, 17.2 -> 35.6 for 8B.
"""

from mgsd_jax import config as c

BOARDS = (
    c.LevelSet("frozenlake", levels=(3,), train=900, val=60, test=60),  # 1,218 exist in all
    c.LevelSet("frozenlake", levels=(4, 5, 6, 7, 8), train=1500, val=100, test=100),
    c.LevelSet("maze", levels=(3, 4, 5, 6), train=1500, val=100, test=100),
    c.LevelSet("minibehaviour", levels=(5, 6), train=1500, val=100, test=100),
)


def get_config(size: str = "4b") -> c.Config:
    """All stages for a model of this size, 4b or 8b; the release changes nothing else between them.

    The mesh splits widths over 4 chips (fewer where 4 do not divide), because a rollout holds all
    weights on the chips of one 'tensor' group, and rows over the rest.
    """
    if size not in ("4b", "8b"):
        raise ValueError(f"size: got {size!r}, want 4b or 8b")
    return c.Config(
        model=c.ModelConfig(path=f"models/Qwen3-VL-{size.upper()}-Instruct"),
        data=c.DataConfig(
            boards=BOARDS,
            picture_size=256,
            prompt_buckets=(384, 512),
            teacher_buckets=(512, 1024, 1536),
            sequence_buckets=(512, 1024, 2048),
            patch_buckets=(256,),
            workers=4,
        ),
        mesh=c.MeshConfig(data=1, fsdp=-1, tensor=-1),
        grounding=c.GroundingConfig(
            optim=c.OptimConfig(lr=1e-4, schedule="cosine", warmup=0.1),
            lora=c.LoraConfig(rank=8, alpha=16.0),
            steps=828,
            batch_size=64,
            microbatches=8,
            eval_every=100,
        ),
        distillation=c.DistillationConfig(
            optim=c.OptimConfig(lr=1e-6, weight_decay=0.01),
            teacher_context="state_and_plan",
            sampling=c.SamplingConfig(max_new_tokens=2048),
            steps=1400,
            batch_size=32,
            microbatches=4,
            eval_every=20,
            eval_boards=96,
        ),
        evaluate=c.EvaluateConfig(
            models=(
                ("base", "{model}"),
                ("grounded", "{workdir}/grounding"),
                ("distilled", "{workdir}/distillation"),
            ),
            sampling=c.SamplingConfig(max_new_tokens=2048, temperature=0.0),
            # Validation answers as many at once beside the training state.
            batch_size=32,
        ),
        checkpoint=c.CheckpointConfig(every=20),
    )
