"""The three runs that make the nano base model, which plans well from text and sees poorly.

Command:   bash launch/nano_base.sh WORKDIR
           (configs/nano_base.py:text, then :sight, then :finish; with `plans` after WORKDIR a base
           that has seen plans in its prompt, configs/nano_base.py:text,plans and so on)
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

_NANO = runpy.run_path(str(pathlib.Path(__file__).with_name("nano.py")))
_PICTURE_OPTIM = c.OptimConfig(lr=1e-3, warmup=0.05, b2=0.99)


def get_config(run: str = "text") -> c.Config:
    """One of the runs; each continues with the model of the one before.

    'text,plans' and so on make a base that has also seen plans in its prompt.
    """
    runs = {"text": text, "sight": sight, "finish": finish}
    name, _, variant = run.partition(",")
    if name not in runs or variant not in ("", "plans"):
        raise ValueError(f"run: got {run!r}, want text, sight or finish, perhaps with ',plans'")
    return with_plans(runs[name]()) if variant else runs[name]()


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
            config.data, sequence_buckets=(*config.data.sequence_buckets, 128)
        ),
        grounding=dataclasses.replace(config.grounding, mixture=tuple(mixture)),
    )


def text() -> c.Config:
    """The decoder learns to plan from text; every other setting is that of the quickstart."""
    nano: c.Config = _NANO["get_config"]()
    return dataclasses.replace(
        nano,
        model=dataclasses.replace(nano.model, path="{workdir}/init"),
        data=dataclasses.replace(nano.data, source="stream"),
        nano=c.NanoConfig(folder="{workdir}/init", max_level=6),
        grounding=c.GroundingConfig(
            optim=c.OptimConfig(
                lr=2e-3, schedule="cosine", warmup=0.03, b2=0.99, trainable="^language"
            ),
            steps=2000,
            batch_size=64,
            mixture=(("plan_from_text", 1.0),),
            eval_every=100,
        ),
        export=c.ExportConfig(source="{workdir}/grounding", folder="{workdir}/export"),
        checkpoint=c.CheckpointConfig(every=100),
    )


def sight() -> c.Config:
    """Places are learned from FrozenLake, the board with the most to see.

    Levels that stand more than once are drawn more often. Level 5 of FrozenLake is there for its
    geometry, which is MiniBehaviour's.
    """
    before = text()
    boards = (
        c.LevelSet("frozenlake", levels=(3, 4, 4, 5, 5, 5), train=0, val=0, test=0),
        c.LevelSet("maze", levels=(3, 3), train=0, val=0, test=0),
        c.LevelSet("minibehaviour", levels=(5, 5, 5), train=0, val=0, test=0),
    )
    return dataclasses.replace(
        before,
        data=dataclasses.replace(
            before.data, boards=boards, sequence_buckets=(98, 120), channels=(1, 2, 0)
        ),
        grounding=dataclasses.replace(
            before.grounding,
            student="{workdir}/text/grounding",
            optim=_PICTURE_OPTIM,
            batch_size=48,
            steps=600,
            mixture=(
                ("cells", 0.3),
                ("questions", 0.3),
                ("plan_from_picture", 0.3),
                ("plan_from_text", 0.1),
            ),
        ),
    )


def finish() -> c.Config:
    """Mostly MiniBehaviour: agent and printer are found between updates 150 and 250."""
    before = sight()
    boards = (
        c.LevelSet("frozenlake", levels=(3, 4, 5), train=0, val=0, test=0),
        c.LevelSet("maze", levels=(3,), train=0, val=0, test=0),
        c.LevelSet("minibehaviour", levels=(5, 5, 5, 5, 5), train=0, val=0, test=0),
    )
    return dataclasses.replace(
        before,
        data=dataclasses.replace(before.data, boards=boards),
        grounding=dataclasses.replace(
            before.grounding,
            student="{workdir}/sight/grounding",
            steps=300,
            mixture=(
                ("cells", 0.4),
                ("questions", 0.2),
                ("plan_from_picture", 0.2),
                ("plan_from_text", 0.2),
            ),
        ),
        seed=1,
    )
