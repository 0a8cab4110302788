"""Evaluation over an OpenAI-compatible API, against a small server in a thread."""

import asyncio
import base64
import collections
import contextlib
import http.server
import io
import json
import pathlib
import threading
import time
import types
import urllib.parse
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mgsd_jax import config as config_lib
from mgsd_jax.command_line import load_config
from mgsd_jax.config import Config
from mgsd_jax.data import prompts
from mgsd_jax.data.boards import Board, case_name
from mgsd_jax.envs import ENVS
from mgsd_jax.evaluation import rows
from mgsd_jax.evaluation.scoring import Answer
from mgsd_jax.sampling import endpoint
from mgsd_jax.stages import evaluate

pytest.importorskip("openai")
ROOT = pathlib.Path(__file__).parents[1]
BOARDS = [
    Board("maze", 3, i, ENVS["maze"].generate(np.random.default_rng(i), 3), None) for i in range(3)
]
Reply = tuple[int, str, bytes]  # status, content type, body


def completion(text: Any, finish: Any = "stop", **changes: Any) -> Reply:
    """What a server of the right format sends."""
    body = {
        "id": "1",
        "object": "chat.completion",
        "created": 0,
        "model": "m",
        "choices": [
            {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": finish}
        ],
        "usage": {"prompt_tokens": 1, "completion_tokens": 7, "total_tokens": 8},
    }
    return 200, "application/json", json.dumps(body | changes).encode()


class Absent(types.ModuleType):
    """A package that is not installed, to be imported when it is used."""

    def __getattr__(self, name: str) -> Any:
        raise ModuleNotFoundError(f"No module named {self.__name__}")


def always(reply: Reply) -> Callable[[dict[str, Any], int], Reply]:
    return lambda request, before: reply


class Server:
    """Answers requests with `reply(request, how many like it came before)`, and keeps them."""

    def __init__(self) -> None:
        self.requests: list[dict[str, Any]] = []
        self.keys: set[str | None] = set()
        self.models = ["m"]
        self.drips = False
        self.reply: Callable[[dict[str, Any], int], Reply] = lambda request, _: completion("")
        seen: collections.Counter[str] = collections.Counter()
        lock = threading.Lock()
        server = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                data = [{"id": name, "object": "model"} for name in server.models]
                self.send(200, "application/json", json.dumps({"data": data}).encode())

            def do_POST(self) -> None:
                request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with lock:
                    server.requests.append(request)
                    server.keys.add(self.headers["Authorization"])
                    text = json.dumps(request)
                    before, seen[text] = seen[text], seen[text] + 1
                self.send(*server.reply(request, before))

            def send(self, status: int, kind: str, body: bytes) -> None:
                if server.drips:  # no read waits for long, and no answer ever comes
                    with contextlib.suppress(OSError):
                        for byte in b"HTTP/1.1 200 OK\r\nX-Slow: " + b"x" * 1000:
                            self.connection.sendall(bytes([byte]))
                            time.sleep(0.05)
                    return
                self.send_response(status)
                self.send_header("Content-Type", kind)
                self.send_header("Content-Length", str(len(body)))
                self.send_header("retry-after-ms", "1")
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, format: str, *args: Any) -> None:
                del format, args

        self.http = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_address[1]}/v1"
        threading.Thread(target=self.http.serve_forever, args=(0.01,), daemon=True).start()


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    cases = [case_name(board) for board in BOARDS]
    monkeypatch.setattr(evaluate, "_test_boards", lambda *_: (BOARDS, cases))
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    made = Server()
    yield made
    made.http.shutdown()
    made.http.server_close()


def make_config(url: str, *more: str) -> Config:
    assignments = [
        f"evaluate.endpoint={url}",
        "evaluate.modes=('picture', 'text', 'blind', 'perception')",
        "evaluate.endpoint_seconds=10.0",
        *more,
    ]
    return load_config(str(ROOT / "configs" / "nano.py"), assignments)


