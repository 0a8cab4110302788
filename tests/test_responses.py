"""Thoughts are blanked in place, and the answer block is the last one outside of them."""

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mgsd_jax.envs import responses

PIECES = st.lists(
    st.sampled_from(
        ["<think>", "</think>", "<answer>", "</answer>", "<THINK>", "</Answer>", "R", "\n", "é"]
    )
)


@pytest.mark.parametrize(
    ("response", "kept"),
    [
        ("", ""),
        ("Player: (0,0)", "Player: (0,0)"),
        ("<think>draft</think>said", "said"),
        ("<THINK>draft</Think>said", "said"),
        ("<thinking>draft</thinking>said", "said"),
        ("a<think>b</think>c<think>d</think>e", "ace"),
        ("said<think>never closed", "said"),
        ("begun before</think>said", "said"),
        ("<think>a</think>still thought</think>said", "said"),
        ("<think>a<think>b</think>c</think>said", "said"),
        ("begun before</think>a<think>b</think>c", "ac"),
        ("<think>", ""),
        ("</think>", ""),
        ("I <thinks> so", "I <thinks> so"),
    ],
)
def test_thoughts_are_left_out(response: str, kept: str) -> None:
    left = responses.without_thoughts(response)
    assert left.replace(" ", "") == kept.replace(" ", "")
    assert len(left) == len(response)
    assert all(new in (old, " ") for old, new in zip(response, left, strict=True))


def test_line_ends_of_a_thought_stay() -> None:
    assert responses.without_thoughts("a<think>\n\nb</think>c").split("\n")[1] == ""


@pytest.mark.parametrize(
    ("response", "text"),
    [
        ("", None),
        ("<answer>R", None),
        ("R</answer>", None),
        ("</answer>R<answer>", None),
        ("<answer></answer>", ""),
        ("<answer>R</answer>", "R"),
        ("<ANSWER>R</Answer>", "R"),
        ("<answer>R</answer> or <answer>D</answer>", "D"),
        ("<answer>R</answer> or <answer>D", "R"),
        ("in <answer> tags: <answer>D</answer></answer>", "D"),
        ("<think><answer>R</answer></think><answer>D</answer>", "D"),
        ("<answer>D</answer><think><answer>R</answer></think>", "D"),
        ("<think><answer>R</answer>", None),
        ("<answer>R</answer></think><answer>D</answer>", "D"),
        ("<answer>" * 3 + "L</answer>", "L"),
    ],
)
def test_the_answer_block(response: str, text: str | None) -> None:
    span = responses.answer_span(response)
    assert (None if span is None else response[slice(*span)]) == text


@settings(deadline=None)
@given(PIECES)
def test_the_block_is_the_one_that_a_plain_search_finds(pieces: list[str]) -> None:
    response = "".join(pieces)
    left = responses.without_thoughts(response)
    assert not re.search("</?think>", left, re.I)
    found = re.findall(r"<answer>((?:(?!<answer>).)*?)</answer>", left, re.I | re.S)
    span = responses.answer_span(response)
    assert (None if span is None else left[slice(*span)]) == (found[-1] if found else None)
