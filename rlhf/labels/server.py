"""A labelling page for this machine alone: Python's http.server on 127.0.0.1, one HTML file, nothing from elsewhere.

What a page of another site could do to it is refused: requests under another host name (DNS rebinding), posts from
another origin, posts that are no JSON (which a form can send without asking), and display inside a frame.
"""

from __future__ import annotations

import errno
import json
import logging
import re
import secrets
import threading
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib import resources
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

from rlhf.errors import UserError
from rlhf.labels.agreement import agreement
from rlhf.labels.records import DECISIONS, Row, append, decided, read_labels, read_rows

logger = logging.getLogger(__name__)

HOST = "127.0.0.1"
MAX_BODY = 10_000  # bytes of a post
NAME = re.compile(r"[\w.@-][\w .@-]{0,59}")


class Refused(Exception):
    """A request that is not carried out: (status, message)."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class Session:
    """The pairs, and the labels given so far: on disk before a request is answered.

    Args:
        pairs: selected.jsonl.
        labels: labels.jsonl; may not be there yet. Labels of other pairs in it are left alone.

    Raises:
        UserError: no pairs, or a damaged line in one of the files.
    """

    def __init__(self, pairs: Path, labels: Path) -> None:
        self.pairs = {row["pair"]: row for row in read_rows(pairs)}
        if not self.pairs:
            raise UserError(f"{pairs}: holds no pairs: `make label-select` writes them")
        self.path = labels
        self.labels = read_labels(labels)
        self._lock = threading.Lock()

    def state(self, annotator: str) -> dict[str, Any]:
        """The next pair of an annotator (None when all are done), progress and agreement."""
        done = self._done(annotator)
        ahead = (pair for pair in self.pairs if pair not in done)
        pair = next(ahead, None)
        shown = None
        if pair is not None:
            row = self.pairs[pair]
            shown = {"pair": pair, "prompt": transcript(row["prompt"])}
            shown |= {side: row[side] for side in ("response_a", "response_b")}
        progress = {"done": len(done), "total": len(self.pairs), "agreement": agreement(self.labels)}
        return {"shown": shown} | progress

    def decide(self, annotator: str, pair: str, label: str) -> None:
        """Records a decision.

        Raises:
            Refused: no such pair or label.
        """
        if pair not in self.pairs:
            raise Refused(404, f"no pair {pair!r}")
        if label not in DECISIONS:
            raise Refused(400, f"label {label!r} is none of {', '.join(DECISIONS)}")
        row = self.pairs[pair] | {"label": label, "annotator": annotator}
        with self._lock:
            row["time"] = datetime.now(UTC).isoformat(timespec="milliseconds")
            append(self.path, row)
            self.labels.append(row)

    def undo(self, annotator: str) -> None:
        """Takes back the annotator's last decision; where there is none, nothing happens."""
        done = self._done(annotator)
        if done:
            self.decide(annotator, max(done, key=lambda pair: done[pair]), "undo")

    def _done(self, annotator: str) -> dict[str, int]:
        """Pair -> number of the decision, of this annotator's pairs that have one that counts."""
        numbers = {id(row): number for number, row in enumerate(self.labels)}
        counting = ((pair, rows.get(annotator)) for pair, rows in decided(self.labels).items())
        return {pair: numbers[id(row)] for pair, row in counting if row is not None and pair in self.pairs}


def transcript(prompt: Any) -> str:
    """A prompt as text: messages one after the other, each with its role."""
    if isinstance(prompt, str):
        return prompt
    return "\n\n".join(f"{message.get('role')}: {message.get('content')}" for message in prompt)


