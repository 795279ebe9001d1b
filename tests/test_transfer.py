"""Hostile servers: slow, endless, leading elsewhere, answering for another model; nothing waits for ever, no key gets out."""

import json
import logging
import socket
import subprocess
import sys
import threading
import time
from contextlib import contextmanager, suppress

import pytest
from tiny_encoders import photo

from catlib.classifiers.endpoint import EndpointClassifier, EndpointError
from catlib.data.archives import fetch_oxford_pets
from catlib.errors import CatlibError, InputError
from catlib.transfer import Client, Reply, TransferError

OK = b"HTTP/1.1 200 OK\r\n"


@contextmanager
def server(behave):
    """`behave(connection, request)` for each connection; its URL, and the requests' bytes."""
    asked, listener = [], socket.create_server(("127.0.0.1", 0))

    def serve():
        with suppress(OSError):
            while True:
                connection, _ = listener.accept()
                threading.Thread(target=one, args=(connection,), daemon=True).start()

    def one(connection):
        with connection, suppress(OSError):
            asked.append(connection.recv(100_000))
            behave(connection, asked[-1])

    threading.Thread(target=serve, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}", asked
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()


def drip(connection, text, pause=0.05):
    for letter in text:
        connection.sendall(bytes([letter]))
        time.sleep(pause)


def endless(connection, _):
    connection.sendall(OK + b"\r\n")
    while True:
        connection.sendall(b" " * 65536)


HOSTILE = {
    "silent": lambda c, _: time.sleep(5),
    "a byte of the head at a time": lambda c, _: drip(c, b"HTTP/1.1 200 OK\r\nX: " + b"a" * 1000),
    "a byte of the body at a time": lambda c, _: (c.sendall(OK + b"Content-Length: 500\r\n\r\n"), drip(c, b" " * 500)),
    "endless": endless,
    "endless chunks": lambda c, _: (
        c.sendall(OK + b"Transfer-Encoding: chunked\r\n\r\n"),
        [c.sendall(b"1000\r\n" + b"x" * 0x1000 + b"\r\n") for _ in range(10**6)],
    ),
    "endless head": lambda c, _: (c.sendall(OK), [c.sendall(b"X: " + b"a" * 1000 + b"\r\n") for _ in range(10**6)]),
    "nothing": lambda c, _: None,
    "half": lambda c, _: c.sendall(OK + b"Content-Length: 100\r\n\r\n{"),
    "no HTTP": lambda c, _: c.sendall(b"SSH-2.0-x\r\n"),
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", HOSTILE)
def test_every_transfer_ends(kind):
    start = time.monotonic()
    with server(HOSTILE[kind]) as (url, _), Client() as client:
        with pytest.raises(TransferError):
            client.send("GET", url, within_s=1.0, most=100_000)
    assert time.monotonic() - start < 3


def test_limits_are_exact_and_redirections_are_not_followed():
    body = b"x" * 1000
    close = (
        OK + b"Connection: close\r\nContent-Length: 1000\r\n\r\n"
    )  # else a kept connection may be gone when it is used
    with server(lambda c, _: c.sendall(close + body)) as (url, _), Client() as client:
        assert client.send("GET", url, within_s=5, most=1000).body == body
        with pytest.raises(TransferError, match="999"):
            client.send("GET", url, within_s=5, most=999)
        blocks = []
        assert (
            client.send("GET", url, within_s=5, sink=lambda reply: blocks.append).body == b""
            and b"".join(blocks) == body
        )
    client.close()
    with server(lambda c, _: c.sendall(OK + b"Content-Length: 0\r\n\r\n")) as (other, reached):
        leads = f"HTTP/1.1 307 Go\r\nLocation: {other}\r\nContent-Length: 0\r\n\r\n".encode()
        with server(lambda c, _: c.sendall(leads)) as (url, _), Client({"Authorization": "Bearer secret"}) as client:
            assert not client.send("POST", url, within_s=5, body={}).ok and not reached


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("7", 7),
        ("0", 0),
        ("99999999", 30),
        *((t, 0) for t in ("nan", "inf", "-5", "1e3", "٣", "1.5", " 4", "", "4;5", "9" * 5000)),
    ],
)
def test_retry_after_is_a_plain_number_or_nothing(text, seconds):
    assert Reply(503, {"retry-after": text}, b"").retry_after == seconds


