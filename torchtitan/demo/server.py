"""The demo's HTTP server: a page, and speech that is sent while the model still makes it.

    GET  /             page.html, which needs nothing from elsewhere
    GET  /info         what is served and which bounds hold, as JSON
    GET  /example      the example prompt, if there is one
    POST /continue     the body is a prompt's audio file, or empty; the query string has the settings

What ``/continue`` answers with status 200 is a stream of records: a letter, the payload's length (4 bytes,
big-endian), the payload. One ``S`` (JSON: what was understood, and where the continuation begins), any
number of ``A`` (24 kHz mono, 16 bits, little-endian), and as the last one either ``E`` (JSON: figures) or ``X`` (JSON:
``error``). A stream without the last one was cut off. Any other status comes with JSON whose ``error`` is one sentence.

Prompts are read and encoded one at a time, continuations share the engine's batch. A client that goes away makes room
at once. What a request can cost is bounded: bytes and seconds of its prompt, seconds in all, time to send and to read.
"""

import contextlib
import json
import math
import socket
import struct
import sys
import threading
import time
from collections.abc import Iterator
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl

import torch

from torchtitan.audio.codec import FRAME_RATE, FRAME_SIZE
from torchtitan.audio.waveform import SAMPLE_RATE, load_beginning
from torchtitan.checkpoint.speech_lm import SpeechLM
from torchtitan.generation import (
    Engine,
    Request,
    Sampling,
    SpeechService,
    frame_bound,
    require_room,
    sample_requests,
)
from torchtitan.tools.errors import UserError
from torchtitan.tools.logging import logger

PAGE = Path(__file__).with_name("page.html")

MAX_BYTES = 20_000_000
# Connections that are open at once, whatever they ask for; more are closed.
MAX_CONNECTIONS = 64
# A connection that neither takes nor gives a byte for so long is closed.
STALL_SECONDS = 20.0
UPLOAD_SECONDS = 60.0
# A refused upload is read on for so long: a connection closed on unread bytes may take the answer with it.
DRAIN_SECONDS = 2.0

# Nothing but what is in the page itself: no address elsewhere, and no frame around it.
POLICY = (
    "default-src 'none'; script-src 'unsafe-inline' blob:; style-src 'unsafe-inline'; img-src data: blob:; "
    "media-src 'self' blob:; connect-src 'self' blob:; frame-ancestors 'none'; base-uri 'none'; form-action 'none'"
)


NOTHING_HERE = "there is nothing at this address."


class Refused(UserError):
    """A request that gets a status other than 400."""

    def __init__(self, status: HTTPStatus, sentence: str):
        super().__init__(sentence)
        self.status = status


