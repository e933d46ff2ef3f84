"""The demo's server over real HTTP: what is streamed, what is refused, and that requests do not disturb each other."""

import contextlib
import http.client
import importlib.util
import json
import socket
import struct
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from torchtitan.audio.codec import FRAME_SIZE
from torchtitan.audio.waveform import load_audio, pcm16
from torchtitan.checkpoint.speech_lm import SpeechLM
from torchtitan.demo import server as demo_server
from torchtitan.demo.server import DemoServer
from torchtitan.generation import Sampling, continue_codes
from torchtitan.tools.errors import UserError, run_command

ROOT = Path(__file__).resolve().parent.parent
LONG = 20_480  # ids of the models' context, 409 s


@pytest.fixture(scope="module")
def lm(tmp_path_factory, mimi_folder, save_speech_model) -> SpeechLM:
    folder = save_speech_model(tmp_path_factory.mktemp("demo") / "model", mimi_folder, context=LONG)
    return SpeechLM.load(str(folder), device="cpu")


@contextlib.contextmanager
def running(lm: SpeechLM, **options: Any) -> Iterator[DemoServer]:
    with DemoServer(lm, **options) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield server
        server.should_exit = True
        thread.join()


@pytest.fixture(scope="module")
def server(lm, tmp_path_factory, make_sound) -> Iterator[DemoServer]:
    example = tmp_path_factory.mktemp("example") / "example.flac"
    example.write_bytes(make_sound(1, 0.5))
    with running(lm, max_seconds=3.0, max_requests=2, max_bytes=200_000, example=example) as server:
        yield server


@pytest.fixture(scope="module")
def sound(make_sound) -> bytes:
    """0.9 s at 16 kHz: 12 frames."""
    return make_sound(3, 0.9, 16_000)


def ask(server: DemoServer, method: str, path: str, body: bytes | None = None, headers: dict | None = None):
    """Status, headers and content of an answer."""
    connection = http.client.HTTPConnection(*server.server_address, timeout=30)
    try:
        connection.request(method, path, body, headers or {})
        response = connection.getresponse()
        return response.status, response.headers, response.read()
    finally:
        connection.close()


def send_raw(server: DemoServer, request: bytes) -> bytes:
    """All that comes back for bytes that may be no proper request."""
    with socket.create_connection(server.server_address, timeout=30) as connection:
        connection.sendall(request)
        return b"".join(iter(lambda: connection.recv(1 << 16), b""))


def error_of(server: DemoServer, query: str = "", body: bytes | None = None) -> str:
    """The sentence of a request that is refused with status 400."""
    status, _, content = ask(server, "POST", f"/continue?{query}", body)
    assert status == 400
    return json.loads(content)["error"]


def records_of(content: bytes) -> list[tuple[str, bytes]]:
    records, at = [], 0
    while at < len(content):
        kind, length = struct.unpack_from(">cI", content, at)
        records.append((kind.decode(), content[at + 5 : at + 5 + length]))
        at += 5 + length
    assert at == len(content)
    return records


def listen(server: DemoServer, query: str = "", body: bytes | None = None) -> tuple[dict, np.ndarray, dict]:
    """The start, the samples (int16) and the figures of a continuation."""
    status, _, content = ask(server, "POST", f"/continue?{query}", body)
    assert status == 200, content
    records = records_of(content)
    kinds = "".join(kind for kind, _ in records)
    assert kinds == "S" + "A" * (len(kinds) - 2) + "E"
    samples = np.frombuffer(b"".join(payload for _, payload in records[1:-1]), "<i2")
    return json.loads(records[0][1]), samples, json.loads(records[-1][1])


def assert_same_speech(one: np.ndarray, other: np.ndarray) -> None:
    """Equal up to rounding: pieces of other lengths are summed in another order."""
    assert one.shape == other.shape
    assert one.size > 0
    assert np.abs(one.astype(int) - other).max() <= 1


def wait_for(condition) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


# What is streamed


