"""Answers from an OpenAI-compatible API: vLLM, SGLang, or a hosted model.

Needs the `openai` package (`pip install mgsd_jax[endpoint]`). The client repeats a request that
fails, with growing waits. A request that keeps failing, is aborted, takes longer than
`endpoint_seconds` or returns no chat completion gives an answer with `error`, which counts as a
failure and is asked again when the evaluation is run again. What no repetition can mend (a wrong
key, an unknown model, a parameter that the server does not take) ends the evaluation with one line.

The key is read from the environment and leaves this module in requests alone: every text of a
server passes `_clean` before it is used or shown.
"""

import asyncio
import base64
import io
import json
import logging
import os
import re
import urllib.parse
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from etils import epy
from PIL import Image

from mgsd_jax import config as config_lib
from mgsd_jax.config import EvaluateConfig
from mgsd_jax.data.prompts import Message
from mgsd_jax.evaluation.scoring import Answer

with epy.lazy_imports():  # an extra, which takes half a second
    import openai

if TYPE_CHECKING:
    from openai.types.chat import ChatCompletion

# What servers say of an answer that is whole, and of one that was cut off.
_WHOLE = ("stop", "eos_token", "stop_sequence", "end_turn")
_WHOLE += ("content_filter", "tool_calls", "function_call")
_CUT_OFF = ("length", "max_tokens", "model_length")
_NOT_TAKEN = re.compile(
    r"\bnot (?:\w+ )?(?:support|permitted|allowed|accept|recogni)|unsupported|unknown|unrecogni"
    r"|unexpected|invalid parameter|forbidden|deprecated|cannot (?:find field|both be)",
    re.I,
)
_BROKEN = (ValueError, RecursionError)  # what reading broken JSON raises
_OTHER = (AttributeError, LookupError, TypeError)  # and what looking into other JSON does
_HIDDEN = 6  # characters; shorter keys are words such as EMPTY or none, which answers may hold
_PATIENCE = 16  # failed requests in a row after which an endpoint is taken to be down


def answers(
    settings: EvaluateConfig,
    model: str,
    places: Sequence[int],
    question: Callable[[int], tuple[Sequence[Message], int]],
) -> Iterator[tuple[int, Answer]]:
    """Asks a question for each place, `endpoint_workers` at a time; yields answers as they come.

    `question` makes the messages and the seed of a place when its turn comes, so that few pictures
    are in memory at once. Raises ValueError once _PATIENCE requests in a row have failed.
    """
    client = connect(settings)
    slots = asyncio.Semaphore(settings.endpoint_workers)
    done: asyncio.Queue[asyncio.Task[tuple[int, Answer]]] = asyncio.Queue()

    async def answer(place: int) -> tuple[int, Answer]:
        async with slots:
            return place, await ask(client, settings, model, *question(place))

    async def close() -> None:
        await asyncio.gather(*tasks, return_exceptions=True)
        await client.close()

    failed = 0
    with asyncio.Runner() as runner:
        tasks = [runner.get_loop().create_task(answer(place)) for place in places]
        for task in tasks:
            task.add_done_callback(done.put_nowait)
        try:
            for _ in tasks:
                place, got = runner.run(done.get()).result()
                yield place, got
                failed = 0 if got.error is None else failed + 1
                if failed >= _PATIENCE:
                    raise ValueError(
                        f"{settings.endpoint}: got {failed} failed requests in a row (the last: "
                        f"{got.error}), want answers; once that is mended, run again to go on "
                        "from here"
                    )
        finally:
            for task in tasks:
                task.cancel()
            runner.run(close())


def connect(settings: EvaluateConfig) -> "openai.AsyncOpenAI":
    """A client of `evaluate.endpoint`, for use in one event loop.

    Raises ValueError if the package or the key is missing, or if a setting holds the key.
    """
    try:
        _ = openai.AsyncOpenAI
    except ImportError:
        raise ValueError(
            "evaluate.endpoint: package openai not found; pip install 'mgsd_jax[endpoint]'"
        ) from None
    url, key = settings.endpoint, _key(settings)
    if not key and not url.startswith("http://"):
        raise ValueError(
            f"{settings.endpoint_key}: not found in the environment; the key of {url} is required "
            "(evaluate.endpoint_key names the variable)"
        )
    # At lower levels they log what a server sends, which may hold the key.
    for name in ("openai", "httpx", "httpx2", "httpcore", "httpcore2"):
        logging.getLogger(name).setLevel(logging.WARNING)
    return openai.AsyncOpenAI(
        base_url=url,
        api_key=key or "none",  # servers of one's own rarely ask for a key
        timeout=settings.endpoint_seconds,
        max_retries=settings.endpoint_retries,
    )


