"""The three runs that make a base model, which plans well from text and sees poorly.

Command:   bash launch/nano_base.sh WORKDIR
           (configs/nano_base.py:text, then :sight, then :finish; with `plans` after WORKDIR a base
           that has seen plans in its prompt, configs/nano_base.py:text,plans and so on; with
           `small` or `gpu` the base of a size of configs/study/small.py)
Hardware:  2 CPU cores; half an hour, ten minutes and six minutes.
Expected:  see docs/nano.md.

The boards with pictures are drawn in colours that no real board has (`data.channels`). What the
base learns of where things are and how to name them carries over; what they look like does not. So
it sees real boards, but poorly, as a large model sees boards that it was never trained on.
"""

import dataclasses
import pathlib
import runpy

from mgsd_jax import config as c

_CONFIGS = pathlib.Path(__file__).parent
_NANO: c.Config = runpy.run_path(str(_CONFIGS / "nano.py"))["get_config"]()
_SMALL = runpy.run_path(str(_CONFIGS / "study" / "small.py"))
Boards = tuple[c.LevelSet, ...]


@dataclasses.dataclass(frozen=True)
class Base:
    """What makes one base another: its recipe and shape, and what its runs read."""

    recipe: c.Config  # whose settings the runs have where nothing else is said
    shape: c.NanoConfig
    boards: tuple[Boards, Boards, Boards]  # of text, sight and finish
    steps: tuple[int, int, int]
    rows: tuple[int, int]  # of an update of text, of sight and finish
    lengths: tuple[tuple[int, ...], tuple[int, ...]]  # of records of text, of those with pictures
    microbatches: int = 1
    lr: float = 1e-3  # of the runs with pictures; text has twice as much
    save_every: int = 100


def get_config(run: str = "text") -> c.Config:
    """One of the runs; each continues with the model of the one before.

    'text,plans' and so on make a base that has also seen plans in its prompt, 'text,small' and so
    on one of the sizes of configs/study/small.py.
    """
    name, _, variant = run.partition(",")
    sizes = _SMALL["SIZES"]
    if name not in RUNS or variant not in ("", "plans", *sizes):
        known = ", ".join(f"',{one}'" for one in ("plans", *sizes))
        raise ValueError(
            f"run: got {run!r}, want text, sight or finish, perhaps with one of {known}"
        )
    config = RUNS[name](small_base(variant) if variant in sizes else nano_base())
    return with_plans(config) if variant == "plans" else config


def nano_base() -> Base:
    """The base of the quickstart.

    Places are learned from FrozenLake, the board with the most to see. Levels that stand more than
    once are drawn more often. Level 5 of FrozenLake is there for its geometry, which is
    MiniBehaviour's.
    """
    sight = {"frozenlake": (3, 4, 4, 5, 5, 5), "maze": (3, 3), "minibehaviour": (5,) * 3}
    finish = {"frozenlake": (3, 4, 5), "maze": (3,), "minibehaviour": (5,) * 5}
    sets = _SMALL["level_sets"]
    return Base(
        _NANO,
        c.NanoConfig(folder="{workdir}/init", max_level=6),
        boards=(_NANO.data.boards, sets(sight), sets(finish)),
        steps=(2000, 600, 300),
        rows=(64, 48),
        lengths=((98,), (98, 120)),
    )


def small_base(name: str) -> Base:
    """The base of a size of configs/study/small.py: all of its levels, the larger ones more often.

    The last run reads as much of MiniBehaviour as of the other tasks together.
    """
    size = _SMALL["SIZES"][name]
    every = {task: (*levels, *2 * size.held_out[task]) for task, levels in size.trained.items()}
    finish = {
        task: levels * (3 if task == "minibehaviour" else 1) for task, levels in every.items()
    }
    sets = _SMALL["level_sets"]
    return Base(
        _SMALL["get_config"](name),
        size.shape,
        boards=(sets(every), sets(every), sets(finish)),
        steps=size.base,
        rows=size.base_rows,
        lengths=(size.text, size.pictures),
        microbatches=size.microbatches,
        lr=size.lr,
        save_every=size.save_every,
    )


def with_plans(config: c.Config) -> c.Config:
    """The run with a shortest plan below the state in half of its text prompts.

    Without it a decoder has never had a plan in its prompt, and what a teacher makes of one says
    little of plans.
    """
    mixture: list[tuple[str, float]] = []
    for kind, share in config.grounding.mixture:
        if kind == "plan_from_text":
            mixture += [(kind, share / 2), ("plan_from_text_and_plan", share / 2)]
        else:
            mixture.append((kind, share))
    return dataclasses.replace(
        config,
        # The longest prompt with a plan and its response, MiniBehaviour's.
        data=dataclasses.replace(
            config.data, sequence_buckets=(*c.sizes(config.data.sequence_buckets), 128)
        ),
        grounding=dataclasses.replace(config.grounding, mixture=tuple(mixture)),
    )


def text(base: Base) -> c.Config:
    """The decoder learns to plan from text; every other setting is that of the recipe."""
    recipe = base.recipe
    return dataclasses.replace(
        recipe,
        model=dataclasses.replace(recipe.model, path="{workdir}/init"),
        data=dataclasses.replace(
            recipe.data,
            source="stream",
            boards=base.boards[0],
            sequence_buckets=base.lengths[0],
            augment=0.0,
        ),
        nano=base.shape,
        grounding=c.GroundingConfig(
            optim=c.OptimConfig(
                lr=2 * base.lr, schedule="cosine", warmup=0.03, b2=0.99, trainable="^language"
            ),
            steps=base.steps[0],
            batch_size=base.rows[0],
            microbatches=base.microbatches,
            mixture=(("plan_from_text", 1.0),),
            eval_every=100,
        ),
        export=c.ExportConfig(source="{workdir}/grounding", folder="{workdir}/export"),
        checkpoint=c.CheckpointConfig(every=base.save_every),
    )


def sight(base: Base) -> c.Config:
    """All parameters learn to see boards in colours that no real board has."""
    before = text(base)
    return dataclasses.replace(
        before,
        data=dataclasses.replace(
            before.data,
            boards=base.boards[1],
            sequence_buckets=base.lengths[1],
            channels=(1, 2, 0),
        ),
        grounding=dataclasses.replace(
            before.grounding,
            student="{workdir}/text/grounding",
            optim=c.OptimConfig(lr=base.lr, warmup=0.05, b2=0.99),
            batch_size=base.rows[1],
            steps=base.steps[1],
            mixture=(
                ("cells", 0.3),
                ("questions", 0.3),
                ("plan_from_picture", 0.3),
                ("plan_from_text", 0.1),
            ),
        ),
    )


def finish(base: Base) -> c.Config:
    """Mostly MiniBehaviour: at nano size its agent and printer are found in these updates."""
    before = sight(base)
    return dataclasses.replace(
        before,
        data=dataclasses.replace(before.data, boards=base.boards[2]),
        grounding=dataclasses.replace(
            before.grounding,
            student="{workdir}/sight/grounding",
            steps=base.steps[2],
            mixture=(
                ("cells", 0.4),
                ("questions", 0.2),
                ("plan_from_picture", 0.2),
                ("plan_from_text", 0.2),
            ),
        ),
        seed=1,
    )


RUNS = {"text": text, "sight": sight, "finish": finish}
