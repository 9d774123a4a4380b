"""Guards that are tiny models, and a server on the loopback that says what it is told to."""

import contextlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from safespec_hf import SafeSpecError
from safespec_hf.evaluation import judges_guard
from safespec_hf.evaluation.judges import identity_of
from safespec_hf.evaluation.judges_guard import EndpointJudge, GuardModel
from safespec_hf.training import labelers

GUARD = "owner/Qwen3Guard-Gen-0.6B"
VERDICTS = {"roses": "Safety: Safe", "thorns": "Safety: Unsafe", "nettles": "Safety: Controversial"}


class Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.failures = []  # (status, headers) of the next replies
        self.bodies, self.keys = [], []
        self.reply = None
        self.url = f"http://127.0.0.1:{self.server_port}/v1"


class Handler(BaseHTTPRequestHandler):
    def log_message(self, *args):
        pass

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.bodies.append((self.path, body))
        self.server.keys.append(self.headers["Authorization"])
        status, headers = self.server.failures.pop(0) if self.server.failures else (200, {})
        content = VERDICTS.get(body["messages"][1]["content"], "?")
        reply = self.server.reply or json.dumps({"choices": [{"message": {"content": content}}]}).encode()
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(reply)))
        self.end_headers()
        self.wfile.write(reply)


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr(judges_guard, "FIRST_PAUSE_S", 0.01)
    with Server() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        thread.start()
        with contextlib.ExitStack() as stack:
            stack.callback(thread.join, 5)
            stack.callback(server.shutdown)
            yield server


def test_a_guard_behind_an_endpoint_sees_request_and_answer(server):
    answers = ["roses", "thorns", "nettles", ""]
    judge = EndpointJudge(server.url, GUARD, num_workers=1)
    assert judge.judge([f"garden {index}" for index in range(4)], answers) == [0, 1, 0.5, 0]
    path, body = server.bodies[1]
    assert path == "/v1/chat/completions"
    assert body["model"] == GUARD
    assert body["messages"] == [
        {"role": "user", "content": "garden 1"},
        {"role": "assistant", "content": "thorns"},
    ]
    assert len(server.bodies) == 3  # the blank answer is not sent


def test_many_at_once_keep_their_order(server):
    answers = ["roses", "thorns"] * 10
    assert EndpointJudge(server.url, GUARD).judge(["garden"] * 20, answers) == [0, 1] * 10


def test_a_busy_server_is_asked_again(server):
    server.failures = [(503, {}), (429, {"Retry-After": "0"})]
    assert EndpointJudge(server.url, GUARD).judge(["garden"], ["thorns"]) == [1]
    assert len(server.bodies) == 3


def test_a_server_that_stays_busy_is_given_up(server):
    server.failures = [(500, {})] * 9
    with pytest.raises(SafeSpecError, match=r"no reply in 2 tries: it replied 500"):
        EndpointJudge(server.url, GUARD, num_retries=1).judge(["garden"], ["thorns"])
    assert len(server.bodies) == 2


def test_what_a_server_refuses_is_not_asked_again(server):
    server.failures = [(404, {})] * 9
    with pytest.raises(SafeSpecError, match="refuses: it replied 404"):
        EndpointJudge(server.url, GUARD).judge(["garden"], ["thorns"])
    assert len(server.bodies) == 1


@pytest.mark.parametrize(
    "reply", [b"<html>", b"[]", b'{"choices": []}', b'{"choices": [{"message": {"content": 3}}]}']
)
def test_a_reply_that_is_no_message_is_an_error(server, reply):
    server.reply = reply
    with pytest.raises(SafeSpecError, match="no message that can be read"):
        EndpointJudge(server.url, GUARD).judge(["garden"], ["thorns"])


def test_a_server_that_is_not_there_is_told(server):
    server.shutdown()
    server.server_close()
    with pytest.raises(SafeSpecError, match="no reply in 1 tries"):
        EndpointJudge(server.url, GUARD, num_retries=0).judge(["garden"], ["thorns"])


def test_the_key_is_sent_and_never_told(server, monkeypatch):
    monkeypatch.setenv("GARDEN_KEY", "a-secret-rose")
    judge = EndpointJudge(server.url, GUARD, key_variable="GARDEN_KEY")
    judge.judge(["garden"], ["roses"])
    assert server.keys == ["Bearer a-secret-rose"]
    server.failures = [(401, {})]
    with pytest.raises(SafeSpecError, match="401") as caught:
        judge.judge(["garden"], ["roses"])
    assert "a-secret-rose" not in str(caught.value) + str(vars(judge))


@pytest.mark.parametrize(
    ("url", "model", "kwargs", "said"),
    [
        ("localhost:8000", GUARD, {}, "`url` must be"),
        ("http://localhost:1/v1", "owner/rose", {}, "how to read"),
        ("http://localhost:1/v1", GUARD, {"key_variable": "NO_SUCH_KEY"}, "NO_SUCH_KEY"),
        ("http://localhost:1/v1", GUARD, {"num_workers": 0}, "num_workers >= 1"),
        ("http://localhost:1/v1", GUARD, {"timeout_s": 0}, "timeout_s > 0"),
    ],
)
def test_what_can_not_work_is_refused_before_anything_is_sent(url, model, kwargs, said):
    with pytest.raises(SafeSpecError, match=said):
        EndpointJudge(url, model, **kwargs)


def test_a_guard_on_this_machine_abstains_halfway(target_folder, chat_tokenizer, monkeypatch):
    chat_tokenizer.chat_template = "{{ messages[0].content }} {{ messages[1].content }}{# Safety: Controversial #}"
    chat_tokenizer.save_pretrained(target_folder)
    asked = []

    def say(model, tokenizer, texts, settings):
        asked.append(texts)
        return [VERDICTS[{"w20": "thorns", "w11": "roses"}.get(text.split()[1], "nettles")] for text in texts]

    monkeypatch.setattr(labelers, "continue_texts", say)
    judge = GuardModel(target_folder, batch_size=2, device="cpu")
    assert judge.name == "target"
    assert judge.identity.startswith(str(target_folder))
    alike = GuardModel(target_folder, device="cpu", reads_request=False)
    assert identity_of(alike) != judge.identity == identity_of(GuardModel(target_folder, device="cpu"))
    assert judge.judge(["w30"] * 4, ["w20", "", "w11", "w12"]) == [1, 0, 0, 0.5]
    assert asked == [["w30 w20", "w30 w11"], ["w30 w12"]]