def _key(settings: EvaluateConfig) -> str:
    """The key, or ''. Raises ValueError if a setting holds it; the message does not show it.

    The settings are written beside the rows and shown in errors.
    """
    name = settings.endpoint_key
    if not re.fullmatch(r"[A-Z][A-Z0-9_]*", name):
        raise ValueError(
            "evaluate.endpoint_key: got something else than a NAME (not shown here: it may be the "
            "key), want the name of the environment variable that holds the key, in capitals"
        )
    key = os.environ.get(name, "")
    if not re.fullmatch(r"[!-~]*", key):
        raise ValueError(
            f"{name}: got a key with a space, a line end or a character that is not ASCII, want "
            "the bare key"
        )
    saved = json.dumps(config_lib.to_dict(settings))
    if _clean(saved, settings) != saved:
        raise ValueError(f"evaluate: got the key of {name} in a setting, want it in {name} alone")
    url = urllib.parse.urlsplit(settings.endpoint)
    if url.query or "@" in url.netloc:
        raise ValueError(
            "evaluate.endpoint: got a URL with a user, a password or a query (not shown here: it "
            f"may hold the key), want it without, and the key in {name} alone"
        )
    if url.scheme not in ("http", "https") or not url.hostname:
        raise ValueError(
            f"evaluate.endpoint: got {settings.endpoint!r}, want http://... or https://..."
        )
    return key


