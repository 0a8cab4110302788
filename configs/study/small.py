"""What all rows of the small study share: boards of several sizes in pictures of one size.

Command:   bash launch/study.sh WORKDIR --study=small   (makes the base, then runs every row)
           bash launch/gpu_study.sh WORKDIR             (configs/study/small.py:gpu, on one GPU)
Hardware:  2 CPU cores; one H100 or H200.
Expected:  docs/study_small.md; on a GPU not measured.

Every picture has 256 x 256 pixels and is 64 visual tokens, whatever the level, so that cells and
tokens do not coincide, as for a 4B model. The base has planned from text, and seen pictures in
colours that no board has, at every level; the rows train on some levels and are tested on all.
"""

import dataclasses
import pathlib
import runpy
from typing import Literal

from mgsd_jax import config as c

_NANO = pathlib.Path(__file__).with_name("nano.py")


@dataclasses.dataclass(frozen=True)
class Size:
    """A model of this family, its boards, and how long it is trained."""

    shape: c.NanoConfig
    trained: dict[str, tuple[int, ...]]  # levels by task that the rows train on
    held_out: dict[str, tuple[int, ...]]  # levels that only the base has met
    train: int  # boards of a task, over its trained levels; 0: drawn on the fly
    test: int  # boards of a level that are asked about
    text: tuple[int, ...]  # lengths of text records of all levels
    pictures: tuple[int, ...]  # lengths of records with a picture
    teacher: tuple[int, ...]  # lengths of prompts with the board as text
    responses: tuple[int, int]  # longest response at a trained level, at any level
    base: tuple[int, int, int]  # updates of text, sight and finish
    base_rows: tuple[int, int]  # records of an update of text, of sight and finish
    steps: tuple[int, int]  # updates of grounding and of distillation after it
    rows: int  # of an update of these
    microbatches: int = 1
    compute_dtype: Literal["float32", "bfloat16"] = "float32"
    lr: float = 1e-3
    save_every: int = 40  # steps between checkpoints: a minute or two of work


SMALL = Size(
    c.NanoConfig(
        folder="{workdir}/init",
        width=160,
        layers=6,
        heads=5,
        kv_heads=1,
        mlp=448,
        vision_layers=4,
    ),
    trained={"frozenlake": (3, 4, 5), "maze": (3,), "minibehaviour": (5,)},
    held_out={"frozenlake": (6,), "maze": (4,), "minibehaviour": (6,)},
    train=2400,
    test=100,
    text=(112, 120, 136),
    pictures=(152, 160),
    teacher=(56, 88),
    responses=(64, 80),
    base=(2400, 1200, 400),
    base_rows=(64, 48),
    steps=(40, 120),
    rows=64,
    microbatches=8,
)
# Boards are drawn on the fly: pictures of thousands of them would take a minute to write. Levels
# stand more than once so that every task is drawn as often.
GPU = Size(
    c.NanoConfig(
        folder="{workdir}/init",
        width=512,
        layers=6,
        heads=8,
        kv_heads=4,
        head_width=64,
        mlp=1408,
        vision_width=256,
        vision_layers=6,
        vision_heads=8,
        vision_mlp=1024,
    ),
    trained={"frozenlake": (3, 4, 5), "maze": (3, 4, 4), "minibehaviour": (5, 5, 5)},
    held_out={"frozenlake": (6,), "maze": (5,), "minibehaviour": (6,)},
    train=0,
    test=100,
    text=(184,),  # one program each: on a GPU compiling costs more than padding
    pictures=(192,),
    teacher=(88,),
    responses=(80, 112),
    base=(700, 350, 100),
    base_rows=(192, 96),
    steps=(40, 120),
    rows=64,
    compute_dtype="bfloat16",
    lr=5e-4,
    save_every=300,
)
# The same programs and stages as on a GPU, in minutes on a CPU; nothing is learned.
TOY = dataclasses.replace(
    GPU,
    shape=c.NanoConfig(
        folder="{workdir}/init",
        width=32,
        layers=2,
        heads=2,
        kv_heads=1,
        head_width=16,
        mlp=32,
        vision_width=16,
        vision_layers=2,
        vision_heads=2,
        vision_mlp=16,
        deepstack=(0,),
    ),
    trained={"frozenlake": (3,), "maze": (3,), "minibehaviour": (5,)},
    held_out={"frozenlake": (4,), "maze": (4,), "minibehaviour": (6,)},
    test=2,
    text=(136,),
    teacher=(72,),
    base=(4, 4, 2),
    base_rows=(8, 8),
    steps=(2, 2),
    rows=8,
)
SIZES = {"small": SMALL, "gpu": GPU, "toy": TOY}


def level_sets(
    levels: dict[str, tuple[int, ...]], train: int = 0, val: int = 0, test: int = 0
) -> tuple[c.LevelSet, ...]:
    """Boards of these levels by task: `train` of a task, `val` and `test` of a level."""
    return tuple(
        c.LevelSet(task, some, train // len(some), val, test) for task, some in levels.items()
    )


def get_config(name: str = "small") -> c.Config:
    """The nano study's schedule for a model of this family, its boards those of trained levels."""
    if name not in SIZES:
        raise ValueError(f"size: got {name!r}, want one of {[*SIZES]}")
    size = SIZES[name]
    nano: c.Config = runpy.run_path(str(_NANO))["get_config"]()
    rate = {"lr": size.lr}
    return dataclasses.replace(
        nano,
        checkpoint=dataclasses.replace(nano.checkpoint, every=size.save_every),
        model=dataclasses.replace(
            nano.model, path="{workdir}/export", compute_dtype=size.compute_dtype
        ),
        data=dataclasses.replace(
            nano.data,
            boards=level_sets(size.trained, size.train, 32 if size.train else 0, size.test),
            picture_size=256,
            cell_pixels=0,
            prompt_buckets=(80,),
            teacher_buckets=size.teacher,
            sequence_buckets=size.pictures,
            patch_buckets=(256,),
        ),
        grounding=dataclasses.replace(
            nano.grounding,
            optim=dataclasses.replace(nano.grounding.optim, **rate),
            steps=size.steps[0],
            batch_size=size.rows,
            microbatches=size.microbatches,
        ),
        distillation=dataclasses.replace(
            nano.distillation,
            optim=dataclasses.replace(nano.distillation.optim, **rate),
            sampling=c.SamplingConfig(max_new_tokens=size.responses[0]),
            steps=size.steps[1],
            batch_size=size.rows,
            microbatches=size.microbatches,
        ),
        evaluate=dataclasses.replace(
            nano.evaluate,
            sampling=c.SamplingConfig(max_new_tokens=size.responses[1], temperature=0.0),
        ),
    )
