"""Qwen3-VL-4B-Instruct, every stage, with the settings of the public release.

Command:   python -m mgsd_jax.main --stage=grounding --config=configs/qwen3vl_4b.py --workdir=DIR
Hardware:  one accelerator that holds the training state: 4.4e9 parameters with float32 master
           weights, moments and gradients are 71 GB, the frozen teacher and activations come on top.
Expected:  not measured (no pretrained weights at hand). Published macro average: 11.2 -> 30.5.
"""

from mgsd_jax import config as c

BOARDS = (
    c.LevelSet("frozenlake", levels=(3,), train=900, val=60, test=60),  # 1,218 exist in all
    c.LevelSet("frozenlake", levels=(4, 5, 6, 7, 8), train=1500, val=100, test=100),
    c.LevelSet("maze", levels=(3, 4, 5, 6), train=1500, val=100, test=100),
    c.LevelSet("minibehaviour", levels=(5, 6), train=1500, val=100, test=100),
)


def get_config() -> c.Config:
    """Grounding with LoRA, distillation of all parameters, greedy evaluation."""
    return c.Config(
        model=c.ModelConfig(path="models/Qwen3-VL-4B-Instruct"),
        data=c.DataConfig(
            boards=BOARDS,
            picture_size=256,
            prompt_buckets=(384, 512),
            teacher_buckets=(512, 1024, 1536),
            sequence_buckets=(512, 1024, 2048),
            patch_buckets=(256,),
            workers=4,
        ),
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
            microbatches=8,
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
            batch_size=64,
        ),
        checkpoint=c.CheckpointConfig(every=20),
    )
