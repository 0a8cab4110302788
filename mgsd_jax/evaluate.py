"""Answers boards with a model and scores the answers: planning, perception, diagnostics.

A row is one answered prompt, JSON on one line of `rows.jsonl`; `summary.json` is computed from the
rows alone (summary.py). Axes: B batch, R response tokens.
"""

import collections
import dataclasses
import json
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging

from mgsd_jax import config as config_lib
from mgsd_jax import loading, metrics, stage, summary
from mgsd_jax import prompts as prompts_lib
from mgsd_jax.batch import Inputs
from mgsd_jax.config import Config, EvaluateConfig, Mode
from mgsd_jax.data import batching
from mgsd_jax.data.boards import Board
from mgsd_jax.data.processor import Encoded, Processor, decode, encode
from mgsd_jax.data.sources import Encoder
from mgsd_jax.envs import ENVS, facts, rules
from mgsd_jax.metrics import Mean
from mgsd_jax.model.qwen3vl import Qwen3VL
from mgsd_jax.sampler import Sampling, make_rollout
from mgsd_jax.token_stats import TokenStats

Row = dict[str, Any]
Answerer = Callable[[Any, Sequence[Board], Mode], list[Row]]


def make_answerer(
    model: Qwen3VL, encoder: Encoder, settings: EvaluateConfig, seed: int = 0
) -> Answerer:
    """A function (variables, boards, mode) -> rows without a model name, in the boards' order."""
    processor = encoder.processor
    generate = make_rollout(
        model,
        Sampling(**config_lib.to_dict(settings.sampling)),
        eos_ids=processor.eos_ids,
        banned_ids=(processor.image_token_id, processor.video_token_id),
        pad_id=processor.pad_id,
    )
    rng = jax.random.key(seed)

    def answer(variables: Any, boards: Sequence[Board], mode: Mode) -> list[Row]:
        # A blind student is asked about each board under the picture of another one.
        shown = misleading(boards) if mode == "blind" else boards
        rows: list[Row] = []
        for start in range(0, len(boards), settings.batch_size):
            chosen = slice(start, start + settings.batch_size)
            padded, _ = batching.pad_rows(shown[chosen], settings.batch_size)
            inputs = _inputs(encoder, [encode_prompt(encoder, b, mode) for b in padded], mode)
            row_ids = np.arange(start, start + settings.batch_size, dtype=np.int32)
            sampled = jax.device_get(generate(variables, inputs, rng, jnp.asarray(row_ids)))
            texts = decode_rows(processor, sampled.tokens, sampled.mask)
            for i, board in enumerate(boards[chosen]):
                row = score_row(board, mode, texts[i])
                row["truncated"] = bool(sampled.truncated[i])
                row["response_tokens"] = int(sampled.mask[i].sum())
                rows.append(row)
        return rows

    return answer


def _inputs(encoder: Encoder, encoded: Sequence[Encoded], mode: Mode) -> Inputs:
    buckets = encoder.data.teacher_buckets if mode == "text" else encoder.data.prompt_buckets
    longest = max(len(row.tokens) for row in encoded)
    return batching.to_inputs(
        encoded,
        length=batching.bucket(longest, buckets, name=f"tokens of a {mode} prompt"),
        side="left",
        pad_id=encoder.processor.pad_id,
        patch_buckets=encoder.data.patch_buckets,
        max_pictures=1,
    )


def encode_prompt(encoder: Encoder, board: Board, mode: Mode) -> Encoded:
    """The prompt that asks about a board in a mode."""
    if mode == "text":
        return encoder.teacher(board, "state")
    if mode == "perception":
        messages, _ = prompts_lib.grounding(
            encoder.prompts, board.task, board.state, encoder.picture(board)
        )
        return encode(encoder.processor, messages, add_generation_prompt=True)
    return encoder.student(board)


def misleading(boards: Sequence[Board]) -> list[Board]:
    """For every board another one of its task and level: the next, the last one's is the first."""
    groups: dict[tuple[str, int], list[int]] = collections.defaultdict(list)
    for i, board in enumerate(boards):
        groups[board.task, board.level].append(i)
    others = list(boards)
    for (task, level), group in groups.items():
        if len(group) < 2:
            raise ValueError(f"blind: got one board of {task} level {level}, want two or more")
        for i, other in zip(group, [*group[1:], group[0]], strict=True):
            others[i] = boards[other]
    return others


