import json
import logging
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from rankwise.errors import DataError
from rankwise.experiments.tasks import JudgedTask
from rankwise.experiments.tasks.judge import Judge, judge_prompt
from tiny_folder import save_tiny_llama, write_rows

KEY = "sk-very-secret"


class _Server(HTTPServer):
    """Answers with a list of replies in turn: a rating's text, or a status."""

    def __init__(self, replies):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.replies, self.requests = list(replies), []

    @property
    def address(self):
        return f"http://127.0.0.1:{self.server_port}/v1"


class _Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.requests.append((self.path, dict(self.headers), body))
        reply = self.server.replies.pop(0)
        status = reply if isinstance(reply, int) else 200
        self.send_response(status)
        if status == 302:
            self.send_header("Location", "/elsewhere")
        self.end_headers()
        if status == 200:
            message = {"choices": [{"message": {"content": reply}}]}
            self.wfile.write(json.dumps(message).encode())

    def log_message(self, *args):
        pass


@pytest.fixture
def serve(monkeypatch):
    monkeypatch.setenv("JUDGE_KEY", KEY)
    servers = []

    def start(*replies):
        server = _Server(replies)
        servers.append(server)
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        return server

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def _judge(server, **options):
    return Judge("judge-1", server.address, "JUDGE_KEY", wait=0.0, **options)


def test_a_rating_is_asked_for_as_mt_bench_does(serve):
    server = serve("Good.\n\nRating: [[7.5]]")
    assert _judge(server).rate("What is 2+2?", "It is 4.", "4") == 7.5
    path, headers, body = server.requests[0]
    assert path == "/v1/chat/completions"
    assert headers["Authorization"] == f"Bearer {KEY}"
    assert body["model"] == "judge-1"
    assert body["temperature"] == 0
    assert body["messages"] == [
        {"role": "user", "content": judge_prompt("What is 2+2?", "It is 4.", "4")}
    ]


def test_prompts_hold_question_answer_and_reference():
    plain, referred = judge_prompt("QQ", "AA"), judge_prompt("QQ", "AA", "RR")
    assert "[Question]\nQQ" in plain
    assert "[The Start of Assistant's Answer]\nAA\n" in plain
    assert "reference" not in plain.lower()
    assert "[The Start of Reference Answer]\nRR\n" in referred


@pytest.mark.parametrize("first", [429, 503, "no rating here", "[[11]]"])
def test_another_attempt_mends_what_passes(serve, first):
    server = serve(first, "[[3]]")
    assert _judge(server).rate("q", "a") == 3.0
    assert len(server.requests) == 2


def test_giving_up_says_why_and_never_shows_the_key(serve, caplog):
    server = serve(500, 500)
    caplog.set_level(logging.DEBUG)
    with pytest.raises(DataError, match="500") as caught:
        _judge(server, attempts=2).rate("q", "a")
    assert KEY not in str(caught.value) + caplog.text
    assert caught.value.__cause__ is None


@pytest.mark.parametrize("status", [401, 404, 302])
def test_what_does_not_pass_is_not_tried_again(serve, status):
    server = serve(status, "[[3]]")
    with pytest.raises(DataError, match=str(status)):
        _judge(server).rate("q", "a")
    assert len(server.requests) == 1  # a redirect would take the key elsewhere


def test_a_missing_key_is_found_before_any_work(monkeypatch):
    monkeypatch.delenv("JUDGE_KEY", raising=False)
    with pytest.raises(DataError, match="JUDGE_KEY"):
        Judge("j", "https://example.org/v1", "JUDGE_KEY").check_key()


@pytest.mark.parametrize(
    ("endpoint", "why"),
    [
        ("http://example.org/v1", "https"),
        ("ftp://example.org", "http or https"),
        ("https://user:pw@example.org/v1", "key_variable"),
    ],
)
def test_endpoints_that_are_refused(endpoint, why):
    with pytest.raises(DataError, match=why):
        Judge("j", endpoint)


def test_no_key_for_an_endpoint_without_keys(serve):
    server = serve("[[4]]")
    assert Judge("j", server.address, "").rate("q", "a") == 4.0
    assert "Authorization" not in server.requests[0][1]


class TestTask:
    @pytest.fixture
    def options(self, tmp_path):
        folder = save_tiny_llama(tmp_path / "model")
        train = [{"question": f"q {i}", "answer": f"a {i}"} for i in range(8)]
        test = [
            {"prompt": ["what is it", "and then"], "category": "math", "reference": ["seven"]},
            {"prompt": ["write"], "category": "writing", "reference": []},
            {"prompt": ["write more"], "category": "writing", "reference": []},
        ]
        return {
            "model": str(folder),
            "train": str(write_rows(tmp_path / "train.jsonl", train)),
            "test": str(write_rows(tmp_path / "test.jsonl", test)),
            "validation_rows": 3,
            "max_new_tokens": 4,
            "judge_model": "judge-1",
            "key_variable": "JUDGE_KEY",
        }

    def test_the_first_turn_is_answered_and_rated(self, options, serve):
        server = serve("[[2]]", "[[4]]", "[[9]]")
        task = JudgedTask(**options, endpoint=server.address)
        data, model = task.load(), task.load_model()
        found = task.evaluate_test(model, data)
        assert found == {"rating": 5.0, "rating_math": 2.0, "rating_writing": 6.5}
        first = server.requests[0][2]["messages"][0]["content"]
        assert "[Question]\nwhat is it\n" in first
        assert "[The Start of Reference Answer]\nseven\n" in first
        assert "and then" not in first

    def test_a_missing_key_is_found_before_any_training(self, options):
        task = JudgedTask(**options, endpoint="http://127.0.0.1:9/v1")
        with pytest.raises(DataError, match="environment variable JUDGE_KEY, which is not set"):
            task.load()

    def test_a_start_leads_the_question_too(self, options):
        options |= {"endpoint": "http://127.0.0.1:9/v1", "key_variable": "", "max_length": 6}
        bare, started = (JudgedTask(**options, start=start).load() for start in ("", "\n"))
        first = bare.processor("\n")["input_ids"]
        for row, other in zip(started.test, bare.test, strict=True):
            room = 6 - len(first)
            assert row["input_ids"] == first + other["input_ids"][-room:]
            assert len(row["labels"]) == len(row["input_ids"])

    def test_learning_rates_are_chosen_by_the_loss(self, options):
        options |= {"endpoint": "http://127.0.0.1:9/v1", "key_variable": ""}
        task = JudgedTask(**options)
        data, model = task.load(), task.load_model()
        measured = task.evaluate(model, data, data.validation)
        assert task.search_metric in measured
        assert set(task.validation_metrics) == set(measured)
