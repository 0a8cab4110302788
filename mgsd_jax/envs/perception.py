"""Answers to the questions about a picture: told apart by their numbers, scored by their kind."""

import re

from mgsd_jax.envs.base import Question
from mgsd_jax.envs.facts import read_facts
from mgsd_jax.envs.responses import without_thoughts
from mgsd_jax.envs.values import plain, read_cells, read_directions, read_sizes

_NUMBER = re.compile(
    r"(?:(?:question|answer|q|a)[ #*_]{0,4})?([0-9]{1,3})[*_` ]{0,4}\\?(?:[.:)\]]|-(?= ))", re.I
)


def read_numbered(response: str, count: int) -> dict[int, str]:
    """The text after each number 1 to `count` at the start of a line, thoughts left out.

    `1.`, `1)`, `(1)`, `**1.**`, `1:`, `Question 1:` and `Q1.` are the number 1; the first of each
    counts. Lines without a new number go on with the answer before them.
    """
    answers: dict[int, list[str]] = {}
    current: list[str] = []
    for line in without_thoughts(response).splitlines():
        match = _NUMBER.match(line.lstrip(" \t>#*_`~-•(["))
        if match and int(match[1]) not in answers and 0 < int(match[1]) <= count:
            current = answers[int(match[1])] = [match.string[match.end() :]]
        else:
            current.append(line)
    return {number: "\n".join(lines).strip() for number, lines in answers.items()}


def is_right(question: Question, answer: str) -> bool:
    """Whether an answer says what is true, in whatever words and whatever order."""
    if question.kind == "open_directions":
        stated = read_facts("maze", answer).facts
        return {fact for fact in stated if fact[0] == "open"} == question.facts
    text, true = plain(answer), frozenset(fact[1] for fact in question.facts)
    if question.kind == "size":
        return read_sizes(text) == {(size, size) for size in true}
    return (read_directions if question.kind == "directions" else read_cells)(text) == true
