"""Continuations of speech and text: bounds, prompts, and audio that is streamed while the model makes it."""

import hashlib
import math
import threading
from collections.abc import Callable
from collections.abc import Generator as PythonGenerator

import torch

from torchtitan.audio.codec import FRAME_RATE
from torchtitan.audio.streaming import StreamingDecoder
from torchtitan.audio.token_stream import mark_ids
from torchtitan.checkpoint.speech_lm import SpeechLM
from torchtitan.generation.engine import Continuation, Engine, Generation, Request
from torchtitan.generation.sampling import Sampling
from torchtitan.tools.errors import UserError

# The sequence length of the published recipe: BOS, <audio>, frames, </audio>.
DEFAULT_MAX_IDS = 1024

# The largest max_seconds, whatever the context.
MAX_SECONDS = 86_400

# Continuations of one call that are decoded together.
BATCH_ROWS = {"cpu": 8, "cuda": 64, "mps": 8}


def frame_bound(
    lm: SpeechLM,
    max_seconds: float | None = None,
    num_text: int = 0,
    slides: bool = False,
    name: str = "max_seconds",
) -> int:
    """The number of frames, prompt included, that a sequence may have.

    Args:
        max_seconds: the largest total duration of the frames; None allows the frames that fit into 1,024 ids.
        num_text: text ids before them.
        slides: old frames leave the full context, so that it is no bound.
        name: what messages call ``max_seconds``.

    Raises:
        UserError: ``max_seconds`` is under one frame or over the model's context.
    """
    context = lm.stream.max_frames(lm.max_length, num_text)
    if max_seconds is None:
        return min(context, lm.stream.max_frames(DEFAULT_MAX_IDS, num_text))
    if not max_seconds * FRAME_RATE >= 1 or not math.isfinite(max_seconds):
        raise UserError(f"{name} must be a number from {1 / FRAME_RATE:.2f} (one frame) on, not {max_seconds}.")
    if max_seconds > MAX_SECONDS:
        raise UserError(f"{name} can be at most {MAX_SECONDS:,} (a day), not {max_seconds:g}.")
    frames = math.floor(max_seconds * FRAME_RATE + 1e-6)
    if frames > context and not slides:
        other = ", or give context_seconds, which lets the beginning leave the context" if name == "max_seconds" else ""
        raise UserError(
            f"{name} {max_seconds:g} is over the context of {lm.name}: {lm.max_length:,} ids hold "
            f"{context} frames, {context / FRAME_RATE:.2f} s; ask for at most that{other}."
        )
    return frames


def require_room(prompt_frames: int, max_frames: int) -> None:
    """Refuse a prompt that leaves no frame to generate.

    Raises:
        UserError: with both lengths.
    """
    if prompt_frames >= max_frames:
        raise UserError(
            f"the prompt has {prompt_frames} frames ({prompt_frames / FRAME_RATE:.2f} s) and prompt and continuation "
            f"together may have {max_frames} ({max_frames / FRAME_RATE:.2f} s): shorten the prompt or raise "
            f"max_seconds, if the model's context allows it."
        )


def text_prompt(lm: SpeechLM, text: str) -> tuple[int, ...]:
    """The ids of a text to be spoken, as training with task ``tts`` makes them.

    Raises:
        UserError: the text is empty, or contains the names of special or audio tokens.
    """
    ids = lm.tokenizer(text, add_special_tokens=False)["input_ids"]
    if not ids:
        raise UserError("the text to speak is empty.")
    marks = mark_ids(lm.tokenizer)
    if any(i >= lm.stream.base_size or i in marks for i in ids):
        raise UserError(f"the text to speak contains the name of a special token: {text!r}.")
    return tuple(ids)


def sample_requests(
    prompt: torch.Tensor,
    max_frames: int,
    sampling: Sampling,
    num_samples: int = 1,
    text_ids: tuple[int, ...] = (),
    first: int = 0,
) -> list[Request]:
    """Requests for several samples of one prompt.

    A sample's number contains a digest of its prompt, since continuations of different prompts with the same random
    numbers would sound alike. So a sample depends on the seed, the prompt and its place among the prompt's samples, and
    not on the other prompts of a run.

    Args:
        prompt: codes [Q, T]; T may be 0.
        max_frames: bound of the new frames.
        first: the place of the first one among the prompt's samples.
    """
    content = prompt.to(torch.int16).contiguous().numpy().tobytes() + repr(text_ids).encode()
    digest = int.from_bytes(hashlib.sha256(content).digest()[:8], "little")
    numbers = (digest << 32 | i for i in range(first, first + num_samples))
    return [Request(prompt, max_frames, text_ids, sampling, number) for number in numbers]