def test_stream_is_what_the_engine_gives(server, lm, sound):
    settings = "temperature=1.5&top_k=none&top_p=0.9&repetition_penalty=1.1&seed=5&sample=1&max_seconds=2"
    start, samples, figures = listen(server, settings, sound)
    prompt = lm.codec.encode([load_audio(sound)])[0]
    sampling = Sampling(temperature=1.5, top_k=None, top_p=0.9, repetition_penalty=1.1, seed=5)
    expected = continue_codes(lm, prompt, 25, sampling, num_samples=2)[1]
    whole = lm.codec.decode(torch.cat([prompt, expected.codes], dim=1))
    assert_same_speech(samples, np.frombuffer(pcm16(whole), "<i2"))
    assert start["prompt_samples"] == 12 * FRAME_SIZE
    assert start["max_samples"] == 25 * FRAME_SIZE
    assert figures["frames"] == expected.codes.shape[1] > 0
    assert figures["ended"] == expected.ended
    assert figures["seconds"] == pytest.approx(figures["frames"] * 0.08)
    assert 0 < figures["first_audio_ms"] <= 1000 * figures["elapsed_seconds"]


def test_defaults_are_those_of_the_command_line(server, lm, sound):
    _, samples, _ = listen(server, "", sound)
    prompt = lm.codec.encode([load_audio(sound)])[0]
    (expected,) = continue_codes(lm, prompt, 37, Sampling())
    whole = lm.codec.decode(torch.cat([prompt, expected.codes], dim=1))
    assert_same_speech(samples, np.frombuffer(pcm16(whole), "<i2"))


def test_no_prompt(server):
    start, samples, figures = listen(server, "seed=2&max_seconds=1")
    assert start["prompt_samples"] == 0
    assert len(samples) == figures["frames"] * FRAME_SIZE > 0


