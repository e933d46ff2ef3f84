"""The demo's server (starlette on uvicorn): a page, and speech that is sent while the model still makes it.

    GET  /             page.html, which needs nothing from elsewhere
    GET  /info         what is served and which bounds hold, as JSON
    GET  /example      the example prompt, if there is one
    POST /continue     the body is a prompt's audio file, or empty; the query string has the settings

An answer of ``/continue`` with status 200 is a sequence of records: a letter, the payload's length (4 bytes,
big-endian), the payload. The first is ``S`` (JSON: what was understood, and where the continuation begins). Any number
of ``A`` follow (24 kHz mono, 16 bits, little-endian). The last is either ``E`` (JSON: figures) or ``X`` (JSON:
``error``); an answer without it was cut off. Any other status comes with JSON whose ``error`` is one sentence.

Prompts are read and encoded one at a time; continuations share the engine's batch. A client that goes away makes room
at once. The cost of a request is bounded: bytes and seconds of its prompt, seconds in all, time to send and to read.
A web page of another address can neither read from this server nor use it, whatever name it gives the server's address.
"""

import asyncio
import contextlib
import ipaddress
import json
import math
import os
import socket
import struct
import threading
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, urlsplit

import anyio
import torch
import uvicorn
from anyio.to_thread import run_sync
from starlette.applications import Starlette
from starlette.background import BackgroundTask
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.requests import Request as HTTPRequest
from starlette.responses import FileResponse, JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from torchtitan.audio.codec import FRAME_RATE, FRAME_SIZE
from torchtitan.audio.waveform import SAMPLE_RATE, load_beginning, pcm16
from torchtitan.checkpoint.speech_lm import SpeechLM
from torchtitan.generation import (
    Engine,
    Generation,
    Request,
    Sampling,
    SpeechService,
    frame_bound,
    require_room,
    sample_requests,
)
from torchtitan.tools.errors import UserError, first_line
from torchtitan.tools.logging import logger

PAGE = Path(__file__).with_name("page.html")

MAX_BYTES = 20_000_000
# Connections that are open at once. With one more, the one that the server has waited for the longest is closed.
MAX_CONNECTIONS = 64
# Time that a client has for the head of a request, and between two pieces of its upload.
STALL_SECONDS = 20
UPLOAD_SECONDS = 60
# The server reads a refused upload for so long: closing a connection with unread bytes may take the answer with it.
DRAIN_SECONDS = 2
# Time that clients have to end their requests when the server is stopped.
STOP_SECONDS = 10