def score_row(board: Board, mode: Mode, response: str) -> Row:
    """The row of a response, all that needs no model: plan, outcome, state facts, questions."""
    env = ENVS[board.task]
    row: Row = {
        "id": f"{board.task}/{board.level}/{board.index}/{mode}",
        "mode": mode,
        "task": board.task,
        "level": board.level,
        "index": board.index,
        "task_text": env.to_text(board.state, split="test", index=board.index, seed=0),
        "response": response,
    }
    if mode == "perception":
        answers = read_numbered(response)
        row["perception"] = {
            question.name: answers.get(i, "").strip() == question.answer.strip()
            for i, question in enumerate(env.questions(board.state), 1)
        }
        return row
    true, stated = env.facts(board.state), facts.read_facts(board.task, response)
    outcome = rules.judge(board.state, board.task, response)
    own_state = facts.state_from_facts(board.task, stated)
    row["outcome"] = dataclasses.asdict(outcome)
    row["plan"] = list(rules.parse_plan(response, board.task).plan)
    row["state_f1"] = facts.state_f1(stated, true)
    row["state_exact"] = stated == true
    row["plan_given_own_state"] = (
        False if own_state is None else rules.judge(own_state, board.task, response).success
    )
    return row


def read_numbered(response: str) -> dict[int, str]:
    """The text after each `1.`, `2.`, ... at the start of a line; the first of a number counts."""
    answers: dict[int, str] = {}
    current = 0
    for line in response.split("\n"):
        number, separator, rest = line.partition(".")
        if separator and number.isdigit() and int(number) not in answers:
            current = int(number)
            answers[current] = rest
        elif current:
            answers[current] += "\n" + line
    return answers


def decode_rows(processor: Processor, tokens: np.ndarray, mask: np.ndarray) -> list[str]:
    """The text of each response [B, R], up to and without its end token."""
    return [decode(processor, row[m > 0]) for row, m in zip(tokens, mask, strict=True)]


def rollout_metrics(
    boards: Sequence[Board], responses: Sequence[str], truncated: np.ndarray, mask: np.ndarray
) -> dict[str, Mean]:
    """Parsed, legal, success, optimal overall and by task; response length; truncated share."""
    sums: dict[str, Mean] = collections.defaultdict(lambda: Mean(0.0, 0.0))
    for board, response in zip(boards, responses, strict=True):
        outcome = rules.judge(board.state, board.task, response)
        for name in ("parsed", "legal", "success", "optimal"):
            one = Mean(float(getattr(outcome, name)), 1.0)
            sums[f"rollout/{name}"] += one
            sums[f"rollout/{name}/{board.task}"] += one
        stated = facts.read_facts(board.task, response)
        exact = stated == ENVS[board.task].facts(board.state)
        sums["rollout/state_exact"] += Mean(float(exact), 1.0)
    sums["rollout/length"] = Mean(float(mask.sum()), float(len(boards)))
    sums["rollout/truncated"] = Mean(float(np.sum(truncated)), float(len(boards)))
    return dict(sums)


def token_metrics(
    processor: Processor, tokens: np.ndarray, mask: np.ndarray, stats: TokenStats
) -> dict[str, Mean]:
    """KL by token group and by response position, student entropy, agreement with the teacher."""
    kl, valid = np.asarray(stats.kl), mask > 0
    count = float(valid.sum())
    groups = segments(processor, tokens, valid)
    measured = {
        f"kl/{name}": Mean(float(kl[groups == i].sum()), float((groups == i).sum()))
        for i, name in enumerate(prompts_lib.SEGMENTS)
    }
    position = np.broadcast_to(np.arange(kl.shape[1]), kl.shape)
    for low, high in ((0, 4), (4, 16), (16, 64), (64, 256), (256, 1 << 30)):
        inside = valid & (position >= low) & (position < high)
        name = f"kl_pos/{low}-{high - 1}" if high < 1 << 30 else f"kl_pos/{low}-"
        measured[name] = Mean(float(kl[inside].sum()), float(inside.sum()))
    for name, values in (
        ("student_entropy", stats.student_entropy),
        ("teacher_entropy", stats.teacher_entropy),
        ("teacher_agreement", stats.top1_agree),
        ("kl_cap_share", stats.clipped),
    ):
        measured[name] = Mean(float(np.asarray(values)[valid].sum()), count)
    return measured