def board_shown(request: dict[str, Any]) -> int | None:
    """Which board a request shows, None for one in words."""
    content = request["messages"][0]["content"]
    if isinstance(content, str):
        return None
    (url,) = [part["image_url"]["url"] for part in content if part["type"] == "image_url"]
    data = base64.b64decode(url.removeprefix("data:image/png;base64,"))
    picture = np.asarray(Image.open(io.BytesIO(data)))
    drawn = [ENVS["maze"].render(board.state, len(picture)) for board in BOARDS]
    return next(i for i, image in enumerate(drawn) if np.array_equal(image, picture))


def solve(request: dict[str, Any], _: int) -> Reply:
    """A server that plans right for the board that it is shown, and fails in words."""
    shown = board_shown(request)
    if shown is None:
        return completion("I cannot read.", "length")
    state = BOARDS[shown].state
    return completion(prompts.response("maze", state, ENVS["maze"].shortest_plan(state)))


def test_a_model_behind_an_endpoint_is_evaluated_like_one_at_hand(
    server: Server, tmp_path: pathlib.Path
) -> None:
    server.reply = solve
    evaluate.run(make_config(server.url), str(tmp_path))
    summary = json.loads((tmp_path / "evaluate" / "summary.json").read_text())
    modes = summary["models"]["m"]
    assert modes["picture"]["macro"]["value"] == 1.0 and modes["picture"]["state_f1"]["value"] == 1
    assert modes["text"]["errors"]["truncated"] == modes["text"]["n"] == 3
    assert modes["blind"]["macro"]["value"] < 1.0, "it is shown another board"
    assert modes["picture"]["response_tokens"]["mean"] == 7
    assert set(modes) == {"picture", "text", "blind", "perception"}
    assert server.keys == {"Bearer secret"}
    assert len(server.requests) == 4 * 3
    for request in server.requests:
        assert (request["model"], request["temperature"], request["top_p"]) == ("m", 0.0, 1.0)
        assert request["max_tokens"] == 62
    evaluate.run(make_config(server.url), str(tmp_path))
    assert len(server.requests) == 4 * 3, "nothing is asked twice"


def test_tries_are_sampled_with_seeds_of_their_own_that_come_again(
    server: Server, tmp_path: pathlib.Path
) -> None:
    server.reply = solve
    more = (
        *("evaluate.tries=4", "evaluate.sampling.temperature=0.5", "evaluate.sampling.top_k=5"),
        "evaluate.modes=('picture',)",
    )
    for workdir in ("a", "b"):
        evaluate.run(make_config(server.url, *more), str(tmp_path / workdir))
    seeds = [request["seed"] for request in server.requests]
    assert len(set(seeds)) == 12 and sorted(seeds[:12]) == sorted(seeds[12:])
    assert all(0 <= seed < 2**31 for seed in seeds)
    assert {request["top_k"] for request in server.requests} == {5}


def test_a_busy_server_is_tried_again(server: Server, tmp_path: pathlib.Path) -> None:
    busy: Reply = (429, "application/json", b'{"error": {"message": "busy"}}')
    server.reply = lambda request, before: solve(request, 0) if before == 2 else busy
    evaluate.run(make_config(server.url, "evaluate.modes=('picture',)"), str(tmp_path))
    summary = json.loads((tmp_path / "evaluate" / "summary.json").read_text())
    assert summary["models"]["m"]["picture"]["macro"]["value"] == 1.0
    assert len(server.requests) == 3 * 3