# Headers of every answer. The page needs nothing from another address, and no other page may frame it.
HEADERS = {
    "Server": "llama-mimi",
    "Cache-Control": "no-store",
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'unsafe-inline' blob:; style-src 'unsafe-inline'; img-src data: blob:; "
        "media-src 'self' blob:; connect-src 'self' blob:; frame-ancestors 'none'; base-uri 'none'; form-action 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}


class DemoServer(uvicorn.Server):
    """Serves one model; use it in a ``with`` block, inside of which :meth:`serve_forever` runs.

    Setting ``should_exit`` ends :meth:`serve_forever`, as Ctrl-C does.

    Args:
        lm: the model.
        host, port: where to listen; port 0 takes a free one.
        max_seconds: what prompt and continuation may last together; None is :func:`frame_bound`'s default.
        max_requests: continuations at once.
        max_bytes: of a prompt file.
        example: a prompt that the page offers.
        allowed_hosts: names under which the server may be addressed, besides its address, localhost and ``host``.

    Raises:
        UserError: a bound that cannot be, or an address that cannot be listened on.
    """

    def __init__(
        self,
        lm: SpeechLM,
        host: str = "127.0.0.1",
        port: int = 0,
        max_seconds: float | None = None,
        max_requests: int = 4,
        max_bytes: int = MAX_BYTES,
        example: Path | None = None,
        allowed_hosts: Sequence[str] = (),
    ):
        if max_requests < 1:
            raise UserError(f"max_requests must be 1 or more, not {max_requests}.")
        self.lm, self.max_requests, self.max_bytes = lm, max_requests, max_bytes
        self.example = example if example is not None and example.is_file() else None
        self.hosts = {name.lower() for name in ("localhost", socket.gethostname(), host, *allowed_hosts)}
        self.max_frames = frame_bound(lm, max_seconds)
        self.max_seconds = self.max_frames / FRAME_RATE
        self.listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
        try:
            self.listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            self.listener.bind((host, port))
            self.listener.listen()
        except (OSError, OverflowError) as error:
            self.listener.close()
            raise UserError(f"the server cannot listen on {host}, port {port} ({first_line(error)}).") from None
        self.server_address = self.listener.getsockname()[:2]
        engine = Engine(lm, max_requests, lm.stream.sample_length(self.max_frames))
        # Set up now what the first listener would otherwise wait for.
        engine.generate([Request(torch.zeros(lm.stream.num_quantizers, 0, dtype=torch.int64), 1)])
        lm.codec.decode(lm.codec.encode([torch.zeros(FRAME_SIZE)])[0])
        self.service = SpeechService(engine)
        self._places = threading.BoundedSemaphore(max_requests)
        # Threads that read prompts (a small file can hold a lot of audio) and threads that wait for speech.
        self._readers, self._listeners = anyio.CapacityLimiter(1), anyio.CapacityLimiter(max_requests)

        routes = [
            Route("/", lambda _: FileResponse(PAGE, media_type="text/html")),
            Route("/info", lambda _: JSONResponse(self.info())),
            Route("/continue", self._continue, methods=["POST"]),
        ]
        if self.example is not None:
            sound = str(self.example)
            routes.append(Route("/example", lambda _: FileResponse(sound, media_type="application/octet-stream")))
        refusals = {HTTPException: refuse, UserError: lambda _, error: JSONResponse({"error": str(error)}, 400)}
        self._app = Starlette(routes=routes, exception_handlers=refusals)
        self._app.router.redirect_slashes = False
        super().__init__(
            uvicorn.Config(
                self._answer,
                interface="asgi3",
                http=Connection,
                ws="none",
                loop="asyncio",
                lifespan="off",
                log_config=None,
                log_level="error",
                access_log=False,
                proxy_headers=False,
                headers=list(HEADERS.items()),
                timeout_keep_alive=STALL_SECONDS,
            )
        )

    def __enter__(self) -> "DemoServer":
        return self

    def __exit__(self, *_: object) -> None:
        self.listener.close()
        self.service.close()

    @property
    def address(self) -> str:
        host, port = self.server_address
        return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"

    def serve_forever(self) -> None:
        self.run([self.listener])

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """End the continuations, so that their clients hear of it, and then the connections."""
        await run_sync(self.service.close)
        asyncio.get_running_loop().call_later(STOP_SECONDS, self._abort)
        await super().shutdown(sockets)

    def _abort(self) -> None:
        for connection in list(self.server_state.connections):
            connection.transport.abort()

    @contextlib.contextmanager
    def place(self) -> Iterator[None]:
        """One of the ``max_requests`` places, for as long as the block runs.

        Raises:
            HTTPException: none is free.
        """
        if not self._places.acquire(blocking=False):
            number = f"all {self.max_requests} places are" if self.max_requests > 1 else "the only place is"
            raise HTTPException(503, f"{number} taken; try again in a few seconds.", {"Retry-After": "3"})
        try:
            yield
        finally:
            self._places.release()

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request that addresses this server, and refuse one for another.

        A page of another address may have its own name resolved to the address of this server (DNS rebinding). The
        browser then takes it for one of this server's pages, but still tells that name.
        """
        host = HTTPRequest(scope).headers.get("Host", "localhost")
        app: Any = self._app
        if not self.is_own(host):
            sentence = f"this server is not {host[:80]}; --allowed_hosts gives it further names."
            app = Refusal({"error": sentence}, 421)
        await app(scope, receive, send)

    def is_own(self, host: str) -> bool:
        """Whether a request's Host (name or address, port) is this server: an address, which no one else can own."""
        try:
            name = urlsplit(f"//{host}").hostname or ""
        except ValueError:  # brackets that hold no address
            return False
        with contextlib.suppress(ValueError):
            return bool(ipaddress.ip_address(name))
        return name in self.hosts

    def info(self) -> dict[str, Any]:
        """What the page has to know."""
        name = self.lm.name
        return {
            "model": Path(name).name if os.path.isabs(name) else name,
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
        waveform, seconds = load_beginning(body, limit + 1.0, name, self.lm.codec.resampler)
        if waveform.numel() > limit * SAMPLE_RATE:
            raise UserError(
                f"{name}: the prompt lasts {seconds:.2f} s, and prompt and continuation together may last "
                f"{limit:.2f} s; shorten the prompt{'' if max_frames == self.max_frames else ' or ask for more'}."
            )
        require_room(self.lm.codec.num_frames(waveform.numel()), max_frames)
        return self.lm.codec.encode([waveform])[0]

    async def _continue(self, http: HTTPRequest) -> Response:
        """Answer with the speech of a request while it is made.

        Raises:
            HTTPException: the request is refused before its upload has ended.
            UserError: the prompt or the engine refuses it afterwards.
        """
        origin = http.headers.get("Origin")
        if origin is not None and origin.partition("://")[2] != http.headers.get("Host"):
            raise HTTPException(403, "a page of another address may not use this server.")
        try:
            sampling, sample, max_frames, name = parse_settings(http.scope["query_string"].decode(), self)
        except UserError as error:
            raise HTTPException(400, str(error)) from None
        with self.place():
            pass  # refused before the upload; it is taken when the upload is there, as that may take its time
        body = await read_upload(http, self.max_bytes)
        if name and not body:
            raise UserError(f"{name}: the file is empty.")
        with contextlib.ExitStack() as stack:
            stack.enter_context(self.place())
            arrived = time.perf_counter()
            prompt = await run_sync(self.read_prompt, body, name or "the prompt", max_frames, limiter=self._readers)
            (request,) = sample_requests(prompt, max_frames - prompt.shape[1], sampling, first=sample)
            generation = self.service.submit(request)
            stack.callback(self._give_up, generation)
            held = stack.pop_all()
        return StreamingResponse(
            self._records(generation, sample, arrived, held),
            headers={"X-Accel-Buffering": "no"},
            media_type="application/octet-stream",
            background=BackgroundTask(held.close),  # starlette also runs it as soon as the client has gone away
        )

    def _give_up(self, generation: Generation) -> None:
        if not generation.finished:
            logger.info(f"continuation: given up after {len(generation.frames) / FRAME_RATE:.2f} s")
            self.service.cancel(generation)

    async def _records(
        self, generation: Generation, sample: int, arrived: float, held: contextlib.ExitStack
    ) -> AsyncIterator[bytes]:
        """The records of a continuation; ``held`` is released before the last one."""
        request = generation.request
        prompt_frames = request.prompt.shape[1]
        start = {
            "prompt_samples": prompt_frames * FRAME_SIZE,
            "max_samples": (prompt_frames + request.max_frames) * FRAME_SIZE,
            "sample_rate": SAMPLE_RATE,
            "seed": request.sampling.seed,
            "sample": sample,
        }
        yield record(b"S", start)
        pieces, sent, first_audio = self.service.listen(generation), 0, None
        try:
            while (piece := await run_sync(next, pieces, None, limiter=self._listeners)) is not None:
                yield record(b"A", pcm16(piece))
                sent += piece.numel()
                if sent > start["prompt_samples"] and first_audio is None:
                    first_audio = round(1000 * (time.perf_counter() - arrived), 1)
            elapsed = time.perf_counter() - arrived
            frames = sent // FRAME_SIZE - prompt_frames
            seconds = frames / FRAME_RATE
            figures = {
                "frames": frames,
                "seconds": round(seconds, 2),
                "first_audio_ms": first_audio,
                "elapsed_seconds": round(elapsed, 3),
                "times_real_time": round(seconds / elapsed, 2),
                "ended": generation.ended,
            }
            logger.info(f"continuation: {seconds:.2f} s, {figures['times_real_time']:.2f} times real time")
            last = record(b"E", figures)
        except UserError as error:
            logger.info(f"continuation: {error}")
            last = record(b"X", {"error": str(error)})
        finally:
            # The place is free before the client hears of the end, since it may ask for the next one at once.
            await run_sync(held.close)
        yield last


def parse_settings(query: str, server: DemoServer) -> tuple[Sampling, int, int, str]:
    """Sampling, the sample's number, the bound in frames and the prompt's name (or "") from a query string.

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

    name = "".join(letter for letter in given.pop("name", "")[:200] if letter.isprintable())
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


def record(kind: bytes, value: bytes | dict[str, Any]) -> bytes:
    payload = value if isinstance(value, bytes) else json.dumps(value).encode()
    return kind + struct.pack(">I", len(payload)) + payload


async def read_upload(http: HTTPRequest, max_bytes: int) -> bytes:
    """The body of a request.

    Raises:
        HTTPException: it states no length or too many bytes, breaks off or takes too long.
    """
    if "Transfer-Encoding" in http.headers:
        raise HTTPException(411, "the upload must say its length (Content-Length).")
    length = int(http.headers.get("Content-Length", 0))
    if length > max_bytes:
        raise HTTPException(
            413, f"the prompt file has {length / 1e6:.1f} MB, and at most {max_bytes / 1e6:g} MB are taken."
        )
    body, pieces = bytearray(), http.stream()
    with anyio.move_on_after(UPLOAD_SECONDS):
        while len(body) < length:
            try:
                with anyio.fail_after(STALL_SECONDS):
                    body += await anext(pieces)
            except (TimeoutError, ClientDisconnect):
                raise HTTPException(400, f"the upload broke off after {len(body):,} of {length:,} bytes.") from None
        return bytes(body)
    raise HTTPException(408, f"the upload took more than {UPLOAD_SECONDS} s.")


async def refuse(http: HTTPRequest, error: Exception) -> Response:
    """The answer to a request whose upload may not have ended."""
    assert isinstance(error, HTTPException)
    sentence = {404: "there is nothing at this address.", 405: f"the method {http.method} is not for this address."}
    return Refusal({"error": sentence.get(error.status_code, error.detail)}, error.status_code, error.headers)


class Refusal(JSONResponse):
    """An answer after which the server reads and forgets the rest of the upload for a while, then closes."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.headers["Connection"] = "close"
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        await send({"type": "http.response.body", "body": self.body, "more_body": True})
        with anyio.move_on_after(DRAIN_SECONDS):
            while (await receive()).get("more_body"):
                pass
        await send({"type": "http.response.body"})


class Connection(H11Protocol):
    """A connection with the bounds that uvicorn leaves to a proxy: their number, and how long a client may stall."""

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        transport.set_write_buffer_limits(high=0)  # so that a client that takes nothing is noticed at once
        self._waits_since = self.loop.time()
        self._start_timer()
        if len(self.connections) > MAX_CONNECTIONS:
            open_ones = (c for c in self.connections if isinstance(c, Connection) and not c.transport.is_closing())
            waited_for = [connection for connection in open_ones if connection._is_waited_for()]
            min(waited_for, key=lambda connection: connection._waits_since).transport.abort()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self.cycle is None or self.cycle.response_complete:
            self._start_timer()

    def on_response_complete(self) -> None:
        self._waits_since = self.loop.time()
        super().on_response_complete()

    def _is_waited_for(self) -> bool:
        """Whether the request, or its upload, is not there yet."""
        return self.cycle is None or self.cycle.response_complete or self.cycle.more_body

    def _start_timer(self) -> None:
        """Start uvicorn's timer for the next request also before the first one, and go on with it after a part of one.

        uvicorn stops it at the first byte, so that a client could send a byte now and then.
        """
        if self.timeout_keep_alive_task is not None:
            self.timeout_keep_alive_task.cancel()
        left = self._waits_since + self.timeout_keep_alive - self.loop.time()
        self.timeout_keep_alive_task = self.loop.call_later(max(0.0, left), self.timeout_keep_alive_handler)

    def pause_writing(self) -> None:
        super().pause_writing()
        self._stalled = self.loop.call_later(STALL_SECONDS, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        self._stalled.cancel()

    def send_400_response(self, msg: str) -> None:
        super().send_400_response(json.dumps({"error": msg}))
