"""Chat templates of checkpoints: loading one, and writing conversations with it."""

import contextlib
import resource
import sys
from collections.abc import Generator, Mapping, Sequence
from pathlib import Path

import jinja2
from transformers import PreTrainedTokenizerFast

from mgsd_jax.checks.fields import Json, field, read_json

THOUGHT, THOUGHT_END = "<think>", "</think>"
MOST_CHARACTERS = 1_000_000  # of a template, and of a conversation that it writes
HEADROOM = 2**29  # bytes that a template may take when it is tried


def load_template(folder: Path, tokenizer: PreTrainedTokenizerFast) -> str:
    """The chat template of a folder, searched for in the order of transformers' processor.

    Raises ValueError where there is none, or where it fails on a short conversation.
    """
    legacy, plain = folder / "chat_template.json", folder / "chat_template.jinja"
    if legacy.exists():
        template = field(read_json(legacy), "chat_template", str, legacy)
    elif plain.exists():
        try:
            template = plain.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"{plain}: got {error.reason}, want UTF-8") from None
    else:
        template = tokenizer.chat_template
        if isinstance(template, dict):
            template = template.get("default")
    if not isinstance(template, str):
        raise ValueError(
            f"{folder}: chat template: not found, want chat_template.jinja, chat_template.json "
            "or chat_template in tokenizer_config.json"
        )
    picture = [{"type": "image"}, {"type": "text", "text": "A question"}]
    with _limited_memory():
        render(tokenizer, template, [{"role": "user", "content": picture}], is_prompt=True)
    return template


def render(
    tokenizer: PreTrainedTokenizerFast,
    template: str,
    messages: Sequence[Mapping[str, object]],
    *,
    is_prompt: bool,
) -> str:
    """The conversation as text, equal to transformers' own; a prompt ends where an answer begins.

    Raises ValueError naming the checkpoint's folder for any failure of the template.
    """
    source = f"{tokenizer.name_or_path}: chat template"
    conversation: list[Json] = [dict(message) for message in messages]
    if len(template) > MOST_CHARACTERS:
        raise ValueError(
            f"{source}: got {len(template)} characters, want at most {MOST_CHARACTERS}"
        )
    try:
        text = tokenizer.apply_chat_template(
            conversation,
            chat_template=template,
            tokenize=False,
            add_generation_prompt=is_prompt,
        )
    # A template is a program: these are the errors that its expressions can raise.
    except (
        *(jinja2.TemplateError, SyntaxError, TypeError, ValueError, AttributeError, LookupError),
        *(ArithmeticError, AssertionError, RecursionError, MemoryError),
    ) as error:
        said = " ".join(str(error).split())[:200]
        raise ValueError(
            f"{source}: got {type(error).__name__} ({said}) on a conversation, want its text"
        ) from None
    if not isinstance(text, str) or len(text) > MOST_CHARACTERS:
        raise ValueError(
            f"{source}: got {len(text)} characters for a conversation, want at most "
            f"{MOST_CHARACTERS}"
        )
    return text


def opens_thought(tokenizer: PreTrainedTokenizerFast, template: str) -> bool:
    """Whether an answer begins inside a thought, as that of a Thinking checkpoint does."""
    prompt = render(
        tokenizer, template, [{"role": "user", "content": "A question"}], is_prompt=True
    )
    _, mark, after = prompt.rpartition(THOUGHT)
    return bool(mark) and THOUGHT_END not in after


@contextlib.contextmanager
def _limited_memory() -> Generator[None]:
    """On Linux, raises MemoryError where the process takes more than HEADROOM more memory.

    jinja2's sandbox restricts what a template may call, but not the length of the strings that it
    makes: an expression can fill the memory before any length is checked. The limit applies to the
    whole process, so each template is tried once, while nothing else runs.
    """
    if sys.platform != "linux":
        yield
        return
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    limit = pages * resource.getpagesize() + HEADROOM
    limits = [limit, *(old for old in (soft, hard) if old != resource.RLIM_INFINITY)]
    resource.setrlimit(resource.RLIMIT_AS, (min(limits), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
