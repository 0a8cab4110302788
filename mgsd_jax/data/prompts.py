"""What is said to the model: grounding, student and teacher messages, made from one state.

Student and teacher get the same task, the same rules and the same answer format, so that the
student's tokens are likely under the teacher; only the board differs, a picture for one and text
for the other. A response states the board, then one sentence with the route, then one answer
block. Any template can be replaced by a file in a folder (`load`).
"""

import dataclasses
import itertools
import pathlib
from collections.abc import Mapping
from typing import Any, Literal

import numpy as np

from mgsd_jax.config import StateText, TeacherContext
from mgsd_jax.envs import BY_ROWS, ENVS, AnyState, responses
from mgsd_jax.envs.base import ANSWER_FORMS, CELLS_RULE, ROUTE_START, Env, Question
from mgsd_jax.envs.search import Plan, grid_cells

Message = dict[str, Any]
Kind = Literal["student", "teacher", "grounding"]

_PICTURE = "The board is shown in the picture."
_TEXT = "The board is given as text."
_STATE_FIRST = "First state the board, one item a line, exactly in this form:"
_PLAN_NEXT = "Then write one sentence that names the cells of the route in order, like this:"
_ANSWER_LAST = "End with the actions inside one answer block, like this:"
_ASK = "Answer each question about the picture on its own numbered line."
_ASK_CELLS = "Say what every cell of the picture shows, one line a cell."

_MARKS: dict[Kind, str] = {"student": "<picture>", "teacher": "<state>", "grounding": "<picture>"}
_PARTS: dict[Kind, tuple[str, ...]] = {
    "student": ("rules", "picture", "format", "<picture>"),
    "teacher": ("rules", "text", "format", "<state>"),
    "grounding": ("<picture>", "ask", "<questions>"),
}


@dataclasses.dataclass(frozen=True)
class Prompts:
    """Templates that replace built-in ones, by task and kind, and the form of texts of boards.

    `<picture>`, `<state>`, `<questions>` mark where the board goes.
    """

    replaced: Mapping[tuple[str, Kind], str]
    state_text: StateText = "cells"

    def env(self, task: str) -> Env[AnyState]:
        """The env of a task, with the words of the form."""
        by_form = BY_ROWS if self.state_text == "rows" else ENVS
        return by_form.get(task, ENVS[task])

    def template(self, task: str, kind: Kind) -> str:
        """The template of a task: the one given, or the built-in one."""
        parts = passages(self.env(task))
        built_in = "".join(parts.get(part, part) for part in _PARTS[kind])
        return self.replaced.get((task, kind), built_in)


BUILT_IN = Prompts({})


def passages(env: Env[AnyState]) -> dict[str, str]:
    """The parts that no board changes, each ending in a newline, by name."""
    wording = env.wording
    lines = {
        "rules": wording.rules,
        "picture": (_PICTURE, wording.legend),
        "text": (_TEXT,),
        "format": (
            *(_STATE_FIRST, *wording.form),
            *(_PLAN_NEXT, wording.route),
            *(_ANSWER_LAST, f"<answer>{wording.answer}</answer>"),
        ),
        "ask": (_ASK, CELLS_RULE, wording.legend),
    }
    return {name: "".join(line + "\n" for line in part) for name, part in lines.items()}


def load(folder: str, state_text: StateText) -> Prompts:
    """The built-in prompts, with those replaced that `folder` holds as `{task}.{kind}.txt`.

    kind is student, teacher or grounding. '' replaces none. Raises ValueError for an absent
    folder, a folder without any such file, a file of an unknown name, or a missing mark.
    """
    if not folder:
        return Prompts({}, state_text)
    root = pathlib.Path(folder)
    files = sorted(root.glob("*.txt"))
    names: dict[str, tuple[str, Kind]] = {
        f"{task}.{kind}.txt": (task, kind) for task in ENVS for kind in _MARKS
    }
    if not files:
        raise ValueError(f"{root}: got no prompt file, want some of {sorted(names)}")
    replaced: dict[tuple[str, Kind], str] = {}
    for file in files:
        if file.name not in names:
            raise ValueError(f"{file}: got an unknown prompt name, want one of {sorted(names)}")
        task, kind = names[file.name]
        text = file.read_text(encoding="utf-8").strip("\n")
        for mark in (_MARKS[kind], "<questions>")[: 2 if kind == "grounding" else 1]:
            if text.count(mark) != 1:
                raise ValueError(f"{file}: got {text.count(mark)} marks {mark}, want just one")
        replaced[task, kind] = text
    return Prompts(replaced, state_text)


def student(prompts: Prompts, task: str, picture: np.ndarray) -> list[Message]:
    """The student's messages: instructions and the picture, uint8 [H, W, 3]."""
    content = _with_picture(prompts.template(task, "student"), picture)
    return [{"role": "user", "content": content}]