class Server(ThreadingHTTPServer):
    """The page's server; `url` says where it is."""

    daemon_threads = True

    def __init__(self, session: Session, port: int) -> None:
        """Listens on 127.0.0.1.

        Args:
            session: what is labelled.
            port: 0 = any free one.

        Raises:
            UserError: the port is in use, or not allowed.
        """
        self.session = session
        try:
            super().__init__((HOST, port), Handler)
        except (OSError, OverflowError) as error:
            reason = "in use" if getattr(error, "errno", None) == errno.EADDRINUSE else str(error)
            raise UserError(f"--port {port}: {reason}: give another one, or 0 for any free one") from error
        self.hosts = {f"{name}:{self.server_port}" for name in (HOST, "localhost")}
        self.url = f"http://{HOST}:{self.server_port}/"


class Handler(BaseHTTPRequestHandler):
    """GET / (the page), GET /state, POST /decide, POST /undo."""

    server: Server
    timeout = 30

    def do_GET(self) -> None:
        """The page, or the state of `?annotator=`."""
        self._answer(self._get)

    def do_POST(self) -> None:
        """A decision, or the undoing of the last one."""
        self._answer(self._post)

    def _answer(self, act: Any) -> None:
        try:
            if self.headers.get("Host") not in self.server.hosts:
                raise Refused(403, "served on this machine only")
            act()
        except Refused as refused:
            self._send(refused.status, "application/json", json.dumps({"error": str(refused)}))
        except ConnectionError:
            logger.info("label page: closed before it was answered")
        except OSError as error:  # of the file of labels
            self._send(500, "application/json", json.dumps({"error": f"not saved ({error.strerror})"}))

    def _get(self) -> None:
        url = urlsplit(self.path)
        if url.path == "/":
            nonce = secrets.token_urlsafe(16)
            page = resources.files("rlhf.labels").joinpath("page.html").read_text(encoding="utf-8")
            self._send(200, "text/html; charset=utf-8", page.replace("{nonce}", nonce), nonce)
        elif url.path == "/state":
            annotator = _annotator(parse_qs(url.query).get("annotator", [""])[0])
            self._send_state(annotator)
        else:
            raise Refused(404, "no such page")

    def _post(self) -> None:
        origin = self.headers.get("Origin")
        if origin is not None and origin not in {f"http://{host}" for host in self.server.hosts}:
            raise Refused(403, "posts from another origin are refused")
        if self.headers.get_content_type() != "application/json":
            raise Refused(415, "JSON only")
        body = self._body()
        annotator = _annotator(body.get("annotator"))
        if self.path == "/decide" and body.get("label") != "undo":
            self.server.session.decide(annotator, str(body.get("pair")), str(body.get("label")))
        elif self.path == "/undo":
            self.server.session.undo(annotator)
        else:
            raise Refused(404, "no such action")
        self._send_state(annotator)

    def _body(self) -> Row:
        length = self.headers.get("Content-Length", "")
        if not length.isdigit() or int(length) > MAX_BODY:
            raise Refused(413, f"a body of at most {MAX_BODY} bytes")
        try:
            body = json.loads(self.rfile.read(int(length)))
        except (ValueError, RecursionError):
            body = None
        if not isinstance(body, dict):
            raise Refused(400, "no JSON object")
        return body

    def _send_state(self, annotator: str) -> None:
        state = self.server.session.state(annotator)
        self._send(200, "application/json", json.dumps(state, ensure_ascii=False))

    def _send(self, status: int, kind: str, text: str, nonce: str = "") -> None:
        body = text.encode("utf-8", "replace")
        policy = f"script-src 'nonce-{nonce}'; style-src 'nonce-{nonce}'; " if nonce else ""
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Cache-Control", "no-store")
        self.send_header("X-Content-Type-Options", "nosniff")
        self.send_header(
            "Content-Security-Policy",
            f"default-src 'none'; {policy}connect-src 'self'; base-uri 'none'; frame-ancestors 'none'",
        )
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Requests are not worth a line each."""
        logger.debug(format, *args)


def _annotator(name: Any) -> str:
    if not isinstance(name, str) or not NAME.fullmatch(name):
        raise Refused(400, "a name of 1 to 60 letters, digits, spaces and . @ _ -")
    return name.strip()