class DemoServer(ThreadingHTTPServer):
    """Serves one model; use it in a ``with`` block, inside of which :meth:`serve_forever` runs.

    Args:
        lm: the model.
        host, port: where to listen; port 0 takes a free one.
        max_seconds: what prompt and continuation may last together; None is :func:`frame_bound`'s default.
        max_requests: continuations at once.
        max_bytes: of a prompt file.
        example: a prompt that the page offers.

    Raises:
        UserError: a bound that cannot be, or an address that cannot be listened on.
    """

    daemon_threads = True
    request_queue_size = 32

    def __init__(
        self,
        lm: SpeechLM,
        host: str = "127.0.0.1",
        port: int = 0,
        max_seconds: float | None = None,
        max_requests: int = 4,
        max_bytes: int = MAX_BYTES,
        example: Path | None = None,
    ):
        if max_requests < 1:
            raise UserError(f"max_requests must be 1 or more, not {max_requests}.")
        self.lm, self.max_requests, self.max_bytes = lm, max_requests, max_bytes
        self.example = example if example is not None and example.is_file() else None
        self.max_frames = frame_bound(lm, max_seconds)
        engine = Engine(lm, max_requests, lm.stream.sample_length(self.max_frames))
        # What is set up once is set up now: the first listener would wait for it.
        engine.generate([Request(torch.zeros(lm.stream.num_quantizers, 0, dtype=torch.int64), 1)])
        lm.codec.decode(lm.codec.encode([torch.zeros(FRAME_SIZE)])[0])
        self.service = SpeechService(engine)
        self._places = threading.BoundedSemaphore(max_requests)
        self._connections = threading.BoundedSemaphore(MAX_CONNECTIONS)
        self._reading = threading.Lock()
        if ":" in host:
            self.address_family = socket.AF_INET6
        try:
            super().__init__((host, port), Handler)
        except (OSError, OverflowError) as error:
            reason = getattr(error, "strerror", None) or str(error)
            raise UserError(f"the server cannot listen on {host}, port {port} ({reason}).") from None

    @property
    def address(self) -> str:
        host, port = self.server_address[:2]
        return f"http://[{host}]:{port}" if ":" in str(host) else f"http://{host}:{port}"

    @property
    def max_seconds(self) -> float:
        return self.max_frames / FRAME_RATE

    def server_close(self) -> None:
        super().server_close()
        self.service.__exit__()

    def process_request(self, request: Any, client_address: Any) -> None:
        if self._connections.acquire(blocking=False):
            super().process_request(request, client_address)
        else:
            self.shutdown_request(request)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._connections.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """The server goes on, and a bug is told on its console."""
        if not isinstance(sys.exc_info()[1], OSError):
            logger.exception("a request failed")

    @contextlib.contextmanager
    def place(self) -> Iterator[None]:
        """One of the ``max_requests`` places, for as long as the block runs.

        Raises:
            Refused: none is free.
        """
        if not self._places.acquire(blocking=False):
            number = f"all {self.max_requests} places are" if self.max_requests > 1 else "the only place is"
            raise Refused(HTTPStatus.SERVICE_UNAVAILABLE, f"{number} taken; try again in a few seconds.")
        try:
            yield
        finally:
            self._places.release()

    def info(self) -> dict[str, Any]:
        """What the page has to know."""
        return {
            "model": self.lm.name,
            "device": str(self.lm.device),
            "sample_rate": SAMPLE_RATE,
            "frame_size": FRAME_SIZE,
            "max_seconds": self.max_seconds,
            "max_requests": self.max_requests,
            "max_bytes": self.max_bytes,
            "example": self.example is not None,
        }

    def read_prompt(self, body: bytes, name: str, max_frames: int) -> torch.Tensor:
        """The codes [Q, T] of a prompt's file; T is 0 for an empty one.

        Raises:
            UserError: it is no audio, or leaves no room for a continuation.
        """
        if not body:
            return torch.zeros(self.lm.stream.num_quantizers, 0, dtype=torch.int64)
        limit = max_frames / FRAME_RATE
        # One at a time: a small file can hold a lot of audio.
        with self._reading:
            waveform, seconds = load_beginning(body, limit + 1.0, name, self.lm.codec.resampler)
            if waveform.numel() > limit * SAMPLE_RATE:
                raise UserError(
                    f"{name}: the prompt lasts {seconds:.2f} s, and prompt and continuation together may last "
                    f"{limit:.2f} s; shorten the prompt{'' if max_frames == self.max_frames else ' or ask for more'}."
                )
            require_room(self.lm.codec.num_frames(waveform.numel()), max_frames)
            return self.lm.codec.encode([waveform])[0]


def parse_settings(query: str, server: DemoServer) -> tuple[Sampling, int, int, str]:
    """Sampling, the sample's number, the bound in frames and the prompt's name from a query string.

    Raises:
        UserError: a setting that is unknown, given twice, no number or out of range.
    """
    try:
        pairs = parse_qsl(query, keep_blank_values=True, strict_parsing=bool(query), max_num_fields=16)
    except ValueError:
        raise UserError("the settings in the address must have the form name=value&name=value.") from None
    given = dict(pairs)
    if len(given) < len(pairs):
        raise UserError("a setting was given twice.")

    def number(key: str, kind: type, default: Any) -> Any:
        text = given.pop(key, None)
        if text is None:
            return default
        try:
            return kind(text)
        except ValueError:
            what = "a whole number" if kind is int else "a number"
            raise UserError(f"{key} must be {what}, not {text[:40]!r}.") from None

    name = "".join(letter for letter in given.pop("name", "")[:200] if letter.isprintable()) or "the prompt"
    if given.get("top_k") == "none":
        given["top_k"] = str(1 << 30)
    defaults = Sampling()
    sampling = Sampling(
        temperature=number("temperature", float, defaults.temperature),
        top_k=number("top_k", int, defaults.top_k),
        top_p=number("top_p", float, defaults.top_p),
        repetition_penalty=number("repetition_penalty", float, defaults.repetition_penalty),
        seed=number("seed", int, defaults.seed),
    )
    sample = number("sample", int, 0)
    seconds = number("max_seconds", float, server.max_seconds)
    if given:
        raise UserError(f"there is no setting {next(iter(given))[:40]!r}.")
    if abs(sampling.seed) >= 1 << 63 or not 0 <= sample < 1 << 31:
        raise UserError("seed must have less than 64 bits, and sample be 0 or more and have less than 32.")
    if sampling.top_k is not None and sampling.top_k > 1 << 30:
        raise UserError(f"top_k may be at most {1 << 30}; none draws from all units.")
    if not 1 / FRAME_RATE <= seconds <= server.max_seconds + 1e-6:
        raise UserError(
            f"max_seconds must be from {1 / FRAME_RATE:.2f} to {server.max_seconds:.2f} here (prompt and continuation "
            f"together), not {seconds:g}."
        )
    return sampling, sample, math.floor(seconds * FRAME_RATE + 1e-6), name