def test_what_keeps_failing_is_a_failure_until_it_is_asked_again(
    server: Server, tmp_path: pathlib.Path
) -> None:
    broken: Reply = (500, "application/json", b'{"error": {"message": "out of memory"}}')
    fails = True
    server.reply = lambda request, _: (
        broken if fails and board_shown(request) == 1 else solve(request, 0)
    )
    more = ("evaluate.modes=('picture',)", "evaluate.endpoint_retries=1")
    evaluate.run(make_config(server.url, *more), str(tmp_path))
    folder = tmp_path / "evaluate"
    part = json.loads((folder / "summary.json").read_text())["models"]["m"]["picture"]
    assert part["n"] == 3 and part["macro"]["value"] == pytest.approx(2 / 3)
    assert part["errors"]["request_failed"] == 1
    (failed,) = [row for row in rows.read_rows(folder) if "error" in row]
    assert failed["index"] == 1 and "out of memory" in failed.get("error", "")
    fails = False
    before = len(server.requests)
    # Pressing less hard is no other evaluation.
    evaluate.run(make_config(server.url, *more, "evaluate.endpoint_workers=1"), str(tmp_path))
    assert len(server.requests) == before + 1
    part = json.loads((folder / "summary.json").read_text())["models"]["m"]["picture"]
    assert part["macro"]["value"] == 1.0 and part["errors"]["request_failed"] == 0


