"""What is said to the model: grounding, student and teacher messages, made from one state.

Student and teacher get the same task, the same rules and the same answer format, so that the
student's tokens are likely under the teacher; only the board differs, a picture for one and text
for the other. A response states the board, then one sentence with the route, then one answer
block. Any template can be replaced by a file in a folder (`load`).
"""

import dataclasses
import itertools
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from mgsd_jax.config import TeacherContext
from mgsd_jax.envs import ENVS, responses
from mgsd_jax.envs.base import ANSWER_FORMS, Plan, Question

Message = dict[str, Any]
LETTERS = {"up": "U", "down": "D", "left": "L", "right": "R", "pick": "PICK", "drop": "DROP"}

_CELLS = "A cell is written (row,column), counted from 0 at the top left corner."
_PICTURE = "The board is shown in the picture."
_TEXT = "The board is given as text."
_STATE_FIRST = "First state the board, one item a line, exactly in this form:"
_PLAN_NEXT = "Then write one sentence that names the cells of the route in order, like this:"
_ANSWER_LAST = "End with the actions inside one answer block, like this:"

_RULES = {
    "frozenlake": (
        "Find a way over the frozen lake for the player.",
        _CELLS,
        "The player moves one cell at a time: up (U), down (D), left (L) or right (R).",
        "A move off the board leaves the player in place; a hole ends the walk in failure.",
        "Reach the goal in as few moves as possible.",
    ),
    "maze": (
        "Find a way through the maze for the player.",
        _CELLS,
        "The player moves one cell at a time: up (U), down (D), left (L) or right (R).",
        "Only open sides of a cell can be crossed; running into a wall ends the walk in failure.",
        "Reach the goal in as few moves as possible.",
    ),
    "minibehaviour": (
        "Let the agent carry the printer to the table.",
        _CELLS,
        "The agent moves one cell at a time: up (U), down (D), left (L) or right (R).",
        "PICK takes the printer from a neighbouring cell; DROP puts it on a neighbouring table.",
        "The table blocks the way, and so does the printer until it is taken.",
        "Finish with DROP in as few actions as possible.",
    ),
}
_LEGEND = {
    "frozenlake": "The player wears green, the goal is a gift box, holes are blue pools.",
    "maze": "Walls are black; the player is the yellow dot, the goal is the blue dot.",
    "minibehaviour": "The agent is the red triangle, the printer is white, table cells are brown.",
}
_FORM = {
    "frozenlake": (
        "Map size: NxN",
        "Player: cell",
        "Goal: cell",
        "Holes: cells, or none",
    ),
    "maze": (
        "Map size: NxN",
        "Player: cell",
        "Goal: cell",
        "Open directions:",
        "cell: its open sides among up, down, left, right (a line for every cell)",
    ),
    "minibehaviour": (
        "Map size: NxN",
        "Agent: cell",
        "Printer: cell",
        "Table: cells",
        "Next to printer: cells",
        "Next to table: cells",
    ),
}
_ROUTE_FORM = {
    "frozenlake": "I go through (2,0) (1,0) (1,1).",
    "maze": "I go through (2,0) (1,0) (1,1).",
    "minibehaviour": "I go through (2,0) (1,0), pick up, go through (1,0) (1,1), and drop.",
}
_ANSWER_FORM = {
    "frozenlake": "<answer>UR</answer>",
    "maze": "<answer>UR</answer>",
    "minibehaviour": "<answer>U,PICK,R,DROP</answer>",
}
_ASK = "Answer each question about the picture on its own numbered line."
_ASK_CELLS = "Say what every cell of the picture shows, one line a cell."


CELL_WORDS = ("player", "goal", "hole", "agent", "printer", "table", "floor")


@dataclasses.dataclass(frozen=True)
class Prompts:
    """Templates by task. `<picture>`, `<state>`, `<questions>` mark where the board goes."""

    student: dict[str, str]
    teacher: dict[str, str]
    grounding: dict[str, str]


def passages(task: str) -> dict[str, str]:
    """The parts that no board changes, each ending in a newline, by name."""
    form = (
        *(_STATE_FIRST, *_FORM[task]),
        *(_PLAN_NEXT, _ROUTE_FORM[task]),
        *(_ANSWER_LAST, _ANSWER_FORM[task]),
    )
    lines = {
        "rules": _RULES[task],
        "picture": (_PICTURE, _LEGEND[task]),
        "text": (_TEXT,),
        "format": form,
        "ask": (_ASK, _CELLS, _LEGEND[task]),
    }
    return {name: "".join(line + "\n" for line in part) for name, part in lines.items()}


def _template(task: str, *parts: str) -> str:
    return "".join(passages(task).get(part, part) for part in parts)


BUILT_IN = Prompts(
    student={t: _template(t, "rules", "picture", "format", "<picture>") for t in _RULES},
    teacher={t: _template(t, "rules", "text", "format", "<state>") for t in _RULES},
    grounding={t: _template(t, "<picture>", "ask", "<questions>") for t in _RULES},
)
_MARKS = {"student": "<picture>", "teacher": "<state>", "grounding": "<picture>"}


