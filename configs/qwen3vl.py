"""Qwen3-VL-4B and 8B Instruct by the recipe of docs/study.md, on a slice of TPUs.

Command:   python -m mgsd_jax.main --stage=STAGE --config=configs/qwen3vl.py:4b --workdir=DIR
           with generate, grounding, distillation, evaluate, export, report for STAGE; :8b is the
           larger model, and :4b,release and :8b,release are the published settings. With the
           folders of public benchmarks in `--set evaluate.benchmarks=...` (or data.exclude) from
           --stage=generate on, their boards stay out of training.
Hardware:  a TPU slice of 16 v5e chips (v5e:4x4), or more memory.
Expected:  by the compiler, of a chip's 15.75 GiB, and at least for a typical step and for the
           longest one, 2.8 tokens of a draft kept a pass in the typical one, 1 in the longest:
           4b grounding 2.67 GiB, 0.4 and 0.788 s (docs/preflight/4b_v5e-4x4.md)
           4b distillation 8.57 GiB, 0.95 and 4.31 s (docs/preflight/4b_v5e-4x4.md)
           4b evaluate 3.06 GiB, 0.586 and 18.1 s (docs/preflight/evaluate_4b_v5e-4x4.md)
           8b grounding 3.91 GiB, 0.738 and 1.44 s (docs/preflight/8b_v5e-4x4.md)
           8b distillation 15.09 GiB, 1.55 and 6.49 s (docs/preflight/8b_v5e-4x4.md)
           8b evaluate 4.52 GiB, 0.876 and 24.8 s (docs/preflight/evaluate_8b_v5e-4x4.md)
           Speed and accuracy: not measured (no pretrained weights at hand). Published macro
           averages: 11.2 -> 30.5 for 4B, 17.2 -> 35.6 for 8B.

The recipe and the published settings differ in distillation alone. There the teacher reads the
state and one shortest plan, and the divergence is reverse KL (exact here; the release's estimate of
it is `--set distillation.objective=sampled_reverse_kl`). Here the teacher reads the state alone
and the divergence is Jensen-Shannon's. docs/study.md has the evidence, of nano models. Rates,
batches and steps are the release's.

Buckets follow lengths in the tokens of Qwen3-VL, of 300 boards a level, 900 of Maze 6 (for a few
boards: benchmarks/tokens.py). Student prompts have 274 to 314 tokens, records of questions up to
587, teacher prompts with one plan up to 570, right responses 159 on average and 526 at most.
- Every batch of prompts or of questions takes the first bucket, and so does every batch of teacher
  prompts with the state alone or with one plan. With all shortest plans 56 in 100 do; the longest
  of 2,500 of MiniBehaviour 6 has 1,505 tokens.
- Of 100 batches of right responses 98 end within the first response bucket.
- A rollout may have 1,024 tokens, twice the longest right response.
- An evaluation may have 4,096, as in the release's benchmark. A base that does not know the format
  talks at length, and an answer that is cut off hardly counts as right: a tight limit would flatter
  training. The stage warns of answers that were cut off. On larger boards right responses are
  longer (793 tokens for Maze 8, 3,453 for Maze 16, 12,344 for Maze 32; the longest of 4 boards):
  for Maze 32 add `--set evaluate.sampling.max_new_tokens=16384`. Their text prompts need longer
  buckets: `--set data.teacher_buckets=auto`.
"""

import dataclasses

from mgsd_jax import config as c

BOARDS = (
    c.LevelSet("frozenlake", levels=(3,), train=900, val=60, test=60),  # 1,218 exist in all
    c.LevelSet("frozenlake", levels=(4, 5, 6, 7, 8), train=1500, val=100, test=100),
    c.LevelSet("maze", levels=(3, 4, 5, 6), train=1500, val=100, test=100),
    c.LevelSet("minibehaviour", levels=(5, 6), train=1500, val=100, test=100),
)


def get_config(size: str = "4b") -> c.Config:
    """All stages for a model of this size, 4b or 8b; nothing else differs between them.

    '4b,release' and '8b,release' have the published settings of distillation.
    """
    size, _, variant = size.partition(",")
    if size not in ("4b", "8b") or variant not in ("", "release"):
        found = f"{size},{variant}" if variant else size
        raise ValueError(f"size: got {found!r}, want 4b or 8b, perhaps with ',release'")
    recipe = best(size)
    return released(recipe) if variant else recipe


def released(recipe: c.Config) -> c.Config:
    """The recipe with the published settings of distillation, and buckets for what they read."""
    return dataclasses.replace(
        recipe,
        data=dataclasses.replace(recipe.data, teacher_buckets=(576, 1024, 1536)),
        distillation=dataclasses.replace(
            recipe.distillation, teacher_context="state_and_plan", objective="reverse_kl"
        ),
    )


def best(size: str) -> c.Config:
    """The recipe of docs/study.md, with the rates, batches and steps of the release.

    The mesh splits widths over 4 chips (fewer where 4 do not divide), because a rollout holds all
    weights on the chips of one 'tensor' group, and rows over the rest.
    """
    return c.Config(
        # Of the policies that fit in two microbatches, this computes least again. With four, `none`
        # needs 17.3 of 15.75 GiB (4b); with eight, gathering weights takes longer than computing.
        model=c.ModelConfig(path=f"models/Qwen3-VL-{size.upper()}-Instruct", remat="save_names"),
        data=c.DataConfig(
            boards=BOARDS,
            picture_size=256,
            prompt_buckets=(320,),
            teacher_buckets=(576,),
            sequence_buckets=(592, 1152),
            patch_buckets=(256,),
            workers=4,
        ),
        # Two copies of a rollout's weights, on 16 chips over 8 each, on 8 over 4 (docs/preflight).
        mesh=c.MeshConfig(data=1, fsdp=-1, tensor=-1, rollout_tensor=-2),
        grounding=c.GroundingConfig(
            optim=c.OptimConfig(lr=1e-4, schedule="cosine", warmup=0.1),
            lora=c.LoraConfig(rank=8, alpha=16.0),
            steps=828,
            batch_size=64,
            microbatches=4,
            eval_every=100,
        ),
        distillation=c.DistillationConfig(
            optim=c.OptimConfig(lr=1e-6, weight_decay=0.01),
            teacher_context="state",
            objective="jsd",
            sampling=c.SamplingConfig(max_new_tokens=1024, draft_tokens=7),
            response_buckets=(512, 768, 1024),
            steps=1400,
            batch_size=32,
            microbatches=2,
            eval_every=20,
            eval_boards=96,
        ),
        evaluate=c.EvaluateConfig(
            models=(
                ("base", "{model}"),
                ("grounded", "{workdir}/grounding"),
                ("distilled", "{workdir}/distillation"),
            ),
            sampling=c.SamplingConfig(max_new_tokens=4096, temperature=0.0, draft_tokens=7),
            # Validation answers as many at once beside the training state.
            batch_size=32,
        ),
        checkpoint=c.CheckpointConfig(every=20),
    )