def segments(processor: Processor, tokens: np.ndarray, valid: np.ndarray) -> np.ndarray:
    """The index in `prompts.SEGMENTS` of every response token [B, R], -1 where not valid.

    A token belongs to where its first character stands in the decoded response.
    """
    groups = np.full(tokens.shape, -1, np.int32)
    names = prompts_lib.SEGMENTS
    for b, row in enumerate(tokens):
        length = int(valid[b].sum())
        pieces = [decode(processor, [token]) for token in row[:length]]
        starts = np.cumsum([0, *(len(piece) for piece in pieces)])[:length]
        groups[b, :length] = names.index("format")
        for start, end, name in prompts_lib.segment_spans("".join(pieces)):
            inside = (starts >= start) & (starts < end)
            groups[b, :length][inside] = names.index(name)
        # An end token has no text of its own: it is format wherever it stands.
        empty = np.array([not piece for piece in pieces], bool)
        groups[b, :length][empty] = names.index("format")
    return groups


def validation_metrics(rows: Sequence[Row]) -> dict[str, Mean]:
    """Success and exact states over the validation boards, each task and level weighing alike."""
    cells: dict[tuple[str, int], list[Row]] = collections.defaultdict(list)
    for row in rows:
        cells[row["task"], row["level"]].append(row)
    success = [np.mean([row["outcome"]["success"] for row in cell]) for cell in cells.values()]
    exact = [np.mean([row["state_exact"] for row in cell]) for cell in cells.values()]
    return {
        "val/success": Mean(float(np.mean(success)), 1.0),
        "val/state_exact": Mean(float(np.mean(exact)), 1.0),
    }


def spread(boards: Sequence[Board], count: int) -> list[Board]:
    """The first `count` boards, taken from every task and level in turn."""
    cells: dict[tuple[str, int], list[Board]] = collections.defaultdict(list)
    for i in range(min(len(boards), 1 << 14)):
        cells[boards[i].task, boards[i].level].append(boards[i])
    chosen: list[Board] = []
    for turn in range(max((len(cell) for cell in cells.values()), default=0)):
        chosen += [cell[turn] for cell in cells.values() if turn < len(cell)]
    return chosen[:count]


def run(config: Config, workdir: str) -> None:
    """Answers the test boards with every model; writes rows.jsonl and summary.json.

    A model and mode whose rows are all there already is not asked again.
    """
    settings = config.evaluate
    folder = pathlib.Path(workdir) / "evaluate"
    boards = stage.boards(config, workdir, "test")
    stage.claim(folder, config, ("data", "evaluate", "seed"))
    path = folder / "rows.jsonl"
    rows = read_rows(path)
    asked: list[tuple[str, str, Mode]] = [
        (name, source, mode)
        for name, source in settings.models
        for mode in settings.modes
        if name == settings.reference or mode not in settings.reference_only
    ]
    progress = metrics.open_progress(len(asked), is_main=jax.process_index() == 0, every=1)
    with path.open("a", encoding="utf-8") as file:
        for done, (name, source, mode) in enumerate(asked, 1):
            there = {row["id"] for row in rows if (row["model"], row["mode"]) == (name, mode)}
            missing = [b for b in boards if f"{b.task}/{b.level}/{b.index}/{mode}" not in there]
            if missing:
                loaded = loading.load(source, config, workdir)
                encoder = stage.encoder(config, loaded.processor)
                answer = make_answerer(loaded.model, encoder, settings, config.seed)
                for row in answer({"params": loaded.params}, boards, mode):
                    if row["id"] not in there:
                        rows.append({"model": name, **row})
                        file.write(json.dumps(rows[-1]) + "\n")
                file.flush()
            progress.update(done, float(len(rows)), 0.0)
    progress.close()
    result = summary.summarize(rows, source=str(path))
    (folder / "summary.json").write_text(json.dumps(result, indent=2) + "\n")
    for name, modes in result["models"].items():
        for mode, measures in modes.items():
            logging.info("%-10s %-10s %s", name, mode, measures.get("macro"))


def read_rows(path: pathlib.Path) -> list[Row]:
    """The rows written so far; a last line that a kill cut short is dropped, and said."""
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").split("\n")
    if lines[-1]:
        logging.warning("%s: dropped a last line that was cut short", path)
        path.write_text("".join(line + "\n" for line in lines[:-1]), encoding="utf-8")
    return [json.loads(line) for line in lines[:-1]]