def question(text: str, picture: np.ndarray) -> list[Message]:
    """A question in one's own words about a picture, uint8 [H, W, 3]."""
    content: list[Message] = [{"type": "image", "image": picture}, {"type": "text", "text": text}]
    return [{"role": "user", "content": content}]


def teacher(
    prompts: Prompts, task: str, state: AnyState, context: TeacherContext = "state"
) -> list[Message]:
    """The teacher's messages: the same instructions and the board as text, no picture.

    `context` adds the solver's plan below the board, or all optimal plans; of very many it says how
    many it shows.
    """
    env = prompts.env(task)
    text = env.describe(state)
    if context == "state_and_plan":
        text += "\nOne shortest plan: " + env.spell(env.shortest_plan(state))
    elif context == "state_and_all_optimal_plans":
        plans, total = env.shortest_plans(state), env.count_shortest_plans(state)
        shown = "All" if len(plans) == total else "Some"
        number = "" if len(plans) == total else f" ({len(plans)} of {total})"
        spelled = " or ".join(map(env.spell, plans))
        text += f"\n{shown} shortest plans{number}: {spelled}"
    return [{"role": "user", "content": prompts.template(task, "teacher").replace("<state>", text)}]


def grounding(
    prompts: Prompts, task: str, state: AnyState, picture: np.ndarray
) -> tuple[list[Message], str]:
    """Messages that ask every question about the picture, and the numbered answers."""
    questions = prompts.env(task).questions(state)
    asked = "\n".join(ask(i, question) for i, question in enumerate(questions, 1))
    text = prompts.template(task, "grounding").replace("<questions>", asked)
    content = _with_picture(text, picture)
    return [{"role": "user", "content": content}], right_answers(task, state, prompts)


def right_answers(task: str, state: AnyState, prompts: Prompts = BUILT_IN) -> str:
    """The numbered answers to all questions about a picture."""
    questions = enumerate(prompts.env(task).questions(state), 1)
    return "\n".join(_numbered(i, question.answer) for i, question in questions)


def ask(number: int, question: Question) -> str:
    """The numbered line of a question, which ends with the form of its answer."""
    return f"{number}. {question.text} {ANSWER_FORMS[question.kind]}"


def ask_cells(task: str) -> str:
    """The instruction of `cells`."""
    return f"{_ASK_CELLS}\n{CELLS_RULE}\n{ENVS[task].wording.legend}\n"


def cells(task: str, state: AnyState, picture: np.ndarray) -> tuple[list[Message], str]:
    """Messages that ask what each cell of the picture shows, and the answer, a line a cell.

    The first thing to learn about pictures: every line is about one place.
    """
    env = ENVS[task]
    shown = {fact[1]: fact[0] for fact in env.facts(state) if fact[0] in env.labels}
    answer = "\n".join(
        f"({row},{column}): {shown.get((row, column), 'floor')}"
        for row, column in grid_cells(state.size)
    )
    content = _with_picture("<picture>" + ask_cells(task), picture)
    return [{"role": "user", "content": content}], answer


def response(task: str, state: AnyState, plan: Plan, prompts: Prompts = BUILT_IN) -> str:
    """A right response: the board, the route of `plan`, the answer block."""
    env = prompts.env(task)
    route = env.route(plan, env.trace(state, plan))
    return "\n".join((*env.state_lines(state), route, f"<answer>{env.spell(plan)}</answer>"))


SEGMENTS = ("plan", "state", "sentence", "format")  # the most telling first


def character_segments(response_text: str) -> bytes:
    """The index in SEGMENTS of every character of a response.

    The plan is the inside of the block that is scored, the last complete one. The state runs up to
    the route sentence before it, the sentence up to the block. Thoughts, other blocks and what
    follows are format; so is a block that was never closed.
    """
    plan, state, sentence, rest = (bytes([i]) for i in range(len(SEGMENTS)))
    text, size = responses.without_thoughts(response_text), len(response_text)
    blocks, scored = responses.block_spans(text), responses.answer_span(text)
    body = blocks[-1][0] if blocks else responses.first_tag(text)
    route = text.rfind(ROUTE_START, 0, body)
    route = body if route < 0 else route
    parts = bytearray(state * route + sentence * (body - route) + rest * (size - body))
    for start, end in blocks:
        parts[start:end] = rest * (end - start)
    if scored is not None:
        parts[slice(*scored)] = plan * (scored[1] - scored[0])
    said = [(0, 0), *responses.said_spans(response_text), (size, size)]
    for (_, start), (end, _) in itertools.pairwise(said):
        parts[start:end] = rest * (end - start)
    return bytes(parts)


def _numbered(number: int, answer: str) -> str:
    return f"{number}.\n{answer}" if "\n" in answer else f"{number}. {answer}"


def _with_picture(text: str, picture: np.ndarray) -> list[Message]:
    before, after = text.split("<picture>")
    parts: list[Message] = [{"type": "text", "text": before}] if before else []
    parts.append({"type": "image", "image": picture})
    return [*parts, {"type": "text", "text": after}] if after else parts
