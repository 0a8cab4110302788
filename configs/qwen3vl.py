"""What the recipes of the released models share: the settings of the public release, on a slice.

Command:   none of its own: grounding_4b.py, distillation_4b.py, evaluate_4b.py and those of 8b
           read it. `get_config()` is the whole 4B run in one config. With the folders of public
           benchmarks in `--set evaluate.benchmarks=...` (or data.exclude) from --stage=generate on,
           their boards stay out of training.
Hardware:  a TPU slice of 16 v5e chips, or more memory.
Expected:  not measured (no pretrained weights at hand). Published macro averages: 11.2 -> 30.5 for
           4B, 17.2 -> 35.6 for 8B.
"""

from mgsd_jax import config as c

BOARDS = (
    c.LevelSet("frozenlake", levels=(3,), train=900, val=60, test=60),  # 1,218 exist in all
    c.LevelSet("frozenlake", levels=(4, 5, 6, 7, 8), train=1500, val=100, test=100),
    c.LevelSet("maze", levels=(3, 4, 5, 6), train=1500, val=100, test=100),
    c.LevelSet("minibehaviour", levels=(5, 6), train=1500, val=100, test=100),
)


def recipe(size: str, stages: tuple[str, ...]) -> c.Config:
    """All sections for a model of this size; preflight compiles the programs of `stages`.

    The release changes nothing between sizes. The mesh splits widths over 4 chips (fewer where 4 do
    not divide), because a rollout holds all weights on the chips of one 'tensor' group, and rows
    over the rest.
    """
    return c.Config(
        model=c.ModelConfig(path=f"models/Qwen3-VL-{size}-Instruct"),
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
        preflight=c.PreflightConfig(stages=stages),  # type: ignore[arg-type] - checked on loading
    )


def get_config() -> c.Config:
    """The 4B run."""
    return recipe("4B", ("grounding", "distillation"))
