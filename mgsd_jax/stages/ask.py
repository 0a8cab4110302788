"""Asks a model about one picture: the board that it sees, its route and plan, or a free question.

  mgsd_jax --stage=ask --input=picture.png --set ask.task=maze --set ask.model=runs/a/distillation

From Python:
  model = ask.load("runs/a/distillation")
  reply = ask.ask(model, "picture.png", task="maze")
"""

import dataclasses
import io
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
from absl import logging
from etils import epath
from PIL import Image

from mgsd_jax import config as config_lib
from mgsd_jax.checks import fields
from mgsd_jax.config import Config, DataConfig, ModelConfig, SamplingConfig
from mgsd_jax.data import batching
from mgsd_jax.data import prompts as prompts_lib
from mgsd_jax.data.boards import Board
from mgsd_jax.data.encoder import draw_picture
from mgsd_jax.data.pictures import open_picture, read_picture
from mgsd_jax.data.processor import encode
from mgsd_jax.data.prompts import Message
from mgsd_jax.envs import ENVS
from mgsd_jax.evaluation import reply as reply_lib
from mgsd_jax.evaluation.reply import Reply
from mgsd_jax.evaluation.routes import draw_route
from mgsd_jax.evaluation.scoring import Answer
from mgsd_jax.parallel import axes, sharding
from mgsd_jax.report import answer as answer_lib
from mgsd_jax.sampling import endpoint
from mgsd_jax.sampling.answers import make_responder
from mgsd_jax.stages import export, loading
from mgsd_jax.workdir import folders, paths, stage_folder

# Of a model that nobody has trained here: pictures of the public boards, and any answer.
_UNKNOWN = Config(
    model=ModelConfig(path="unknown"),
    data=DataConfig(boards=tuple(config_lib.LevelSet(task, (3,), 0, 0, 0) for task in ENVS)),
    grounding=config_lib.GroundingConfig(config_lib.OptimConfig(lr=0.0)),
    distillation=config_lib.DistillationConfig(config_lib.OptimConfig(lr=0.0)),
    evaluate=config_lib.EvaluateConfig(models=(("asked", "unknown"),)),
)
PROMPTS = "prompts"  # the folder of an export with the prompts of its training
_STEP = 128  # tokens or patches: lengths that no bucket of the training holds are rounded up to it
_DRAWN = 512  # pixels a side of a PNG with the route
_SIDES = (64, 1024)  # least and most pixels of a picture that is kept in its own size


@dataclasses.dataclass(frozen=True)
class Model:
    """A model that can be asked."""

    config: Config  # of its training
    respond: Callable[[Sequence[list[Message]]], list[Answer]]


def run(config: Config, workdir: str, input_path: str, output_path: str | None = None) -> None:
    """Prints what the model of `config.ask` says of a picture; writes it with the route drawn over.

    The drawing goes to `output_path`, SVG or PNG, by default beside the picture. Raises ValueError
    for a picture or a model that cannot be read.
    """
    config = config_lib.resolve(config, workdir)
    settings = config.ask
    output = Path(output_path or Path(input_path).with_suffix(".route.svg"))
    is_picture = output.exists() and output.samefile(input_path)
    if output.suffix not in (".svg", ".png") or is_picture:
        raise ValueError(f"--output: got {output}, want another file, that ends in .svg or .png")
    if not output.parent.is_dir():
        raise ValueError(f"--output: {output}: folder {output.parent} not found")
    _check_question(settings.task, settings.question)
    # Before a model is loaded:
    width, height = open_picture(input_path, input_path).size
    shown_sizes(config.data, settings.task, settings.level)
    model = load(settings.model, config)
    reply = ask(
        model, input_path, task=settings.task, question=settings.question, level=settings.level
    )
    _say(f"{input_path}: {width}x{height} pixels{_resized(reply, model.config, (width, height))}\n")
    for line in answer_lib.lines(reply):
        _say(line)
    if reply.row is not None and reply.row["plan"]:
        paths.write_whole(output, _drawing(reply, _square(input_path), output.suffix))
        _say(f"The picture with the route: {output}")


