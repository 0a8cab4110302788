"""The model card of an export, the prompts that the model knows, and a board to try it on."""

import functools
import io
import re
import typing
from collections.abc import Sequence
from pathlib import Path, PurePath

import jinja2
from absl import logging
from etils import epath
from PIL import Image

from mgsd_jax.config import Config, LevelSet
from mgsd_jax.data import prompts as prompts_lib
from mgsd_jax.data import splits
from mgsd_jax.data.boards import Board
from mgsd_jax.data.encoder import draw_picture
from mgsd_jax.envs import ENVS
from mgsd_jax.evaluation import rows
from mgsd_jax.report import inputs, making, tables
from mgsd_jax.weights import files
from mgsd_jax.weights.released import RELEASED
from mgsd_jax.workdir import contents, paths, stage_folder

FILE, PROMPTS, SAMPLE = "README.md", "prompts", "sample"
LICENSE = re.compile(r"\A---\n(?:.*\n)*?license: *(\S+)")


def write(config: Config, folder: Path) -> None:
    """Writes `README.md`, `prompts/` and `sample/` into the folder of an export.

    `config` is resolved; the card is about `config.export.source` and what lies behind it.
    """
    words = prompts_lib.load(config.data.prompts, config.data.state_text)
    tasks = list(dict.fromkeys(levels.task for levels in config.data.boards))
    _write_prompts(words, tasks, folder / PROMPTS)
    sample = _sample(config)
    _write_sample(config, words, sample, folder / SAMPLE)
    stages, base = chain(config.export.source, config.model.path)
    named = [(_name(stage), stage) for stage in stages]
    made = [making.read_made(name, at, inputs.read_stage(name, at)) for name, at in named]
    results = _results(config)
    card = _template().render(
        name=_title(Path(config.export.folder)),
        is_adapter=config.export.adapters,
        base=base,
        hub_base=hub_name(base),
        license=license_of(base),
        tasks={task: ENVS[task].title for task in tasks},
        prompts={ENVS[task].title: words.template(task, "student") for task in tasks},
        sample_task=sample.task,
        picture=_picture(config),
        max_new_tokens=config.evaluate.sampling.max_new_tokens,
        results=None if results is None else "\n".join([*tables.grid(results), "", results.note]),
        stages=[one.stage for one in made],
        facts=making.facts(made),
        costs="\n".join(tables.grid(making.costs(made))) if made else "",
    )
    files.write_bytes(folder / FILE, card.encode())


def chain(source: str, model: str) -> tuple[list[epath.Path], str]:
    """The folders of the stages that trained `source`, the first one first, and of their base.

    The base is `model` where it has been moved there.
    """
    stages, root = [], epath.Path(source)
    while stage_folder.is_stage(root):
        stages.insert(0, root)
        # Adapters that learned on, from those of the stage before, lie above the base itself.
        student = str(making.read_settings(root).get(f"{_name(root)}.student", ""))
        before = epath.Path(student.replace("{workdir}", str(root.parent)) or ".")
        is_trained_on = stage_folder.is_stage(before) and before not in stages
        root = before if is_trained_on else epath.Path(stage_folder.find_weights(root, [model]))
    return stages, str(root)


def _name(stage: epath.Path) -> str:
    """Which of the stages left this folder."""
    settings = making.read_settings(stage)
    return next((name for name in stage_folder.STAGES if f"{name}.steps" in settings), stage.name)


def hub_name(base: str) -> str | None:
    """The name of a base on the Hugging Face Hub, as far as its path says one.

    >>> hub_name('models/Qwen3-VL-4B-Instruct')
    'Qwen/Qwen3-VL-4B-Instruct'
    """
    for part in PurePath(base).parts:
        kind, *names = part.split("--")
        if kind == "models" and len(names) == 2:  # a snapshot in the hub's cache
            return "/".join(names)
    name = PurePath(base).name
    return f"Qwen/{name}" if name in RELEASED else None


def license_of(base: str) -> str | None:
    """The licence that the base's own card states, or that Qwen3-VL is released under."""
    card = epath.Path(base) / FILE
    found = LICENSE.match(card.read_text(encoding="utf-8")) if card.is_file() else None
    if found:
        return found[1]
    return "apache-2.0" if PurePath(hub_name(base) or "").name in RELEASED else None


def _title(folder: Path) -> str:
    """What to call an export: its folder's name, or that of the run where it is just 'export'."""
    folder = folder.resolve()
    return folder.parent.name if folder.name == "export" else folder.name


def _write_prompts(words: prompts_lib.Prompts, tasks: Sequence[str], folder: Path) -> None:
    """The prompts as --prompts takes them."""
    folder.mkdir()
    for task in tasks:
        for kind in typing.get_args(prompts_lib.Kind):
            text = words.template(task, kind) + "\n"
            files.write_bytes(folder / f"{task}.{kind}.txt", text.encode())


def _sample(config: Config) -> Board:
    """A board of the test split, or of another where the config draws none for it."""
    drawn: list[tuple[LevelSet, splits.Split]] = [
        (s, split) for split in reversed(splits.SPLITS) for s in config.data.boards
    ]
    levels, split = next((one for one in drawn if getattr(*one)), drawn[-1])
    task, level = levels.task, levels.levels[0]
    (state,) = splits.unique_boards(task, level, split, 1, seed=config.seed)
    return Board(task, level, 0, state, None)


def _write_sample(config: Config, words: prompts_lib.Prompts, board: Board, folder: Path) -> None:
    """The picture and the text of a board, and a right answer."""
    folder.mkdir()
    env, task, state = words.env(board.task), board.task, board.state
    answer = prompts_lib.response(task, state, env.shortest_plan(state), words)
    picture = io.BytesIO()
    Image.fromarray(draw_picture(config.data, board)).save(picture, "PNG")
    files.write_bytes(folder / "board.png", picture.getvalue())
    files.write_bytes(folder / "board.txt", (env.describe(state) + "\n").encode())
    files.write_bytes(folder / "answer.txt", (answer + "\n").encode())


def _picture(config: Config) -> str:
    """What the model knows of the size of pictures."""
    data = config.data
    if data.picture_size:
        return f"{data.picture_size} x {data.picture_size} pixels"
    return f"{data.cell_pixels} x {data.cell_pixels} pixels a cell"


def _results(config: Config) -> tables.Table | None:
    """Success of the exported model and of the base, where the workdir's evaluation has it."""
    folder, source = epath.Path(config.evaluate.folder), config.export.source
    if not (folder / inputs.SUMMARY_FILE).is_file():
        return None
    summary = inputs.read_evaluation(folder).summary
    same = (
        n for n, path in config.evaluate.models if paths.absolute(path) == paths.absolute(source)
    )
    name = next(same, None)
    if name is None or "picture" not in summary["models"].get(name, ()):
        return None
    try:
        rows.check_models(folder, {name: contents.identity(source) or ""})
    except ValueError as error:
        logging.warning("the card has no results: %s", error)
        return None
    shown = [part for part in inputs.parts(summary, "picture", "text") if part[0] in (name, "base")]
    note = "Share of boards solved, with 95 % intervals. Boards that were not trained on: {}."
    counts = ", ".join(
        f"{part['n']} of {ENVS[task].title}" for task, part in shown[0][2]["tasks"].items()
    )
    return tables.results("Results", shown, note.format(counts))


@functools.cache
def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("mgsd_jax.stages", ""),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    return environment.get_template("card.md.jinja")