def test_a_server_that_is_down_ends_the_evaluation_and_keeps_the_rows(
    server: Server, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(endpoint, "_PATIENCE", 2)
    server.reply = lambda *_: (503, "text/plain", b"loading")
    with pytest.raises(ValueError, match=r"got 2 failed requests in a row .*run again to go on"):
        evaluate.run(make_config(server.url, "evaluate.endpoint_retries=0"), str(tmp_path))
    assert all("error" in row for row in rows.read_rows(tmp_path / "evaluate"))
    assert not (tmp_path / "evaluate" / "summary.json").exists()


KEY = "sk-Test/Key+0123456789"


def ask(server: Server, *more: str) -> Answer:
    """The answer to one prompt."""
    settings = make_config(server.url, "evaluate.endpoint_retries=0", *more).evaluate

    async def asked() -> Answer:
        async with endpoint.connect(settings) as client:
            return await endpoint.ask(client, settings, "m", [{"role": "user", "content": "?"}], 5)

    return asyncio.run(asked())


PARTS = [{"type": "text", "text": "U"}, {"type": "text", "text": "R"}]


@pytest.mark.parametrize(
    ("reply", "text", "truncated"),
    [
        (completion("UR"), "UR", False),
        (completion("UR", "eos_token"), "UR", False),
        (completion("UR", "stop_sequence"), "UR", False),
        (completion(PARTS), "UR", False),
        (completion(["U", "R"]), "UR", False),
        (completion("U", "length"), "U", True),
        (completion("U", "max_tokens"), "U", True),
        (completion(None, "length"), "", True),
        (completion("U\ud800R"), "U?R", False),
    ],
)
def test_answers_as_servers_send_them(
    server: Server, reply: Reply, text: str, truncated: bool
) -> None:
    server.reply = always(reply)
    assert ask(server) == Answer(text, truncated, 7, None)


@pytest.mark.parametrize("count", ["seven", -1, True, 1.5, None, [7]])
def test_a_count_of_tokens_that_is_none_is_no_count(server: Server, count: Any) -> None:
    server.reply = lambda *_: completion("U", usage={"completion_tokens": count})
    assert ask(server) == Answer("U", False, None, None)


@pytest.mark.parametrize(
    ("reply", "said"),
    [
        (completion("U", "abort"), "finish_reason abort"),
        (completion("U", "perhaps"), "finish_reason perhaps"),
        (completion("U", None), "finish_reason None"),
        (completion("U", ["stop"]), "finish_reason"),
        (completion(None), "no text, finish_reason stop"),
        (completion(""), "no text, finish_reason stop"),
        (completion(None, "content_filter"), "no text, finish_reason content_filter"),
        (completion([]), "no text, finish_reason stop"),
        (completion([{"type": "image_url", "image_url": {"url": "x"}}]), "image_url"),
        (completion(7), "content 7"),
        ((200, "text/html", b"<html>Welcome</html>"), "<html>Welcome"),
        ((200, "application/json", b"<html>Welcome</html>"), "Error"),
        ((200, "application/json", b"[" * 100_000), "RecursionError"),
        ((200, "application/json", b"[1, 2]"), "got "),
        ((200, "application/json", b'{"text": "UUR"}'), "UUR"),
        ((200, "application/json", b'{"error": {"message": "provider is down"}}'), "provider is"),
        ((200, "application/json", b'{"choices": []}'), "choices=[]"),
        ((200, "application/json", b'{"choices": [{"finish_reason": "length"}]}'), "got "),
        ((200, "application/json", b'{"choices": "UUR"}'), "UUR"),
        ((500, "application/json", b'{"error": {"message": "out of memory"}}'), "out of memory"),
        ((413, "text/plain", b"too large"), "too large"),
        ((400, "application/json", b'{"error": {"message": "too long: 9 tokens"}}'), "too long"),
        (
            (400, "application/json", b'{"error": {"message": "max_tokens is too large: 62"}}'),
            "max_tokens is too large",
        ),
    ],
)
def test_what_is_no_answer_is_a_failed_request(server: Server, reply: Reply, said: str) -> None:
    server.reply = always(reply)
    answer = ask(server)
    assert (answer.text, answer.truncated) == ("", False)
    assert answer.error is not None and said in answer.error and "\n" not in answer.error


def test_failed_requests_end_no_run_and_are_asked_again(
    server: Server, tmp_path: pathlib.Path
) -> None:
    bad = {0: completion("U", "abort"), 1: (200, "text/html", b"<html>")}
    server.reply = lambda request, _: bad.get(board_shown(request) or 0) or solve(request, 0)
    config = make_config(server.url, "evaluate.modes=('picture',)")
    evaluate.run(config, str(tmp_path))
    path = tmp_path / "evaluate" / "summary.json"
    part = json.loads(path.read_text())["models"]["m"]["picture"]
    assert part["n"] == 3 and part["errors"]["request_failed"] == 2
    assert part["macro"]["value"] == pytest.approx(1 / 3)
    server.requests.clear()
    bad.clear()
    evaluate.run(config, str(tmp_path))
    assert sorted(board_shown(request) or 0 for request in server.requests) == [0, 1]
    part = json.loads(path.read_text())["models"]["m"]["picture"]
    assert part["macro"]["value"] == 1.0 and part["errors"]["request_failed"] == 0


def test_a_whole_request_is_bounded_not_one_read_of_it(server: Server) -> None:
    """Every byte comes soon after the last one, for 50 seconds."""
    server.drips = True
    more = "evaluate.endpoint_seconds=0.3"
    began = time.monotonic()
    assert ask(server, more, "evaluate.endpoint_retries=3").error == "no answer within 0.3 s"
    with pytest.raises(ValueError, match=r"/v1/models: got .* within 0.3 s, want a list"):
        endpoint.served_models(make_config(server.url, more).evaluate)
    assert time.monotonic() - began < 25


@pytest.mark.parametrize(
    ("status", "message", "want"),
    [
        (
            400,
            "Unsupported parameter: 'max_tokens' is not supported with this model. Use "
            "'max_completion_tokens' instead.",
            ("max_completion_tokens", "temperature", "top_p", "top_k", "seed"),
        ),
        (
            400,
            "Unsupported value: 'temperature' does not support 0.0 with this model. Only the "
            "default (1) value is supported.",
            ("max_tokens", "top_p", "top_k", "seed"),
        ),
        (400, 'Invalid JSON payload. Unknown name "seed": Cannot find field.', None),
        (422, "extra_forbidden ['body', 'seed'] Extra inputs are not permitted", None),
        (
            400,
            "`temperature` and `top_p` cannot both be specified",
            ("max_tokens", "top_k", "seed"),
        ),
    ],
)
def test_a_parameter_that_a_server_does_not_take_is_named_with_what_to_set(
    server: Server, status: int, message: str, want: tuple[str, ...] | None
) -> None:
    body = json.dumps({"error": {"message": message}}).encode()
    server.reply = lambda *_: (status, "application/json", body)
    want = want or ("max_tokens", "temperature", "top_p", "top_k")
    with pytest.raises(ValueError) as raised:
        ask(server)
    advice = f'--set "evaluate.endpoint_parameters={want}"'
    assert str(raised.value).endswith(advice) and "run again" not in str(raised.value)
    server.reply = lambda *_: completion("UR")
    ask(server, f"evaluate.endpoint_parameters={want}")
    assert {"model", "messages", *want} - {"top_k"} == set(server.requests[-1])


def ways_to_write(key: str) -> list[str]:
    coded = [base64.b64encode(f"{lead}{key}".encode()).decode() for lead in ("", "x:", "Bearer ")]
    safe = base64.urlsafe_b64encode(f"u:{key}".encode()).decode()
    return [key, key.lower(), urllib.parse.quote(key, safe=""), key.encode().hex(), *coded, safe]


def holds_key(text: str) -> bool:
    """Whether the key, or most of it, can be read out of the text."""
    low = text.lower()
    return any(way[4:-4].lower() in low for way in ways_to_write(KEY))


@pytest.mark.parametrize("way", range(len(ways_to_write(KEY))))
def test_a_key_that_a_server_echoes_is_hidden(
    server: Server, monkeypatch: pytest.MonkeyPatch, way: int
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    echo = f"you sent <{ways_to_write(KEY)[way]}> here " + "x" * 300
    error = json.dumps({"error": {"message": echo}}).encode()
    for reply in (
        completion(echo),
        completion([{"type": "text", "text": echo}]),
        completion("U", echo),
        completion({"a": echo}),
        (200, "text/html", echo.encode()),
        (400, "application/json", error),
        (500, "text/plain", echo.encode()),
    ):
        server.reply = always(reply)
        answer = ask(server)
        said = answer.text + (answer.error or "")
        assert "[the key]" in said and not holds_key(said)
    for status in (400, 401, 404):
        body = error.replace(b"you sent", b"unsupported seed")
        server.reply = always((status, "application/json", body))
        with pytest.raises(ValueError) as raised:
            ask(server)
        assert "[the key]" in str(raised.value) and not holds_key(str(raised.value))
    server.models = [echo, "m"]
    with pytest.raises(ValueError) as raised:
        endpoint.served_models(make_config(server.url).evaluate)
    assert "[the key]" in str(raised.value) and not holds_key(str(raised.value))


def test_the_key_is_in_no_file_and_no_line_of_the_log(
    server: Server,
    tmp_path: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    caplog.set_level("DEBUG")
    server.models = [f"m-{KEY}"]
    replies = [completion(KEY), (500, "text/plain", KEY.encode()), completion(KEY, KEY)]
    server.reply = lambda request, _: replies[board_shown(request) or 0]
    more = ("evaluate.modes=('picture',)", "evaluate.endpoint_retries=0")
    evaluate.run(make_config(server.url, *more), str(tmp_path))
    assert server.keys == {f"Bearer {KEY}"}
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert {"rows.jsonl", "summary.json", "config.json"} <= {path.name for path in written}
    assert not any(holds_key(path.read_text()) for path in written)
    assert caplog.records and not holds_key(caplog.text)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        (f"endpoint_key={KEY}", "evaluate.endpoint_key: got something else than a NAME"),
        (f"endpoint=https://u:{KEY}@host/v1", "evaluate: got the key of OPENAI_API_KEY in a"),
        (f"endpoint={KEY}", "evaluate: got the key of OPENAI_API_KEY in a setting"),
        (f"endpoint_models={KEY}", "evaluate: got the key of OPENAI_API_KEY in a setting"),
        ("endpoint=https://u:other@host/v1", "evaluate.endpoint: got a URL with a user"),
        ("endpoint=https://host/v1?key=other", "evaluate.endpoint: got a URL with a user"),
    ],
)
def test_a_key_in_the_settings_is_refused_and_not_shown(
    monkeypatch: pytest.MonkeyPatch, setting: str, message: str
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    with pytest.raises(ValueError) as raised:
        endpoint.connect(make_config("http://x", f"evaluate.{setting}").evaluate)
    assert str(raised.value).startswith(message)
    assert not holds_key(str(raised.value)) and "other" not in str(raised.value)


@pytest.mark.parametrize("key", [KEY + "\n", f"{KEY} ", f"{KEY}\u201d", f"{KEY}\r\nX: y"])
def test_a_key_that_no_header_takes_is_refused_and_not_shown(
    monkeypatch: pytest.MonkeyPatch, key: str
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", key)
    with pytest.raises(ValueError, match="OPENAI_API_KEY: got a key with a space") as raised:
        endpoint.connect(make_config("http://x").evaluate)
    assert not holds_key(str(raised.value))


def test_words_that_stand_for_no_key_stay_in_answers(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "EMPTY")
    server.reply = lambda *_: completion("Holes: empty")
    assert ask(server).text == "Holes: empty"


@pytest.mark.parametrize("status", [401, 403, 404])
def test_a_wrong_key_or_model_is_refused_at_once(
    server: Server, tmp_path: pathlib.Path, status: int
) -> None:
    server.reply = lambda *_: (status, "application/json", b'{"error": {"message": "no such"}}')
    with pytest.raises(ValueError, match=r"no such.*want a model 'm' and a key for it"):
        evaluate.run(make_config(server.url), str(tmp_path))


def test_the_models_of_an_endpoint(server: Server, tmp_path: pathlib.Path) -> None:
    server.models = ["a", "b"]
    with pytest.raises(ValueError, match=r"got models \('a', 'b'\), want just one, or some"):
        evaluate.run(make_config(server.url), str(tmp_path))
    server.reply = solve
    config = make_config(server.url, "evaluate.endpoint_models=b,a", "evaluate.modes=('picture',)")
    evaluate.run(config, str(tmp_path))
    summary = json.loads((tmp_path / "evaluate" / "summary.json").read_text())
    assert set(summary["models"]) == {"a", "b"} and "b - a" in summary["differences"]


def test_what_cannot_be_reached_or_used_is_said(
    server: Server, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.http.shutdown()
    server.http.server_close()
    retries = "evaluate.endpoint_retries=0"
    with pytest.raises(ValueError, match=r"/v1/models: got APIConnectionError.* want a list"):
        evaluate.run(make_config(server.url, retries), str(tmp_path))
    with pytest.raises(ValueError, match=r"evaluate.endpoint: got 'localhost:1', want http://"):
        evaluate.run(make_config("localhost:1"), str(tmp_path))
    monkeypatch.delenv("OPENAI_API_KEY")
    with pytest.raises(ValueError, match="OPENAI_API_KEY: not found in the environment"):
        evaluate.run(make_config("https://api.example.com/v1"), str(tmp_path))
    monkeypatch.setattr(endpoint, "openai", Absent("openai"))
    with pytest.raises(ValueError, match=r"pip install 'mgsd_jax\[endpoint\]'"):
        evaluate.run(make_config(server.url), str(tmp_path))


def test_settings_of_the_endpoint_are_settings() -> None:
    config = make_config("http://x")
    assert config_lib.override(config, ["evaluate.endpoint_models=a"]).evaluate.endpoint_models == (
        "a",
    )
    with pytest.raises(ValueError, match=r"evaluate.tries: got 2 at temperature 0, want 1"):
        make_config("http://x", "evaluate.tries=2")