def _clean(text: str, settings: EvaluateConfig) -> str:
    """A text of a server without the key, whether it is plain, or in a URL, hex or base64.

    Halves of surrogate pairs, which no file takes, become question marks.
    """
    key = os.environ.get(settings.endpoint_key, "")
    text = text.encode("utf-8", "replace").decode()
    if len(key) < _HIDDEN:
        return text
    plain = key.encode()
    forms = [key, urllib.parse.quote(key, safe=""), plain.hex()]
    # The characters that depend on the key alone, whatever number of bytes stands before it.
    for before, first in enumerate((0, 2, 3)):
        whole = base64.b64encode(bytes(before) + plain).decode()
        inner = whole[first : (before + len(plain)) * 8 // 6]
        forms += [inner, inner.translate(str.maketrans("+/", "-_"))]
    return re.sub("|".join(map(re.escape, forms)), "[the key]", text, flags=re.I)


def served_models(settings: EvaluateConfig) -> tuple[str, ...]:
    """The models to ask: those of `evaluate.endpoint_models`, else the one that is served.

    Raises ValueError if the server cannot be asked, or serves several.
    """
    client = connect(settings)
    if settings.endpoint_models:
        return settings.endpoint_models
    where = f"{settings.endpoint}/models"

    async def listed() -> tuple[str, ...]:
        async with client, asyncio.timeout(settings.endpoint_seconds):
            return tuple(_clean(model.id, settings) for model in (await client.models.list()).data)

    try:
        names = asyncio.run(listed())
    except (openai.APIError, TimeoutError, *_BROKEN, *_OTHER) as error:
        raise ValueError(
            f"{where}: got {_said(error, settings)}, want a list, {{'data': [{{'id': ...}}]}}"
        ) from None
    if len(names) != 1:
        raise ValueError(
            f"{where}: got models {names}, want just one, or some of them in "
            "evaluate.endpoint_models"
        )
    return names


async def ask(
    client: "openai.AsyncOpenAI",
    settings: EvaluateConfig,
    model: str,
    messages: Sequence[Message],
    seed: int,
) -> Answer:
    """One answer to one prompt. Raises ValueError for what another try would not mend."""
    sent = _parameters(settings, seed)
    chat: Any = [to_chat(message) for message in messages]
    try:
        async with asyncio.timeout(settings.endpoint_seconds):
            completion = await client.chat.completions.create(
                model=model, messages=chat, extra_body=sent
            )
    except (
        openai.AuthenticationError,
        openai.PermissionDeniedError,
        openai.NotFoundError,
    ) as error:
        raise ValueError(
            f"{settings.endpoint}: got {_said(error, settings)}, want a model {model!r} and a key "
            f"for it in {settings.endpoint_key}"
        ) from None
    except (openai.BadRequestError, openai.UnprocessableEntityError) as error:
        _refuse_parameters(error, settings, sent)
        return Answer("", False, None, _said(error, settings))
    except (openai.APIError, TimeoutError, *_BROKEN) as error:
        return Answer("", False, None, _said(error, settings))
    return _read(completion, settings)


def _parameters(settings: EvaluateConfig, seed: int) -> dict[str, float]:
    """The values of `evaluate.endpoint_parameters`, of top_k only if it is on."""
    sampling = settings.sampling
    values = {
        "max_tokens": sampling.max_new_tokens,
        "max_completion_tokens": sampling.max_new_tokens,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k,
        "seed": seed,
    }
    names = [n for n in settings.endpoint_parameters if n != "top_k" or sampling.top_k]
    return {name: values[name] for name in names}


def _refuse_parameters(error: Exception, settings: EvaluateConfig, sent: Collection[str]) -> None:
    """Raises ValueError if the server says that it does not take a parameter that was sent."""
    said = _said(error, settings)
    named = [name for name in sent if re.search(rf"(?<!\w){name}(?!\w)", said)]
    if not named or not _NOT_TAKEN.search(said):
        return
    rest: list[str] = [name for name in settings.endpoint_parameters if name not in named]
    if "max_tokens" in named:
        rest.insert(0, "max_completion_tokens")
    raise ValueError(
        f"{settings.endpoint}: got {said}, want a request without "
        f'{" and ".join(named)}: --set "evaluate.endpoint_parameters={tuple(rest)}"'
    )


def _read(completion: "ChatCompletion", settings: EvaluateConfig) -> Answer:
    """The answer in what the server sent.

    The client does not check what it received: a web page is a str here, a wrong field stays as it
    is.
    """
    tokens = getattr(getattr(completion, "usage", None), "completion_tokens", None)
    tokens = tokens if type(tokens) is int and tokens >= 0 else None
    try:
        choice = completion.choices[0]
        content, finish = choice.message.content, choice.finish_reason
    except _OTHER:
        return _no_answer(getattr(completion, "error", None) or completion, tokens, settings)
    text, truncated = text_of(content), finish in _CUT_OFF
    if text is None:
        return _no_answer(f"content {content}", tokens, settings)
    if not truncated and finish not in _WHOLE:
        return _no_answer(f"finish_reason {finish}", tokens, settings)
    if not text and not truncated:
        return _no_answer(f"no text, finish_reason {finish}", tokens, settings)
    return Answer(_clean(text, settings), truncated, tokens)


def _no_answer(got: object, tokens: int | None, settings: EvaluateConfig) -> Answer:
    shown = " ".join(_clean(str(got), settings).split())[:300]
    want = "a chat completion: choices[0] with message.content and finish_reason"
    return Answer("", False, tokens, f"got {shown!r}, want {want}")


def text_of(content: object) -> str | None:
    """The text of a message's content: text, a list of parts of text, or null ('').

    None for anything else: a part that is no text, a number.
    """
    if content is None or isinstance(content, str):
        return content or ""
    if not isinstance(content, list):
        return None
    found = ""
    for part in content:
        text = part.get("text") if isinstance(part, dict) else part
        if not isinstance(text, str):
            return None
        found += text
    return found


def to_chat(message: Message) -> dict[str, object]:
    """A message in the form of the API, pictures as PNG data URLs."""
    content = message["content"]
    if isinstance(content, str):
        return {"role": message["role"], "content": content}
    parts = [
        {"type": "text", "text": part["text"]}
        if part["type"] == "text"
        else {"type": "image_url", "image_url": {"url": _png_url(part["image"])}}
        for part in content
    ]
    return {"role": message["role"], "content": parts}


def _png_url(picture: np.ndarray) -> str:
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


def _said(error: Exception, settings: EvaluateConfig) -> str:
    """An error in one line, with what the server said."""
    if isinstance(error, TimeoutError):
        return f"no answer within {settings.endpoint_seconds} s"
    said, response = str(error), getattr(error, "response", None)
    # Some versions of the client leave out what is no JSON.
    if response is not None and not isinstance(getattr(error, "body", None), dict):
        said += f" {response.text}"
    return f"{type(error).__name__}: {' '.join(_clean(said, settings).split())}"[:300]
