"""Every token of a response belongs to the most telling part that it touches.

To add a response: a row in MARKED, its parts marked by the first letter of a segment.
"""

import pathlib
from typing import Any

import numpy as np
import pytest
from helpers_tokenizer import write_processor_folder
from hypothesis import given, settings
from hypothesis import strategies as st

from mgsd_jax.data import prompts, segments
from mgsd_jax.data.processor import Processor, encode_answer, load_processor
from mgsd_jax.data.segments import decode, spell
from mgsd_jax.envs import ENVS

REAL = pathlib.Path(__file__).parents[1].parent / "shared" / "reference" / "qwen3vl_4b"
PLAN, STATE, SENTENCE, FORMAT = range(4)

# Pieces of a response, each after the letter of its segment: (s)tate, (r)oute, (p)lan, (f)ormat.
MARKED = [
    "s:Map size: 4x4\n|r:I go through (0,0).\n|f:<answer>|p:RD|f:</answer> done",
    "s:no sentence\n|f:<ANSWER>|p:R|f:</Answer>",
    "s:nothing else",
    "s:a |f:<answer>R</answer>|s: b |r:I go through (0,0) |f:<answer>|p:D|f:</answer>",
    "f:<think>I go through <answer>L</answer></think>|r:I go through |f:<answer>|p:D|f:</answer>",
    "f:I go through <answer>L</answer></think>|s:a |f:<answer>|p:D|f:</answer><think><answer>U",
    "s:cut |r:I go through (0,0) |f:<answer>RD",
    "s:a |f:<answer>|p:R|f:<think>D</think>|p:U|f:</answer> and <answer>D",
    "f:<answer>|p:|f:</answer>",
    "s:",
]


@pytest.mark.parametrize("marked", MARKED)
def test_parts_of_a_response(marked: str) -> None:
    pieces = [piece.split(":", 1) for piece in marked.split("|")]
    found = prompts.character_segments("".join(text for _, text in pieces))
    assert found == b"".join(bytes(["psrf".index(part)]) * len(text) for part, text in pieces)
    assert prompts.SEGMENTS == ("plan", "state", "sentence", "format")


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Processor:
    folder = tmp_path_factory.mktemp("tokenizer")
    write_processor_folder(folder)
    return load_processor(folder)


@pytest.fixture(scope="module")
def real() -> Processor:
    if not REAL.is_dir():
        pytest.skip("no side files of Qwen3-VL-4B-Instruct beside the repository")
    return load_processor(REAL)


def groups_of(processor: Processor, text: str) -> tuple[list[str], list[int]]:
    """The text and the segment of each token of an answer."""
    tokens = encode_answer(processor, text)[None]
    groups = segments.segments(processor, tokens, np.ones(tokens.shape, bool))[0]
    return [decode(processor, [token]) for token in tokens[0]], groups.tolist()


@pytest.mark.parametrize("plan", ["D", "L", "R", "P", "UDLR", "PICK"])
def test_a_plan_has_its_tokens_though_its_first_one_begins_in_the_tag(
    real: Processor, plan: str
) -> None:
    pieces, groups = groups_of(real, f"<answer>{plan}</answer>")
    in_plan = [piece for piece, group in zip(pieces, groups, strict=True) if group == PLAN]
    assert "".join(in_plan).lstrip(">").startswith(plan)
    assert groups[-1] == FORMAT, "the end token"


@pytest.mark.parametrize("task", ENVS)
def test_every_action_of_a_right_response_is_in_the_plan(real: Processor, task: str) -> None:
    for seed in range(20):
        state = ENVS[task].generate(np.random.default_rng(seed), ENVS[task].nearest_level(5))
        plan = ENVS[task].shortest_plan(state)
        pieces, groups = groups_of(real, prompts.response(task, state, plan))
        in_plan = [piece for piece, group in zip(pieces, groups, strict=True) if group == PLAN]
        assert ENVS[task].spell(plan) in "".join(in_plan)
        assert {STATE, SENTENCE, FORMAT} <= set(groups)


TEXTS = (
    "Player: (0,0) é😀漢\n<answer>D</answer>",
    "😀" * 3,
    "\ufffd",
    "<think>a</think>b",
    "a\u0301",
)


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("name", ["small", "real"])
def test_tokens_lie_where_they_are_decoded(
    name: str, text: str, request: pytest.FixtureRequest
) -> None:
    processor = request.getfixturevalue(name)
    tokens = encode_answer(processor, text)
    ((found, spans),) = spell(processor, [tokens])
    assert found == decode(processor, tokens)
    assert spans[-1] == (len(found), len(found)), "the end token has no text"
    touched = {place for start, end in spans for place in range(start, end)}
    assert touched == set(range(len(found)))
    for i, (start, end) in enumerate(spans):
        piece = decode(processor, tokens[i : i + 1])
        assert "\ufffd" in piece or found[start:end] == piece


@settings(deadline=None)
@given(st.data())
def test_any_tokens_are_spelled_as_they_are_decoded(small: Processor, data: st.DataObject) -> None:
    """Broken characters, special tokens and ids that no token has."""
    tokens = np.array(data.draw(st.lists(st.integers(0, 600), max_size=40)), np.int32)
    ((found, spans),) = spell(small, [tokens])
    assert found == decode(small, tokens)
    assert len(spans) == len(tokens)
    assert all(0 <= start <= end <= len(found) for start, end in spans)
    assert [start for start, _ in spans] == sorted(start for start, _ in spans)
    groups = segments.segments(small, tokens[None], np.ones((1, len(tokens)), bool))
    assert ((groups >= 0) & (groups < 4)).all()


def test_tokens_are_looked_up_once_and_never_decoded_one_by_one(
    small: Processor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One pass a response: twice the tokens, twice the bytes read, and no call of `decode`."""
    monkeypatch.setattr(segments, "decode", None)
    asked: list[int] = []
    backend = small.tokenizer.backend_tokenizer

    class Counted:
        def get_added_tokens_decoder(self) -> dict:
            return backend.get_added_tokens_decoder()

        def id_to_token(self, token: int) -> str | None:
            asked.append(token)
            return backend.id_to_token(token)

    class Tokenizer:
        backend_tokenizer = Counted()

    class Stub:
        tokenizer = Tokenizer()

    processor: Any = Stub()
    tokens = np.tile(encode_answer(small, "Player: (0,0)\n<answer>D</answer>"), (3, 20))
    segments.segments(processor, tokens, np.ones(tokens.shape, bool))
    assert len(asked) == len(set(asked)) <= len(np.unique(tokens))
