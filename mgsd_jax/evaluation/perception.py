"""Answers to the questions about a picture: told apart by their numbers, scored by their kind."""

import re

from mgsd_jax.envs.base import Question
from mgsd_jax.envs.facts import read_stated, vocabulary
from mgsd_jax.envs.responses import without_thoughts
from mgsd_jax.envs.values import plain, read_cells, read_directions, read_sizes

_NUMBER = re.compile(
    r"(?:(?P<word>question|answer|q|a)[ #*_]{0,4})?(?P<number>[0-9]{1,3})"
    r"[*_`\" \ufe0f]{0,4}\\?(?:[.:)\]|．：）、\u20e3]|-(?= )|(?(word)(?=$)|(?!)))",
    re.I,
)
# In an answer about open sides, what stands between a cell and its directions.
_FROM = re.compile(r"\bfrom\b", re.I)
_SIDES = vocabulary({"player": "player", "goal": "goal"}, has_sides=True)
_ARROW = re.compile(r"(?<=[)\]]) ?(?:->|→)")


def read_numbered(response: str, count: int) -> dict[int, str]:
    """The text after each number 1 to `count` at the start of a line, thoughts left out.

    `1.`, `1)`, `(1)`, `**1.**`, `1:`, `Question 1:` and `Q1.` are the number 1; the first of each
    counts. Lines without a new number go on with the answer before them.
    """
    answers: dict[int, list[str]] = {}
    current: list[str] = []
    for line in without_thoughts(response).splitlines():
        match = _NUMBER.match(line.lstrip(' \t>#*_`~-•([|"（'))
        number = int(match["number"]) if match else 0
        if match and number not in answers and 0 < number <= count:
            current = answers[number] = [match.string[match.end() :]]
        else:
            current.append(line)
    return {number: "\n".join(lines).strip() for number, lines in answers.items()}


def is_right(question: Question, answer: str) -> bool:
    """Whether an answer says what is true, in whatever words and whatever order."""
    if question.kind in ("open_directions", "open_rows"):
        stated = read_stated(_SIDES, _ARROW.sub(":", _FROM.sub("", answer))).facts
        return {fact for fact in stated if fact[0] == "open"} == question.facts
    text, true = plain(answer), frozenset(fact[1] for fact in question.facts)
    if question.kind == "size":
        return read_sizes(text) == {(size, size) for size in true}
    return (read_directions if question.kind == "directions" else read_cells)(text) == true