def _resized(reply: Reply, config: Config, own: tuple[int, int]) -> str:
    """What became of the picture on its way to the model."""
    size = reply.size
    sizes = shown_sizes(config.data, reply.task, config.ask.level) if reply.task else [size]
    text = "" if own == (size, size) else f", resized to {size}x{size}"
    text += "" if config.model == _UNKNOWN.model else ", as in the training"
    others = " and ".join(f"{other}x{other}" for other in sizes if other != size)
    return f"{text} (it fits better than {others})" if others and reply.board else text


def _drawing(reply: Reply, pixels: np.ndarray, suffix: str) -> bytes:
    """The picture with the route over it, in a file."""
    if suffix == ".svg" or reply.board is None or reply.row is None:
        return answer_lib.picture(reply, pixels).encode()
    large = np.asarray(Image.fromarray(pixels).resize((_DRAWN, _DRAWN)))
    drawn = draw_route(large, reply.task, reply.board.state, reply.row["plan"])
    buffer = io.BytesIO()
    Image.fromarray(drawn).save(buffer, "PNG")
    return buffer.getvalue()


def _say(line: str) -> None:
    """Prints a line; a character that the terminal lacks is shown as its escape."""
    encoding = sys.stdout.encoding or "utf-8"
    sys.stdout.write(line.encode(encoding, "backslashreplace").decode(encoding) + "\n")


def ask(model: Model, picture: str, *, task: str = "", question: str = "", level: int = 0) -> Reply:
    """What a model says of a picture file: the board and a plan, or the answer to a question.

    The picture is shown as a square of the size that the model was trained on. Where that depends
    on the level, which may be given, it is shown in every such size, and the answer counts whose
    board is most like the picture.
    """
    _check_question(task, question)
    data = model.config.data
    sizes = shown_sizes(data, task, level)
    if question:  # nothing in its answer would tell which size was the right one
        shown = read_picture(picture, sizes[-1])
        return Reply("", model.respond([prompts_lib.question(question, shown)])[0], sizes[-1])
    prompts = prompts_lib.load(data.prompts, data.state_text)
    shown = [read_picture(picture, size) for size in sizes]
    answers = model.respond([prompts_lib.student(prompts, task, pixels) for pixels in shown])
    own = _square(picture)

    def draw(board: Board, size: int) -> np.ndarray:
        return draw_picture(data, board, size)

    return reply_lib.most_likely(
        reply_lib.read(task, answer, size, own, draw)
        for answer, size in zip(answers, sizes, strict=True)
    )


def _square(picture: str) -> np.ndarray:
    """A picture in about its own size, uint8 [S, S, 3]."""
    size = max(open_picture(picture, picture).size)
    return read_picture(picture, min(max(size, _SIDES[0]), _SIDES[1]))


def _check_question(task: str, question: str) -> None:
    if task not in ENVS and (task or not question):
        found = f"ask.task: got {task!r}, want one of {[*ENVS]}"
        raise ValueError(found if task else f"{found}, or a question (ask.question)")


def shown_sizes(data: DataConfig, task: str, level: int = 0) -> list[int]:
    """The sides in pixels of pictures of a task, or of any task, in a training.

    Raises ValueError for a task that was no part of it, where the size depends on the level.
    """
    levels = {x for boards in data.boards if task in ("", boards.task) for x in boards.levels}
    if not levels and not data.picture_size and not level:
        trained = list(dict.fromkeys(boards.task for boards in data.boards))
        raise ValueError(
            f"ask.task: got {task!r}, want one that the model was trained on, of {trained}, or the "
            "level of the board (ask.level)"
        )
    levels = {level} if level or data.picture_size else levels
    return sorted({config_lib.picture_size(data, one) for one in levels})


def load(model: str, config: Config | None = None) -> Model:
    """The model of a stage's folder, of a Hugging Face folder, or behind the URL of an endpoint.

    Without a `config` it is that of its training.
    """
    config = find_config([f"ask.model={model}"]) if config is None else config
    sampling = SamplingConfig(max_new_tokens=config.ask.max_new_tokens, temperature=0.0)
    make = _endpoint_responder if _is_url(model) else _local_responder
    return Model(config, make(model, config, sampling))


def _is_url(model: str) -> bool:
    return model.startswith(("http://", "https://"))