def load(folder: str) -> Prompts:
    """The built-in prompts, with those replaced that `folder` holds as `{task}.{kind}.txt`.

    kind is student, teacher or grounding. '' is the built-in set. Raises ValueError for an absent
    folder, a folder without any such file, a file of an unknown name, or a missing mark.
    """
    if not folder:
        return BUILT_IN
    root = pathlib.Path(folder)
    files = sorted(root.glob("*.txt"))
    names = {f"{task}.{kind}.txt": (task, kind) for task in _RULES for kind in _MARKS}
    if not files:
        raise ValueError(f"{root}: got no prompt file, want some of {sorted(names)}")
    templates = {kind: dict(getattr(BUILT_IN, kind)) for kind in _MARKS}
    for file in files:
        if file.name not in names:
            raise ValueError(f"{file}: got an unknown prompt name, want one of {sorted(names)}")
        task, kind = names[file.name]
        text = file.read_text(encoding="utf-8").strip("\n")
        for mark in (_MARKS[kind], "<questions>")[: 2 if kind == "grounding" else 1]:
            if text.count(mark) != 1:
                raise ValueError(f"{file}: got {text.count(mark)} marks {mark}, want just one")
        templates[kind][task] = text
    return Prompts(**templates)


def student(prompts: Prompts, task: str, picture: np.ndarray) -> list[Message]:
    """The student's messages: instructions and the picture, uint8 [H, W, 3]."""
    return [{"role": "user", "content": _with_picture(prompts.student[task], picture)}]


def teacher(
    prompts: Prompts, task: str, state: Any, context: TeacherContext = "state"
) -> list[Message]:
    """The teacher's messages: the same instructions and the board as text, no picture.

    `context` adds the solver's plan below the board, or all optimal plans; of very many it says how
    many it shows.
    """
    text = ENVS[task].describe(state)
    if context == "state_and_plan":
        text += "\nOne shortest plan: " + spell(task, ENVS[task].shortest_plan(state))
    elif context == "state_and_all_optimal_plans":
        plans, total = ENVS[task].shortest_plans(state), ENVS[task].count_shortest_plans(state)
        shown = "All" if len(plans) == total else "Some"
        number = "" if len(plans) == total else f" ({len(plans)} of {total})"
        spelled = " or ".join(spell(task, plan) for plan in plans)
        text += f"\n{shown} shortest plans{number}: {spelled}"
    return [{"role": "user", "content": prompts.teacher[task].replace("<state>", text)}]


def grounding(
    prompts: Prompts, task: str, state: Any, picture: np.ndarray
) -> tuple[list[Message], str]:
    """Messages that ask every question about the picture, and the numbered answers."""
    questions = ENVS[task].questions(state)
    asked = "\n".join(ask(i, question) for i, question in enumerate(questions, 1))
    answer = "\n".join(_numbered(i, q.answer) for i, q in enumerate(questions, 1))
    text = prompts.grounding[task].replace("<questions>", asked)
    return [{"role": "user", "content": _with_picture(text, picture)}], answer


def ask(number: int, question: Question) -> str:
    """The numbered line of a question, which ends with the form of its answer."""
    return f"{number}. {question.text} {ANSWER_FORMS[question.kind]}"


def ask_cells(task: str) -> str:
    """The instruction of `cells`."""
    return "".join(line + "\n" for line in (_ASK_CELLS, _CELLS, _LEGEND[task]))


def cells(task: str, state: Any, picture: np.ndarray) -> tuple[list[Message], str]:
    """Messages that ask what each cell of the picture shows, and the answer, a line a cell.

    The first thing to learn about pictures: every line is about one place.
    """
    shown = {fact[1]: fact[0] for fact in ENVS[task].facts(state) if fact[0] in CELL_WORDS}
    answer = "\n".join(
        f"({row},{column}): {shown.get((row, column), 'floor')}"
        for row in range(state.size)
        for column in range(state.size)
    )
    content = _with_picture("<picture>" + ask_cells(task), picture)
    return [{"role": "user", "content": content}], answer


def response(task: str, state: Any, plan: Plan) -> str:
    """A right response: the board, the route of `plan`, the answer block."""
    lines = (*ENVS[task].state_lines(state), route_sentence(task, state, plan))
    return "\n".join((*lines, f"<answer>{spell(task, plan)}</answer>"))


def spell(task: str, plan: Plan) -> str:
    """The plan as it stands in an answer block: `UUR`, or `U,PICK,R,DROP`."""
    return ("," if task == "minibehaviour" else "").join(LETTERS[action] for action in plan)


def route_sentence(task: str, state: Any, plan: Plan) -> str:
    """One sentence with the cells that a legal plan visits, the start first."""
    cells = ENVS[task].trace(state, plan)
    if task != "minibehaviour":
        return f"I go through {_spell_cells(cells)}."
    # Picking does not move the agent: its cell ends the first half and starts the second.
    moves = plan.index("pick")
    here, there = cells[: moves + 1], cells[moves:]
    there = [cell for i, cell in enumerate(there) if i == 0 or cell != there[i - 1]]
    return (
        f"I go through {_spell_cells(here)}, pick up, go through {_spell_cells(there)}, and drop."
    )


SEGMENTS = ("plan", "state", "sentence", "format")  # the most telling first
_SENTENCE = "I go through"


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
    route = text.rfind(_SENTENCE, 0, body)
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


def _spell_cells(cells: Sequence[tuple[int, int]]) -> str:
    return " ".join(f"({row},{column})" for row, column in cells)


def _with_picture(text: str, picture: np.ndarray) -> list[Message]:
    before, after = text.split("<picture>")
    parts: list[Message] = [{"type": "text", "text": before}] if before else []
    parts.append({"type": "image", "image": picture})
    return [*parts, {"type": "text", "text": after}] if after else parts
