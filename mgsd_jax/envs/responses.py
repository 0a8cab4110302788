"""Where things stand in a response: thoughts, which state nothing, and the answer block."""

import re

_THOUGHT = re.compile(r"<(/?)think(?:ing)?>", re.I)
_TAG = re.compile(r"<(/?)answer>", re.I)
_TAG_LENGTH = len("<answer>")
_VISIBLE = re.compile(r"[^\n]")


Span = tuple[int, int]  # first character, end


def said_spans(response: str) -> list[Span]:
    """The parts of a response that are no thought, in order.

    A thought is `<think>...</think>` (or `thinking`, in any case of letters). One that is not
    closed goes on to the end; a closing tag that nothing opened ends a thought that began before
    the response did, so that everything before it is thought.
    """
    kept: list[Span] = []
    start: int | None = 0  # of the text outside of thoughts, None inside of one
    for tag in _THOUGHT.finditer(response):
        if tag[1]:
            if start is not None:
                kept.clear()
            start = tag.end()
        elif start is not None:
            kept.append((start, tag.start()))
            start = None
    if start is not None:
        kept.append((start, len(response)))
    return kept


def without_thoughts(response: str) -> str:
    """`response` with spaces for its thoughts: all other characters and line ends stay in place."""
    return _blank_all_but(response, said_spans(response))


def answer_span(response: str) -> Span | None:
    """Where the text of the last complete `<answer>...</answer>` outside of thoughts begins, ends.

    None where there is no such block: see `block_spans`.
    """
    blocks = block_spans(without_thoughts(response))
    return (blocks[-1][0] + _TAG_LENGTH, blocks[-1][1] - _TAG_LENGTH - 1) if blocks else None


def block_spans(text: str) -> list[Span]:
    """Every complete `<answer>...</answer>` with its tags, letters of any case, in order.

    A block begins at the last opening tag before its closing tag.
    """
    blocks: list[Span] = []
    start = None
    for tag in _TAG.finditer(text):
        if not tag[1]:
            start = tag.start()
        elif start is not None:
            blocks.append((start, tag.end()))
            start = None
    return blocks


def first_tag(text: str) -> int:
    """Where the first `<answer>` begins, of a block or not; the end of a text without one."""
    return next((tag.start() for tag in _TAG.finditer(text) if not tag[1]), len(text))


def statements(response: str) -> str:
    """`response` with spaces for its thoughts and its answer blocks, as `without_thoughts`."""
    text = without_thoughts(response)
    starts, ends = [0], []
    for start, end in block_spans(text):
        ends.append(start)
        starts.append(end)
    return _blank_all_but(text, list(zip(starts, [*ends, len(text)], strict=True)))


def _blank_all_but(text: str, kept: list[Span]) -> str:
    pieces: list[str] = []
    done = 0
    for start, end in kept:
        pieces += (_VISIBLE.sub(" ", text[done:start]), text[start:end])
        done = end
    return "".join((*pieces, _VISIBLE.sub(" ", text[done:])))