def pcm16(waveform: torch.Tensor) -> bytes:
    """A float waveform [n] in 16 bits, little-endian, clipped to full scale.

    Raises:
        UserError: samples that are not finite.
    """
    if not torch.isfinite(waveform).all():
        raise UserError("the codec gave samples that are not finite numbers.")
    return (waveform.clamp(-1.0, 1.0) * 32767).round().to(torch.int16).numpy().astype("<i2").tobytes()


class Handler(BaseHTTPRequestHandler):
    """One connection."""

    protocol_version = "HTTP/1.1"
    timeout = STALL_SECONDS
    disable_nagle_algorithm = True

    @property
    def demo(self) -> DemoServer:
        assert isinstance(self.server, DemoServer)
        return self.server

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        if path == "/":
            self._answer(PAGE.read_bytes(), "text/html; charset=utf-8")
        elif path == "/info":
            self._answer_json(HTTPStatus.OK, self.demo.info())
        elif path == "/example" and self.demo.example is not None:
            self._answer(self.demo.example.read_bytes(), "application/octet-stream")
        else:
            self.send_error(HTTPStatus.NOT_FOUND)

    def do_POST(self) -> None:
        arrived = time.perf_counter()
        self._unread = True
        try:
            path, _, query = self.path.partition("?")
            if path != "/continue":
                raise Refused(HTTPStatus.NOT_FOUND, NOTHING_HERE)
            self._require_same_origin()
            settings = parse_settings(query, self.demo)
            length = self._body_length()
            with self.demo.place():
                body = self._read_body(length)
                arrived = time.perf_counter()
                sampling, sample, max_frames, name = settings
                prompt = self.demo.read_prompt(body, name, max_frames)
                del body
                (request,) = sample_requests(prompt, max_frames - prompt.shape[1], sampling, first=sample)
                last = self._stream(request, sample, arrived)
            # With the place free again, as a client that has heard the end may ask for the next at once.
            if last is not None:
                self._end_stream(*last)
        except UserError as error:
            status = error.status if isinstance(error, Refused) else HTTPStatus.BAD_REQUEST
            self._answer_json(status, {"error": str(error)})

    def _require_same_origin(self) -> None:
        """Refuse what another site's page makes a browser send."""
        origin = self.headers.get("Origin")
        if origin is not None and origin.partition("://")[2] != self.headers.get("Host"):
            raise Refused(HTTPStatus.FORBIDDEN, "a page of another address may not use this server.")

    def _body_length(self) -> int:
        if "Transfer-Encoding" in self.headers:
            raise Refused(HTTPStatus.LENGTH_REQUIRED, "the upload must say its length (Content-Length).")
        length = self.headers.get("Content-Length", "0").strip()
        if not (length.isascii() and length.isdigit() and len(length) < 20):
            raise UserError("the upload's Content-Length is no number.")
        if int(length) > self.demo.max_bytes:
            raise Refused(
                HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
                f"the prompt file has {int(length) / 1e6:.1f} MB, and at most {self.demo.max_bytes / 1e6:g} MB are "
                f"taken.",
            )
        return int(length)

    def _read_body(self, length: int) -> bytes:
        body, deadline = bytearray(), time.monotonic() + UPLOAD_SECONDS
        while len(body) < length:
            try:
                piece = self.rfile.read1(min(1 << 16, length - len(body)))
            except TimeoutError:
                piece = b""
            if not piece:
                raise UserError(f"the upload broke off after {len(body):,} of {length:,} bytes.")
            body += piece
            if time.monotonic() > deadline:
                raise Refused(HTTPStatus.REQUEST_TIMEOUT, f"the upload took more than {UPLOAD_SECONDS:.0f} s.")
        self._unread = False
        return bytes(body)

    def _stream(self, request: Request, sample: int, arrived: float) -> tuple[bytes, dict[str, Any]] | None:
        """Answer with the speech of a request while it is made, up to the last record.

        Returns:
            the last record's kind and content, which is yet to be sent; None when nobody listens any more.

        Raises:
            UserError: the engine does not take the request; nothing was sent then.
        """
        service = self.demo.service
        generation = service.submit(request)
        prompt_samples = request.prompt.shape[1] * FRAME_SIZE
        sent, first_audio = 0, math.nan
        try:
            self._begin_stream()
            start = {
                "prompt_samples": prompt_samples,
                "max_samples": prompt_samples + request.max_frames * FRAME_SIZE,
                "sample_rate": SAMPLE_RATE,
                "seed": request.sampling.seed,
                "sample": sample,
            }
            self._send_record(b"S", start)
            for piece in service.listen(generation):
                self._send_record(b"A", pcm16(piece))
                sent += piece.numel()
                if sent > prompt_samples and math.isnan(first_audio):
                    first_audio = time.perf_counter() - arrived
            elapsed = time.perf_counter() - arrived
            frames = sent // FRAME_SIZE - request.prompt.shape[1]
            seconds = frames / FRAME_RATE
            figures = {
                "frames": frames,
                "seconds": round(seconds, 2),
                "first_audio_ms": None if math.isnan(first_audio) else round(1000 * first_audio, 1),
                "elapsed_seconds": round(elapsed, 3),
                "times_real_time": round(seconds / elapsed, 2),
                "ended": generation.ended,
            }
            logger.info(f"continuation: {seconds:.2f} s, {figures['times_real_time']:.2f} times real time")
            return b"E", figures
        except UserError as error:
            logger.info(f"continuation: given up: {error}")
            return b"X", {"error": str(error)}
        except OSError:
            logger.info(f"continuation: given up after {sent / SAMPLE_RATE:.2f} s, as nobody listens")
            return None
        finally:
            service.cancel(generation)

    def _begin_stream(self) -> None:
        self.send_response(HTTPStatus.OK)
        self.send_header("Content-Type", "application/octet-stream")
        self.send_header("Cache-Control", "no-store")
        self.send_header("X-Accel-Buffering", "no")
        self.send_header("Connection", "close")
        self._chunked = self.request_version != "HTTP/1.0"
        if self._chunked:
            self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()

    def _send_record(self, kind: bytes, value: bytes | dict[str, Any]) -> None:
        payload = value if isinstance(value, bytes) else json.dumps(value).encode()
        record = kind + struct.pack(">I", len(payload)) + payload
        self.wfile.write(b"%x\r\n%b\r\n" % (len(record), record) if self._chunked else record)

    def _end_stream(self, kind: bytes, value: dict[str, Any]) -> None:
        with contextlib.suppress(OSError):
            self._send_record(kind, value)
            if self._chunked:
                self.wfile.write(b"0\r\n\r\n")

    def _answer_json(self, status: HTTPStatus, value: dict[str, Any]) -> None:
        self._answer(json.dumps(value).encode(), "application/json", status)

    def _answer(self, content: bytes, kind: str, status: HTTPStatus = HTTPStatus.OK) -> None:
        with contextlib.suppress(OSError):
            unread = getattr(self, "_unread", False)
            self.send_response(status)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(content)))
            self.send_header("Cache-Control", "no-cache")
            self.send_header("Content-Security-Policy", POLICY)
            self.send_header("X-Content-Type-Options", "nosniff")
            self.send_header("Referrer-Policy", "no-referrer")
            if status == HTTPStatus.SERVICE_UNAVAILABLE:
                self.send_header("Retry-After", "3")
            if unread:
                self.send_header("Connection", "close")
            self.end_headers()
            self.wfile.write(content)
            if unread:
                self._drain()

    def _drain(self) -> None:
        """Read and forget the rest of a refused upload, for a while."""
        self.connection.shutdown(socket.SHUT_WR)
        self.connection.settimeout(DRAIN_SECONDS)
        deadline = time.monotonic() + DRAIN_SECONDS
        while time.monotonic() < deadline and self.rfile.read1(1 << 16):
            pass

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """What the standard library refuses, as JSON too."""
        self._unread = True
        status = HTTPStatus(code)
        sentence = NOTHING_HERE if status == HTTPStatus.NOT_FOUND else f"{message or status.phrase}."
        self._answer_json(status, {"error": sentence})

    def version_string(self) -> str:
        return "llama-mimi"

    def log_message(self, format: str, *args: Any) -> None:
        """Continuations are logged where they end."""