def test_two_at_once_are_as_each_alone(server, make_sound):
    requests = [("seed=1", make_sound(4, 0.5)), ("seed=2&temperature=2&top_k=none", make_sound(5, 1.1, 44_100))]
    alone = [listen(server, *request)[1] for request in requests]
    together: dict[int, np.ndarray] = {}

    def run(number: int) -> None:
        together[number] = listen(server, *requests[number])[1]

    threads = [threading.Thread(target=run, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number in range(2):
        assert_same_speech(alone[number], together[number])


def test_speech_is_sent_before_it_ends(lm, sound):
    with running(lm, max_seconds=400.0) as server:
        connection = http.client.HTTPConnection(*server.server_address, timeout=30)
        connection.request("POST", "/continue?temperature=2", sound)
        response = connection.getresponse()
        kinds = []
        while len(kinds) < 4:
            kind, length = struct.unpack(">cI", response.read(5))
            response.read(length)
            kinds.append(kind)
        assert kinds == [b"S", b"A", b"A", b"A"]
        assert not server.service.engine.idle
        connection.close()


def test_old_clients_get_a_stream_without_chunks(server, sound):
    request = f"POST /continue?seed=1 HTTP/1.0\r\nContent-Length: {len(sound)}\r\n\r\n".encode() + sound
    head, content = send_raw(server, request).split(b"\r\n\r\n", 1)
    assert b"chunked" not in head
    assert records_of(content)[-1][0] == "E"


# Bounds


def test_a_client_that_goes_away_makes_room(lm, sound):
    with running(lm, max_seconds=400.0, max_requests=1) as server:
        connection = http.client.HTTPConnection(*server.server_address, timeout=30)
        connection.request("POST", "/continue?temperature=2", sound)
        response = connection.getresponse()
        assert response.read(5)
        assert ask(server, "POST", "/continue?max_seconds=2", sound)[0] == 503
        response.close()
        connection.close()
        wait_for(lambda: server.service.engine.idle)
        wait_for(lambda: ask(server, "POST", "/continue?max_seconds=2", sound)[0] == 200)


def test_an_upload_takes_no_place_before_it_is_there(lm):
    with running(lm, max_requests=1) as server, socket.create_connection(server.server_address, timeout=30) as client:
        client.sendall(b"POST /continue HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100\r\n\r\nabcde")
        wait_for(lambda: any(connection.cycle for connection in server.server_state.connections))
        assert ask(server, "POST", "/continue?max_seconds=1")[0] == 200


def test_clients_that_stall_are_closed(lm, sound, monkeypatch):
    monkeypatch.setattr(demo_server, "STALL_SECONDS", 0.5)
    with running(lm, max_seconds=400.0) as server:
        # Nothing, a part of a request's head, and a part of one after a whole request.
        for sent in (b"", b"GET / HT", b"GET /info HTTP/1.1\r\nHost: localhost\r\n\r\nGET / HT"):
            assert (b" 200 OK" in send_raw(server, sent)) == (b"info" in sent)
        # A client that takes nothing of what is sent.
        server.listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        with socket.socket() as connection:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            connection.connect(server.server_address)
            head = f"POST /continue?temperature=2 HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(sound)}\r\n\r\n"
            connection.sendall(head.encode() + sound)
            wait_for(lambda: not server.service.engine.idle)
            wait_for(lambda: server.service.engine.idle)


def test_connections_are_bounded(lm, monkeypatch):
    monkeypatch.setattr(demo_server, "MAX_CONNECTIONS", 2)
    """The one that is waited for the longest makes room, so that silent ones lock nobody out."""
    with running(lm) as server, contextlib.ExitStack() as stack:
        silent = []
        for number in range(2):
            silent.append(stack.enter_context(socket.create_connection(server.server_address, timeout=30)))
            silent[number].sendall(b"GET / HT")
            wait_for(lambda number=number: len(server.server_state.connections) == number + 1)
        assert ask(server, "GET", "/info")[0] == 200
        with contextlib.suppress(ConnectionResetError):
            assert silent[0].recv(1) == b""
        silent[1].sendall(b"TP/1.1\r\nHost: localhost\r\n\r\n")
        assert silent[1].recv(12) == b"HTTP/1.1 200"


def test_a_client_that_sends_a_byte_now_and_then_is_closed(lm, monkeypatch):
    monkeypatch.setattr(demo_server, "STALL_SECONDS", 0.5)
    with running(lm) as server, socket.create_connection(server.server_address, timeout=30) as connection:
        begin, closed = time.monotonic(), False
        while not closed and time.monotonic() - begin < 20:
            time.sleep(0.1)
            try:
                connection.sendall(b"G")
            except ConnectionError:
                closed = True
        assert closed


def test_more_than_the_places_are_turned_away(server, sound):
    with server.place(), server.place():
        status, headers, content = ask(server, "POST", "/continue", sound)
        assert status == 503
        assert headers["Retry-After"]
        assert "all 2 places are taken" in json.loads(content)["error"]
    assert ask(server, "POST", "/continue", sound)[0] == 200


def test_a_large_file_is_refused_before_it_is_read(server):
    with socket.create_connection(server.server_address, timeout=30) as connection:
        connection.sendall(b"POST /continue HTTP/1.1\r\nHost: localhost\r\nContent-Length: 30000000\r\n\r\n")
        answer = b"".join(iter(lambda: connection.recv(1 << 16), b""))
    assert b" 413 " in answer
    assert b"30.0 MB, and at most 0.2 MB" in answer
    # One that is sent all the same still gets the answer.
    status, _, content = ask(server, "POST", "/continue", bytes(3_000_000))
    assert status == 413
    assert "3.0 MB" in json.loads(content)["error"]


def test_an_upload_has_a_length_and_keeps_it(server, monkeypatch):
    def send(head: str, body: bytes = b"") -> bytes:
        return send_raw(server, f"POST /continue HTTP/1.1\r\nHost: localhost\r\n{head}\r\n\r\n".encode() + body)

    monkeypatch.setattr(demo_server, "STALL_SECONDS", 0.2)
    assert b" 411 " in send("Transfer-Encoding: chunked", b"5\r\nabcde\r\n0\r\n\r\n")
    assert b"broke off after 5 of 100 bytes" in send("Content-Length: 100", b"abcde")
    for length in ("-1", "1e3", "9" * 30, "x"):
        assert b" 400 " in send(f"Content-Length: {length}")
    wait_for(lambda: ask(server, "POST", "/continue?max_seconds=1")[0] == 200)


def test_a_prompt_without_room(server, make_sound):
    sentence = error_of(server, "name=speech.wav", make_sound(1, 4.0))
    assert sentence.startswith(
        "speech.wav: the prompt lasts 4.00 s, and prompt and continuation together may last 2.96 s"
    )
    assert "leaves" not in sentence and "\n" not in sentence
    assert "the prompt has 37 frames" in error_of(server, "", make_sound(1, 2.95))
    assert "or ask for more" in error_of(server, "max_seconds=1", make_sound(1, 2.0))


@pytest.mark.parametrize(
    ("query", "word"),
    [
        ("temperature=-1", "temperature must be 0"),
        ("temperature=nan", "temperature must be 0"),
        ("temperature=warm", "temperature must be a number, not 'warm'"),
        ("top_k=0", "top_k must be 1 or more"),
        ("top_k=1.5", "top_k must be a whole number"),
        (f"top_k={1 << 40}", "top_k may be at most"),
        ("top_p=0", "top_p"),
        ("repetition_penalty=0", "repetition_penalty"),
        ("max_seconds=0.01", "max_seconds must be from 0.08 to 2.96"),
        ("max_seconds=3.1", "max_seconds must be from 0.08 to 2.96"),
        ("max_seconds=nan", "max_seconds"),
        (f"seed={1 << 70}", "seed"),
        (f"seed={'9' * 5000}", "seed"),
        ("sample=-1", "sample"),
        ("speed=1", "there is no setting 'speed'"),
        ("seed=1&seed=2", "twice"),
        ("seed", "name=value"),
        ("&".join(f"a{i}=1" for i in range(40)), "name=value"),
    ],
)
def test_settings_out_of_range(server, query, word):
    sentence = error_of(server, query)
    assert word in sentence
    assert "\n" not in sentence and sentence.endswith(".")


def test_bad_files(server, sound):
    for name, said in (("a.wav", "a.wav"), ("", "the prompt"), ("a%0Ab%00.wav", "ab.wav")):
        sentence = error_of(server, f"name={name}", b"not audio")
        assert sentence.startswith(f"{said}: not a readable audio file") and "\n" not in sentence
    assert "a.flac: " in error_of(server, "name=a.flac", sound[: len(sound) // 2])
    assert error_of(server, "name=a.flac", b"") == "a.flac: the file is empty."


# Addresses


def test_page_info_and_example(server, lm):
    status, headers, content = ask(server, "GET", "/?from=a-bookmark")
    assert status == 200
    assert headers["Content-Type"] == "text/html; charset=utf-8"
    assert "default-src 'none'" in headers["Content-Security-Policy"]
    assert (headers["X-Content-Type-Options"], headers["Referrer-Policy"]) == ("nosniff", "no-referrer")
    assert b"http://" not in content.replace(b"http://www.w3.org/", b"") and b"https://" not in content
    info = json.loads(ask(server, "GET", "/info")[2])
    assert Path(lm.name).is_absolute() and info["model"] == "model"
    assert (info["max_seconds"], info["max_requests"], info["max_bytes"]) == (2.96, 2, 200_000)
    assert load_audio(ask(server, "GET", "/example")[2]).numel() == 12_000


@pytest.mark.parametrize(
    "path",
    ["/page.html", "/../server.py", "/%2e%2e/server.py", "//etc/passwd", "/info/", "/example/../info"],
)
def test_nothing_else_is_served(server, path):
    status, _, content = ask(server, "GET", path)
    assert status == 404
    assert list(json.loads(content)) == ["error"]
    assert ask(server, "POST", f"{path}x", b"abc")[0] == 404


@pytest.mark.parametrize("method", ["PUT", "GET"])
def test_other_methods_are_refused(server, method):
    status, headers, content = ask(server, method, "/continue", b"abc")
    assert (status, headers["Allow"]) == (405, "POST")
    assert method in json.loads(content)["error"]


@pytest.mark.parametrize(
    ("request_line", "status"),
    [
        (b"GET //[x HTTP/1.1\r\nHost: localhost\r\n\r\n", b"404"),
        (b"POST http://[::1 HTTP/1.1\r\nHost: localhost\r\n\r\n", b"404"),
        (b"POST /continue?\xff\xfe HTTP/1.1\r\nHost: localhost\r\n\r\n", b"400"),
        (b"POST /continue HTTP/1.1\r\nHost: localhost\r\nOrigin: http://[::1\r\n\r\n", b"403"),
        (b"GET /" + b"a" * 70_000, b"400"),
        (b"GET / HTTP/1.1" + b"\r\nA: b" * 20_000, b"400"),
    ],
)
def test_malformed_requests_are_answered(server, request_line, status):
    answer = send_raw(server, request_line)
    assert answer.split()[1] == status
    assert list(json.loads(answer.rpartition(b"\r\n\r\n")[2])) == ["error"]


def test_pages_of_other_addresses_are_refused(server, sound):
    assert ask(server, "POST", "/continue", sound, {"Origin": "http://elsewhere.example"})[0] == 403
    assert ask(server, "POST", "/continue", sound, {"Origin": server.address})[0] == 200


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("evil.example", 421),
        ("evil.example:7860", 421),
        ("localhost.evil.example", 421),
        ("127.0.0.1.evil.example", 421),
        ("[::1", 421),
        ("localhost:1", 200),
        ("LOCALHOST", 200),
        ("192.168.0.7:7860", 200),
        ("[::1]:7860", 200),
        ("box.example:80", 200),
    ],
)
def test_a_name_that_is_not_the_servers_is_refused(lm, host, status):
    """Its page could have been loaded from elsewhere, and be of the same origin for the browser."""
    with running(lm, allowed_hosts=["box.example"]) as server:
        for method, path in (("GET", "/info"), ("POST", "/continue?max_seconds=1")):
            found, _, content = ask(server, method, path, headers={"Host": host, "Origin": f"http://{host}"})
            assert found == status
        assert (status == 200) == (b"error" not in content)


# What goes wrong later


def test_an_error_in_the_stream_is_its_last_record(lm, sound, mimi_folder):
    from torchtitan.audio.codec import Codec

    broken = Codec.load(mimi_folder, 4)
    with running(SpeechLM(lm.name, lm.model, lm.tokenizer, lm.stream, broken)) as server:
        next(broken.model.decoder.parameters()).data.fill_(float("nan"))
        records = records_of(ask(server, "POST", "/continue", sound)[2])
        assert [kind for kind, _ in records] == ["S", "X"]
        assert "not finite" in json.loads(records[1][1])["error"]
        wait_for(lambda: server.service.engine.idle)


def test_a_server_that_is_stopped_says_so(lm, sound):
    with running(lm, max_seconds=400.0) as server:
        connection = http.client.HTTPConnection(*server.server_address, timeout=30)
        connection.request("POST", "/continue?temperature=2", sound)
        response = connection.getresponse()
        response.read(5)
    rest = response.read()
    assert b"being stopped" in rest.rpartition(b'{"error": ')[2]


def test_an_address_that_is_taken(lm, server):
    with pytest.raises(UserError, match=r"cannot listen on 127\.0\.0\.1, port \d+ \(Address already in use\)"):
        DemoServer(lm, port=server.server_address[1])
    with pytest.raises(UserError, match="max_requests"):
        DemoServer(lm, max_requests=0)


def run_demo_command(*arguments: str) -> None:
    spec = importlib.util.spec_from_file_location("demo", ROOT / "scripts" / "demo.py")
    demo = sys.modules["demo"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(demo)
    sys.argv = ["demo.py", *arguments]
    run_command(demo.main)


def test_without_a_model_the_command_says_how_to_get_one(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", sys.argv)
    with pytest.raises(SystemExit) as caught:
        run_demo_command("--device", "cpu")
    assert caught.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and "run scripts/quickstart.py" in line and "llm-jp/Llama-Mimi-1.3B" in line


@pytest.mark.parametrize("package", ["starlette", "uvicorn"])
def test_without_its_packages_the_command_says_how_to_install_them(monkeypatch, capsys, package):
    monkeypatch.setattr(sys, "argv", sys.argv)
    monkeypatch.delitem(sys.modules, "torchtitan.demo.server")
    for name in [name for name in sys.modules if name.partition(".")[0] == package]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(SystemExit) as caught:
        run_demo_command("--model_name", "anything")
    assert caught.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and package in line and "uv sync --extra demo" in line
