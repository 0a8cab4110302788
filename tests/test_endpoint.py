"""Evaluation over an OpenAI-compatible API, against a small server in a thread."""

import base64
import collections
import http.server
import io
import json
import pathlib
import threading
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mgsd_jax import config as config_lib
from mgsd_jax import endpoint, evaluate, prompts, rows
from mgsd_jax.config import Config
from mgsd_jax.data import testsets
from mgsd_jax.data.boards import Board
from mgsd_jax.envs import ENVS
from mgsd_jax.main import load_config

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


class Server:
    """Answers requests with `reply(request, how many like it came before)`, and keeps them."""

    def __init__(self) -> None:
        self.requests: list[dict[str, Any]] = []
        self.keys: set[str | None] = set()
        self.models = ["m"]
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
        threading.Thread(target=self.http.serve_forever, daemon=True).start()


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    cases = [testsets.case_name(board) for board in BOARDS]
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
    assert failed["index"] == 1 and "out of memory" in failed["error"]
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
    monkeypatch.setattr(evaluate, "_PATIENCE", 2)
    server.reply = lambda *_: (503, "text/plain", b"loading")
    with pytest.raises(ValueError, match=r"got 2 failed requests in a row .*run again to go on"):
        evaluate.run(make_config(server.url, "evaluate.endpoint_retries=0"), str(tmp_path))
    assert all("error" in row for row in rows.read_rows(tmp_path / "evaluate"))
    assert not (tmp_path / "evaluate" / "summary.json").exists()


@pytest.mark.parametrize(
    "reply",
    [
        (200, "text/html", b"<html>Welcome</html>"),
        (200, "application/json", b"<html>Welcome</html>"),
        (200, "application/json", b"[1, 2]"),
        (200, "application/json", b'{"text": "UUR"}'),
        (200, "application/json", b'{"choices": []}'),
        (200, "application/json", b'{"choices": [{"finish_reason": "stop"}]}'),
        (200, "application/json", b'{"choices": "UUR"}'),
        completion(["U", "U"]),
        completion("U", finish="perhaps"),
        completion("U", finish=None),
        completion("U", usage={"completion_tokens": "seven"}),
    ],
)
def test_a_server_that_lies_about_its_format_is_refused(
    server: Server, tmp_path: pathlib.Path, reply: Reply
) -> None:
    server.reply = lambda *_: reply
    with pytest.raises(ValueError, match=r"/v1: got .* want a chat completion: choices\[0\]"):
        evaluate.run(make_config(server.url), str(tmp_path))
    assert not (tmp_path / "evaluate" / "summary.json").exists()


@pytest.mark.parametrize("status", [401, 403, 404])
def test_a_wrong_key_or_model_is_refused_at_once(
    server: Server, tmp_path: pathlib.Path, status: int
) -> None:
    server.reply = lambda *_: (status, "application/json", b'{"error": {"message": "no such"}}')
    with pytest.raises(ValueError, match=r"no such.*want a model 'm' and a key for it"):
        evaluate.run(make_config(server.url), str(tmp_path))


def test_an_empty_answer_is_a_failed_request_unless_it_was_cut_off() -> None:
    settings = make_config("http://x").evaluate
    for finish, error, truncated in (("content_filter", True, False), ("length", False, True)):
        data = json.loads(completion(None, finish)[2])
        answer = endpoint._read(endpoint.openai.types.chat.ChatCompletion(**data), settings)
        assert (answer.text, answer.truncated, answer.error is not None) == ("", truncated, error)


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
    with pytest.raises(ValueError, match="OPENAI_API_KEY: got nothing in the environment"):
        evaluate.run(make_config("https://api.example.com/v1"), str(tmp_path))
    monkeypatch.setattr(endpoint, "openai", None)
    with pytest.raises(ValueError, match=r"pip install 'mgsd_jax\[endpoint\]'"):
        evaluate.run(make_config(server.url), str(tmp_path))


def test_settings_of_the_endpoint_are_settings() -> None:
    config = make_config("http://x")
    assert config_lib.override(config, ["evaluate.endpoint_models=a"]).evaluate.endpoint_models == (
        "a",
    )
    with pytest.raises(ValueError, match=r"evaluate.tries: got 2 at temperature 0.0"):
        make_config("http://x", "evaluate.tries=2")
