"""Answers from an OpenAI-compatible API: vLLM, SGLang, or a hosted model.

Needs the `openai` package (`pip install mgsd_jax[endpoint]`). A request that fails is tried again
by the client, with growing waits; one that keeps failing is an answer with `error`, which counts as
a failure and is asked again when the evaluation is run again. What no other try can mend (a wrong
key, an unknown model, a server that does not speak the format) ends the evaluation with one line.
"""

import base64
import dataclasses
import io
import os
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

from mgsd_jax.config import EvaluateConfig
from mgsd_jax.prompts import Message

try:
    import openai as _openai
except ImportError:  # an extra: only evaluations of an endpoint need it
    _openai = None

openai: Any = _openai
_FINISHED = ("stop", "length", "content_filter", "tool_calls", "function_call")


@dataclasses.dataclass(frozen=True)
class Answer:
    """A response, or why there is none; `tokens` is None where the server does not count them."""

    text: str
    truncated: bool
    tokens: int | None
    error: str | None


def connect(settings: EvaluateConfig) -> Any:
    """A client of `evaluate.endpoint`. Raises ValueError without the package or the key."""
    if openai is None:
        raise ValueError(
            "evaluate.endpoint: got no package openai, want it: pip install 'mgsd_jax[endpoint]'"
        )
    url = settings.endpoint
    if not url.startswith(("http://", "https://")):
        raise ValueError(f"evaluate.endpoint: got {url!r}, want http://... or https://...")
    key = os.environ.get(settings.endpoint_key, "")
    if not key and not url.startswith("http://"):
        raise ValueError(
            f"{settings.endpoint_key}: got nothing in the environment, want the key of {url} "
            "(evaluate.endpoint_key names the variable)"
        )
    return openai.OpenAI(
        base_url=url,
        api_key=key or "none",  # servers of one's own rarely ask for a key
        timeout=settings.endpoint_seconds,
        max_retries=settings.endpoint_retries,
    )


def served_models(client: Any, settings: EvaluateConfig) -> tuple[str, ...]:
    """The models to ask: those of `evaluate.endpoint_models`, else the one that is served.

    Raises ValueError where the server cannot be asked, or serves several.
    """
    if settings.endpoint_models:
        return settings.endpoint_models
    where = f"{settings.endpoint}/models"
    try:
        listed = client.models.list()
        names = tuple(model.id for model in listed.data)
        if not all(isinstance(name, str) for name in names):
            raise TypeError("ids that are no text")
    except openai.APIError as error:
        raise ValueError(f"{where}: got {_said(error)}, want a list of models") from None
    except (AttributeError, TypeError, ValueError) as error:
        raise ValueError(f"{where}: got {error}, want {{'data': [{{'id': ...}}]}}") from None
    if len(names) != 1:
        raise ValueError(
            f"{where}: got models {names}, want just one, or some of them in "
            "evaluate.endpoint_models"
        )
    return names


def ask(
    client: Any, settings: EvaluateConfig, model: str, messages: Sequence[Message], seed: int
) -> Answer:
    """One answer to one prompt. Raises ValueError for what another try would not mend."""
    sampling = settings.sampling
    extra = {"extra_body": {"top_k": sampling.top_k}} if sampling.top_k else {}
    try:
        completion = client.chat.completions.create(
            model=model,
            messages=[to_chat(message) for message in messages],
            max_tokens=sampling.max_new_tokens,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            seed=seed,
            **extra,
        )
    except (
        openai.AuthenticationError,
        openai.PermissionDeniedError,
        openai.NotFoundError,
    ) as error:
        raise ValueError(
            f"{settings.endpoint}: got {_said(error)}, want a model {model!r} and a key for it in "
            f"{settings.endpoint_key}"
        ) from None
    except (openai.APIResponseValidationError, ValueError) as error:
        raise _liar(settings, str(error)) from None
    except openai.APIError as error:
        return Answer("", False, None, _said(error))
    return _read(completion, settings)


def _read(completion: Any, settings: EvaluateConfig) -> Answer:
    """The answer in what the server sent, every field that we use looked at first.

    The client does not check what it was sent: a web page comes back as text, a wrong field as it
    is.
    """
    choices = getattr(completion, "choices", None)
    if not isinstance(choices, list) or not choices:
        raise _liar(settings, completion)
    finish = getattr(choices[0], "finish_reason", None)
    message = getattr(choices[0], "message", None)
    text = getattr(message, "content", None)
    if message is None or not isinstance(text, str | None):
        raise _liar(settings, completion)
    if finish not in _FINISHED:
        raise _liar(settings, f"finish_reason {finish!r}")
    usage = getattr(completion, "usage", None)
    tokens = getattr(usage, "completion_tokens", None)
    if not isinstance(tokens, int | None) or isinstance(tokens, bool):
        raise _liar(settings, f"usage.completion_tokens {tokens!r}")
    if not text and finish != "length":
        return Answer("", False, tokens, f"got no text, finish_reason {finish}")
    return Answer(text or "", finish == "length", tokens, None)


def to_chat(message: Message) -> dict[str, Any]:
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


def _liar(settings: EvaluateConfig, got: Any) -> ValueError:
    shown = " ".join(str(got).split())[:120]
    return ValueError(
        f"{settings.endpoint}: got {shown!r}, want a chat completion: "
        "choices[0] with message.content and finish_reason"
    )


def _said(error: Exception) -> str:
    """An error of the client in one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]