def continue_codes(
    lm: SpeechLM,
    prompt: torch.Tensor | None = None,
    max_frames: int | None = None,
    sampling: Sampling | None = None,
    num_samples: int = 1,
    on_frame: Callable[[], object] | None = None,
) -> list[Continuation]:
    """Draw ``num_samples`` continuations of one prompt.

    For more than one prompt, make an :class:`Engine` once and give it all of them.

    Args:
        prompt: codes [Q, Tp]; None starts from ``<audio>``.
        max_frames: bound of the prompt's and the new frames together; None is :func:`frame_bound`'s default.
        sampling: None takes the defaults.
        on_frame: called after each frame of the batch.

    Raises:
        UserError: no room beside the prompt, a bound over the model's context, fewer than one sample, a model that
            is no Llama, or logits that are not finite.
    """
    if num_samples < 1:
        raise UserError(f"num_samples must be 1 or more, not {num_samples}.")
    if prompt is None:
        prompt = torch.zeros(lm.stream.num_quantizers, 0, dtype=torch.int64)
    context = lm.stream.max_frames(lm.max_length)
    if max_frames is None:
        max_frames = frame_bound(lm)
    if max_frames > context:
        raise UserError(f"{max_frames} frames are over the context of {lm.name}, which holds {context}.")
    require_room(prompt.shape[1], max_frames)
    rows = min(num_samples, BATCH_ROWS.get(lm.device.type, 8))
    engine = Engine(lm, rows, lm.stream.sample_length(max_frames))
    requests = sample_requests(prompt, max_frames - prompt.shape[1], sampling or Sampling(), num_samples)
    return engine.generate(requests, on_frame)


class SpeechService:
    """An engine for several listeners at once, each in a thread of its own.

    One thread advances the batch; each listener decodes its own frames as they arrive. Use it in a ``with`` block; its
    end gives up the requests that are not finished.

    Args:
        engine: a constrained one that is not used elsewhere meanwhile.
    """

    def __init__(self, engine: Engine):
        self.engine = engine
        self._changed = threading.Condition()
        self._given_up: list[Generation] = []  # for the engine's thread to cancel
        self._closed = False
        self._failure: Exception | None = None
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    def __enter__(self) -> "SpeechService":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the engine's thread; those who still listen get an error."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._thread.join()

    def submit(self, request: Request) -> Generation:
        """Queue a request (see :meth:`Engine.submit`); its frames are kept until somebody listens.

        Raises:
            UserError: the service is closed or has failed, or the request cannot be.
        """
        with self._changed:
            if self._closed or self._failure is not None:
                raise UserError(f"{self.engine.lm.name}: no more speech is made ({self._failure or 'closed'}).")
            generation = self.engine.submit(request)
            self._changed.notify_all()
            return generation

    def cancel(self, generation: Generation) -> None:
        """Give a request up, if it is not finished, and wait until it is."""
        with self._changed:
            if not generation.finished:
                self._given_up.append(generation)
                self._changed.notify_all()
                self._changed.wait_for(lambda: generation.finished)

    def listen(
        self, generation: Generation, prompt: bool = True, chunk_frames: int = 1
    ) -> PythonGenerator[torch.Tensor, None, None]:
        """The speech of a request while it is being made: float32 waveforms [n] at 24 kHz.

        Concatenated, they are the waveform of prompt and continuation. Closing an iterator that has begun gives the
        request up.

        Args:
            prompt: begin with the prompt's own frames; without it they are decoded but not handed out.
            chunk_frames: minimum number of frames to decode at once; larger chunks cost less.

        Raises:
            UserError: the request failed, or was given up elsewhere.
        """
        decoder = StreamingDecoder(self.engine.lm.codec)
        done = 0
        try:
            start = decoder.decode(generation.request.prompt)
            if prompt and start.numel():
                yield start
            finished = False
            while not finished:
                with self._changed:
                    while not generation.finished and len(generation.frames) < done + max(1, chunk_frames):
                        self._changed.wait()
                    finished = generation.finished
                    frames = generation.frames[done:]
                if frames:
                    done += len(frames)
                    yield decoder.decode(self.engine.stream.decode(torch.tensor(frames).view(-1)))
            if generation.error is not None:
                raise generation.error
            if generation.cancelled:
                raise UserError(
                    "the service is being stopped." if self._closed else "the continuation was given up before its end."
                )
        finally:
            self.cancel(generation)

    def _run(self) -> None:
        """The engine's thread. Only this thread advances and cancels, so that it need not hold a lock meanwhile."""
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._closed or self._given_up or not self.engine.idle)
                given_up, self._given_up = self._given_up, []
                closed = self._closed
            try:
                for generation in given_up:
                    self.engine.cancel(generation)
                if closed:
                    self.engine.cancel_all()
                else:
                    self.engine.advance()
            except Exception as error:  # must reach the listeners, which wait in other threads
                with self._changed:
                    self._failure = error
                    self.engine.fail(error)
            with self._changed:
                self._changed.notify_all()
            if closed:
                return


def stream_speech(
    engine: Engine, request: Request, prompt: bool = True, chunk_frames: int = 1
) -> PythonGenerator[torch.Tensor, None, None]:
    """The speech of one request while it is being made, see :meth:`SpeechService.listen`."""
    with SpeechService(engine) as service:
        yield from service.listen(service.submit(request), prompt, chunk_frames)