def _local_responder(
    folder: str, config: Config, sampling: SamplingConfig
) -> Callable[[Sequence[list[Message]]], list[Answer]]:
    if not epath.Path(folder).is_dir():
        raise ValueError(
            f"ask.model: {folder} not found, want the folder of a stage, of an export or of a "
            "model of Hugging Face (hf download), or the URL of an endpoint"
        )
    mesh = sharding.open_mesh(config.mesh)
    loaded = loading.load(folder, config, mesh, is_frozen=True)
    respond_to = make_responder(loaded.model, loaded.processor, sampling)
    variables = sharding.make_layout(mesh, loaded.model.dtype)({"params": loaded.params})
    pad_id, parts = loaded.processor.pad_id, axes.parts(mesh, axes.BATCH)

    def respond(prompts: Sequence[list[Message]]) -> list[Answer]:
        encoded = [encode(loaded.processor, p, add_generation_prompt=True) for p in prompts]
        rows = batching.pad_rows(encoded, len(encoded) + -len(encoded) % parts)
        tokens = max(len(row.tokens) for row in rows)
        patches = max(len(picture.patches) for row in rows for picture in row.pictures)
        inputs = batching.to_inputs(
            rows,
            length=_room(tokens, config.data.prompt_buckets),
            side="left",
            pad_id=pad_id,
            patch_buckets=[_room(patches, config.data.patch_buckets)],
            max_pictures=1,
        )
        return respond_to(variables, inputs, np.arange(len(rows), dtype=np.int32))[: len(encoded)]

    return respond


def _room(needed: int, buckets: tuple[int, ...] | Literal["auto"]) -> int:
    """The smallest bucket that holds what is needed, or what a new one would have."""
    buckets = () if buckets == config_lib.AUTO else config_lib.sizes(buckets)
    return min((size for size in buckets if size >= needed), default=needed + -needed % _STEP)


def _endpoint_responder(
    url: str, config: Config, sampling: SamplingConfig
) -> Callable[[Sequence[list[Message]]], list[Answer]]:
    settings = dataclasses.replace(config.evaluate, endpoint=url, sampling=sampling)
    names = endpoint.served_models(settings)
    if len(names) != 1:
        raise ValueError(f"evaluate.endpoint_models: got {names}, want one model to ask")

    def respond(prompts: Sequence[list[Message]]) -> list[Answer]:
        found = dict(
            endpoint.answers(settings, names[0], range(len(prompts)), lambda i: (prompts[i], 0))
        )
        for answer in found.values():
            if answer.error is not None:
                raise ValueError(f"{url}: {answer.error}")
        return [found[i] for i in range(len(prompts))]

    return respond


# ------------------------------------------------------------------------------------- the config


def find_config(assignments: Sequence[str], workdir: str = "") -> Config:
    """The config with which the model of `ask.model` was trained, as far as its folder says.

    Raises ValueError where nothing says which model that is.
    """
    asked = config_lib.override(_UNKNOWN, assignments)
    model = config_lib.resolve(asked, workdir).ask.model if workdir else asked.ask.model
    if "{workdir}" in model:
        raise ValueError("ask.model: required, or --workdir, whose distilled model is asked then")
    return config_lib.check(config_lib.override(_trained(model), assignments))


def _trained(model: str) -> Config:
    """What the folder of a stage or of an export says of the training."""
    found: fields.Json = {}
    root = epath.Path(folders.CONFIG_FILE)
    file = root
    if not _is_url(model):
        root = epath.Path(config_lib.coerce(model, config_lib.Path, "ask.model"))
        if not root.is_dir():
            return _UNKNOWN  # `load` says that it is not there
        file = root / (folders.CONFIG_FILE if stage_folder.is_stage(root) else export.RECORD)
        found = fields.read_json(file) if file.is_file() else {}
    if "data" not in found:
        logging.warning(
            "%s: no record of its training found; pictures are shown with %d pixels a side "
            "(data.picture_size), as public boards are; --config names another config",
            *(model, _UNKNOWN.data.picture_size),
        )
        return _UNKNOWN
    data = config_lib.coerce(found["data"], DataConfig, f"{file}: data")
    if file.name == export.RECORD and (root / PROMPTS).is_dir():
        data = dataclasses.replace(data, prompts=str(root / PROMPTS))
    settings = config_lib.coerce(found["model"], ModelConfig, f"{file}: model")
    known = dataclasses.replace(_UNKNOWN, data=data, model=settings)
    return config_lib.resolve(known, str(paths.absolute(root).parent))
