"""Where things stand in a response: thoughts, which state nothing, and the answer block."""

import re

_THOUGHT = re.compile(r"<(/?)think(?:ing)?>", re.I)
_TAG = re.compile(r"<(/?)answer>", re.I)
_VISIBLE = re.compile(r"[^\n]")


def without_thoughts(response: str) -> str:
    """`response` with spaces for its thoughts and their tags: every other character stays in place.

    A thought is `<think>...</think>` (or `thinking`, in any case of letters). One that is not
    closed goes on to the end; a closing tag that nothing opened ends a thought that began before
    the response did, so that everything before it is thought. Line ends stay.
    """
    kept: list[tuple[int, int]] = []
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
    pieces: list[str] = []
    done = 0
    for start, end in kept:
        pieces += (_VISIBLE.sub(" ", response[done:start]), response[start:end])
        done = end
    return "".join((*pieces, _VISIBLE.sub(" ", response[done:])))


def answer_span(response: str) -> tuple[int, int] | None:
    """Where the text of the last complete `<answer>...</answer>` outside of thoughts begins, ends.

    None where there is no such block. A block begins at the last opening tag before its closing
    tag; letters are of any case. One pass, whatever the text.
    """
    found, start = None, None
    for tag in _TAG.finditer(without_thoughts(response)):
        if not tag[1]:
            start = tag.end()
        elif start is not None:
            found, start = (start, tag.start()), None
    return found
