"""The lengths of prompts, records and answers of the recipes' levels, in a checkpoint's own tokens.

    python benchmarks/tokens.py --folder models/Qwen3-VL-4B-Instruct
    python benchmarks/tokens.py --folder models/Qwen3-VL-4B-Instruct --mazes

Needs the folder's tokenizer and settings, no weights. Prints one JSON line: the most tokens by
level and kind (a prompt of a mode, a teacher's by context, a grounding record, a right response),
the largest bucket of configs/qwen3vl.py that has to hold each of them, and by kind what a typical
batch of 32 boards has: the median over batches of its mean, and of its longest, and the share of
the batches whose longest fits into each of some buckets. With --mazes it prints a table instead:
what mazes of each level take, told by cells and told by rows (data.state_text).
"""

import argparse
import json
import pathlib
import runpy
from collections.abc import Iterator
from typing import get_args

import numpy as np

from mgsd_jax import config as config_lib
from mgsd_jax.data.boards import Board
from mgsd_jax.data.encoder import Encoder
from mgsd_jax.data.loaders import stream_boards
from mgsd_jax.data.processor import Processor, encode_answer, load_processor
from mgsd_jax.data.prompts import BUILT_IN, Prompts
from mgsd_jax.data.records import RECORDS
from mgsd_jax.sampling import answers

ROOT = pathlib.Path(__file__).parents[1]
ROWS = 32  # of a batch
SIZES = (320, 384, 512, 576)  # of buckets
MAZES = (3, 4, 5, 6, 7, 8, 16, 32)  # levels of the recipes and of the public boards


def lengths(encoder: Encoder, board: Board, rng: np.random.Generator) -> Iterator[tuple[str, int]]:
    """(kind, tokens) of everything that is made of a board."""
    for mode in get_args(config_lib.Mode):
        yield mode, len(answers.encode_prompt(encoder, board, mode).tokens)
    for context in get_args(config_lib.TeacherContext):
        yield context, len(encoder.teacher(board, context).tokens)
    for kind in RECORDS:
        yield kind, len(encoder.record(board, kind, rng)[0].tokens)
    yield "response", len(encoder.reference(board, rng))


def typical(
    pool: dict[str, list[tuple[float, int]]], rows: int = ROWS, batches: int = 2000
) -> dict[str, dict[str, float]]:
    """Of batches of `rows` boards, drawn by their weights: what the usual one holds, by kind.

    `pool` has (weight, tokens) of some boards of every level.
    """
    found = {}
    for kind, drawn in pool.items():
        weights, tokens = (np.array(values) for values in zip(*drawn, strict=True))
        rng = np.random.default_rng(0)
        rows_of = rng.choice(tokens, (batches, rows), p=weights / weights.sum())
        longest = rows_of.max(axis=1)
        found[kind] = {
            "mean": round(float(np.median(rows_of.mean(axis=1))), 1),
            "longest": int(np.median(longest)),
            **{f"within_{size}": round(float((longest <= size).mean()), 3) for size in SIZES},
        }
    return found


def rooms(config: config_lib.Config) -> dict[str, int]:
    """The most tokens that a recipe has room for, by kind."""
    data = config.data
    prompt, teacher, record = map(
        lambda buckets: max(config_lib.sizes(buckets)),
        (data.prompt_buckets, data.teacher_buckets, data.sequence_buckets),
    )
    return {
        **dict.fromkeys(get_args(config_lib.Mode), prompt),
        **dict.fromkeys(("text", *get_args(config_lib.TeacherContext)), teacher),
        **dict.fromkeys(RECORDS, record),
        "response": config.distillation.sampling.max_new_tokens,
    }


def maze_lengths(encoder: Encoder, board: Board) -> dict[str, int]:
    """Tokens of what is made of a maze and tells its open sides."""
    rng = np.random.default_rng(0)
    text = encoder.prompts.env("maze").describe(board.state)
    return {
        "board": len(encode_answer(encoder.processor, text)) - 1,  # without the end of the turn
        "teacher's prompt": len(encoder.teacher(board, "state").tokens),
        "right response": len(encoder.reference(board, rng)),
        "questions, answered": len(encoder.record(board, "questions", rng)[0].tokens),
    }


def maze_table(processor: Processor, data: config_lib.DataConfig, count: int) -> Iterator[str]:
    """The most tokens by level, told by cells and told by rows, as lines of a table."""
    forms = {form: Prompts({}, form) for form in get_args(config_lib.StateText)}
    for level in MAZES:
        most: dict[str, int] = {}
        for board in stream_boards([("maze", level)], "train", seed=0, count=count):
            for form, words in forms.items():
                for kind, tokens in maze_lengths(Encoder(processor, words, data), board).items():
                    name = f"{kind}: {form}"
                    most[name] = max(most.get(name, 0), tokens)
        names = sorted(most, key=lambda name: name.partition(":")[0])
        if level == MAZES[0]:
            yield f"| level | {' | '.join(names)} |\n|--:|{'--:|' * len(names)}"
        yield f"| {level} | {' | '.join(f'{most[name]:,}' for name in names)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", required=True)
    parser.add_argument("--boards", type=int, default=30, help="of each level")
    parser.add_argument("--mazes", action="store_true", help="the table of mazes")
    arguments = parser.parse_args()
    config = runpy.run_path(str(ROOT / "configs" / "qwen3vl.py"))["get_config"]("4b,release")
    processor = load_processor(arguments.folder)
    if arguments.mazes:
        print(*maze_table(processor, config.data, arguments.boards), sep="\n")
        return
    encoder = Encoder(processor, BUILT_IN, config.data)
    longest: dict[str, dict[str, int]] = {}
    pool: dict[str, list[tuple[float, int]]] = {}
    for levels in config.data.boards:
        for level in levels.levels:
            name, rng = f"{levels.task} {level}", np.random.default_rng(0)
            drawn = stream_boards([(levels.task, level)], "train", seed=0, count=arguments.boards)
            for board in drawn:
                for kind, count in lengths(encoder, board, rng):
                    kinds = longest.setdefault(name, {})
                    kinds[kind] = max(kinds.get(kind, 0), count)
                    pool.setdefault(kind, []).append((levels.train, count))
    print(json.dumps({"room": rooms(config), "longest": longest, "batch": typical(pool)}))


if __name__ == "__main__":
    main()