def chat(answers, model="cats"):
    """A server that lists `model` and replies to a question by what `answers(request)` gives."""

    def behave(connection, request):
        listed = {"data": [{"id": model, "owned_by": "x"}]}
        reply = listed if request.startswith(b"GET") else answers(request)
        raw = reply if isinstance(reply, bytes) else json.dumps(reply).encode()
        head = b"" if raw.startswith(b"HTTP") else OK + f"Content-Length: {len(raw)}\r\n\r\n".encode()
        connection.sendall(head + raw)

    return server(behave)


def ask(url):
    classifier = EndpointClassifier(f"{url}/v1", ("Manx", "Persian"), "?", tries=2, pause_s=0.01, timeout_s=5)
    try:
        return classifier.ask(photo(1))
    finally:
        classifier.close()


def said(text, **more):
    return {"choices": [{"message": {"content": text}}], **more}


@pytest.mark.slow
@pytest.mark.parametrize(
    "reply",
    [
        said("Manx", model="dogs"),
        said("Manx", model={"a": 1}),
        said(["Manx"]),
        said(7),
        [],
        "text",
        {"choices": []},
        {"choices": [None]},
        {"choices": {"0": 1}},
        b'{"choices": NaN}',
        b"[" * 100_000,
        b'{"n": ' + b"9" * 6000 + b"}",
        b"\xff\xfe",
        b"",
    ],
)
def test_hostile_answers_are_an_error_of_the_endpoint(reply):
    with chat(lambda _: reply) as (url, _), pytest.raises(EndpointError):
        ask(url)


@pytest.mark.slow
def test_a_version_behind_the_name_is_the_same_model_and_a_missing_name_is_none():
    for more in ({}, {"model": "cats"}, {"model": "cats-2026-01-01"}, {"model": None}):
        with chat(lambda _, more=more: said(" Manx ", **more)) as (url, _):
            assert ask(url) == "Manx"


@pytest.mark.slow
def test_the_key_is_shown_nowhere(monkeypatch, caplog):
    caplog.set_level(logging.DEBUG)
    monkeypatch.setenv("CATLIB_API_KEY", "sk-secret")
    answer = b"HTTP/1.1 500 x\r\nRetry-After: nan\r\nContent-Length: 26\r\n\r\nBearer sk-secret is wrong !"
    with chat(lambda request: answer) as (url, asked), pytest.raises(EndpointError) as error:
        ask(url)
    assert b"Bearer sk-secret" in asked[0] and "sk-secret" not in str(error.value) + caplog.text
    for key in ("sk secret\nx", "sk-sécret", "a\x00b", "sk\tsecret"):
        monkeypatch.setattr("os.environ", {"CATLIB_API_KEY": key})
        with pytest.raises(InputError, match="CATLIB_API_KEY") as error:
            EndpointClassifier("http://127.0.0.1:9/v1", ("Manx", "Persian"), "?")
        assert key not in str(error.value)
    for url in (
        "http://me:sk-secret@h/v1",
        "http://h/v1?key=sk-secret",
        "http://sk-secret@h/v1",
        "https://h:sk-secret/v1",
    ):
        with pytest.raises(InputError) as error:
            EndpointClassifier(url, ("Manx", "Persian"), "?")
        assert "sk-secret" not in str(error.value)


@pytest.mark.slow
def test_a_download_has_an_end(tmp_path, monkeypatch):
    monkeypatch.setattr("catlib.data.archives.LARGEST", 300_000)
    monkeypatch.setattr("catlib.data.archives.WITHIN_S", 2.0)
    published = {"images.tar.gz": "0" * 32}
    for kind in ("endless", "a byte of the body at a time"):
        start, folder = time.monotonic(), tmp_path / kind
        with server(HOSTILE[kind]) as (url, _), pytest.raises(CatlibError, match="cannot download|damaged"):
            fetch_oxford_pets(folder, f"{url}/", published)
        assert time.monotonic() - start < 6
        assert sum(path.stat().st_size for path in folder.iterdir()) <= 300_000


def test_a_client_that_is_not_closed_holds_up_no_process():
    code = (
        "from catlib.transfer import Client, TransferError\n"
        "client = Client()\n"
        "try:\n    client.send('GET', 'http://127.0.0.1:9/', within_s=2)\n"
        "except TransferError:\n    print('away')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and done.stdout == "away\n", done.stderr
    client = Client()
    client.close()
    client.close()
