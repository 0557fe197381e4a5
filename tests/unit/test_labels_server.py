"""The labelling server: what it answers, and whom it refuses."""

import json
import threading
from contextlib import contextmanager
from http.client import HTTPConnection

import pytest

from rlhf.errors import UserError
from rlhf.labels.records import read_labels
from rlhf.labels.server import HOST, Server, Session
from tests.builders import write_rows

PAIRS = [
    {"pair": "p", "prompt": "q", "response_a": "<b>x</b>", "response_b": "y"},
    {"pair": "r", "prompt": [{"role": "user", "content": "你好"}], "response_a": "1", "response_b": "2"},
]


@contextmanager
def running(tmp_path):
    session = Session(write_rows(tmp_path / "selected.jsonl", PAIRS), tmp_path / "labels.jsonl")
    with Server(session, 0) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


def request(server, method, path, body=None, **headers):
    connection = HTTPConnection(HOST, server.server_port, timeout=30)
    try:
        given = {name.replace("_", "-"): value for name, value in headers.items()}
        connection.request(method, path, None if body is None else json.dumps(body), given)
        answer = connection.getresponse()
        return answer.status, dict(answer.getheaders()), answer.read().decode()
    finally:
        connection.close()


def post(server, path, body, **headers):
    status, _, text = request(server, "POST", path, body, **({"Content_Type": "application/json"} | headers))
    return status, json.loads(text)


def labels(tmp_path):
    return [(row["pair"], row["annotator"], row["label"]) for row in read_labels(tmp_path / "labels.jsonl")]


def test_a_session_of_two_annotators(tmp_path):
    with running(tmp_path) as server:
        status, _, text = request(server, "GET", "/state?annotator=ann%20b")
        state = json.loads(text)
        assert (status, state["done"], state["total"]) == (200, 0, 2)
        assert state["shown"] == {"pair": "p", "prompt": "q", "response_a": "<b>x</b>", "response_b": "y"}
        _, state = post(server, "/decide", {"annotator": "ann b", "pair": "p", "label": "a"})
        assert (state["done"], state["shown"]["prompt"]) == (1, "user: 你好")
        assert labels(tmp_path) == [("p", "ann b", "a")]  # on disk before the answer
        _, state = post(server, "/undo", {"annotator": "ann b"})
        assert (state["done"], state["shown"]["pair"]) == (0, "p")
        post(server, "/decide", {"annotator": "ann b", "pair": "p", "label": "tie"})
        _, state = post(server, "/decide", {"annotator": "ann b", "pair": "r", "label": "skip"})
        assert state["shown"] is None and state["done"] == 2
        _, state = post(server, "/decide", {"annotator": "bo", "pair": "p", "label": "tie"})
        assert (state["done"], state["agreement"]["percent"]) == (1, 1.0)
        assert post(server, "/undo", {"annotator": "new"})[1]["done"] == 0
    again = Session(tmp_path / "selected.jsonl", tmp_path / "labels.jsonl")
    assert again.state("ann b")["done"] == 2 and again.state("bo")["shown"]["pair"] == "r"


@pytest.mark.parametrize(
    ("headers", "body", "status"),
    [
        ({"Origin": "https://evil.example"}, {}, 403),
        ({"Origin": "null"}, {}, 403),
        ({"Host": "evil.example"}, {}, 403),
        ({"Content_Type": "text/plain"}, {}, 415),
        ({"Content_Type": "application/x-www-form-urlencoded"}, {}, 415),
        ({"Content_Length": "999999"}, {}, 413),
        ({}, {"pair": "nope"}, 404),
        ({}, {"label": "c"}, 400),
        ({}, {"label": "undo"}, 404),
        ({}, {"annotator": "<script>"}, 400),
        ({}, {"annotator": ""}, 400),
        ({}, {"annotator": 3}, 400),
    ],
)
def test_what_is_refused(tmp_path, headers, body, status):
    with running(tmp_path) as server:
        good = {"annotator": "ann", "pair": "p", "label": "a"}
        assert post(server, "/decide", good | body, **headers)[0] == status
        assert labels(tmp_path) == []
        own = f"http://localhost:{server.server_port}"
        assert post(server, "/decide", good, Origin=own)[0] == 200  # and the same without the mistake is not


def test_pages(tmp_path):
    with running(tmp_path) as server:
        status, headers, text = request(server, "GET", "/")
        nonce = headers["Content-Security-Policy"].split("'nonce-")[1].split("'")[0]
        assert status == 200 and text.count(f'nonce="{nonce}"') == 2 and "{nonce}" not in text
        assert "default-src 'none'" in headers["Content-Security-Policy"]
        assert "frame-ancestors 'none'" in headers["Content-Security-Policy"]
        assert "//" not in text.replace("// as text", "")  # no address of another host
        assert request(server, "GET", "/../labels.jsonl")[0] == 404
        assert request(server, "GET", "/", Host="evil.example")[0] == 403
        assert request(server, "POST", "/decide", [1], Content_Type="application/json")[0] == 400
        with pytest.raises(UserError, match=f"--port {server.server_port}: in use"):
            Server(server.session, server.server_port)
        assert server.server_address[0] == "127.0.0.1"


def test_no_pairs(tmp_path):
    (tmp_path / "selected.jsonl").write_text("")
    with pytest.raises(UserError, match="holds no pairs"):
        Session(tmp_path / "selected.jsonl", tmp_path / "labels.jsonl")
