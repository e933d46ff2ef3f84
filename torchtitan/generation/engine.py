"""The inference engine: many continuations at once, a frame of every one at a time.

A request is a prompt (codes, text, both or neither) and how to continue it. :class:`Engine` keeps up to ``rows``
requests in a batch, each at its own position, with its own sampling and random numbers. When one ends, the next in the
queue takes its row. A request's result does not depend on the rest of the batch: each prompt is read alone, a row's
arithmetic is the same in batches of any size (on a CPU bit for bit, see linear.py), and random numbers are functions of
seed, sample and position.

The engine computes logits only for the ids that may come next: the 2,048 units of the current quantizer and, at a
frame's start, ``</audio>``. So every frame is whole and in order, and the head costs a 66th of what Llama 3's whole
vocabulary would. ``constrained=False`` draws from the whole vocabulary instead, as the original did, and keeps the
whole frames before the first broken one.

A frame is Q steps and their draws; the device sends nothing to the host in between. On CUDA a frame is one graph, and
the host reads a frame's units while the next one is being computed.

When a row has filled its context, the engine drops the older half of its frames and reads the rest again as if the
sample began there. Memory is constant, and no position exceeds those that the model was trained on.
"""

import time
from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from torchtitan.audio.token_stream import CODEBOOK_SIZE, TokenStream
from torchtitan.checkpoint.speech_lm import SpeechLM
from torchtitan.generation.linear import MIN_ROWS, make_linear
from torchtitan.generation.llama import BLOCK, CachedLlama
from torchtitan.generation.sampling import (
    MAX_WINDOW,
    Sampling,
    candidate_words,
    candidates,
    draw,
    penalize,
    position_words,
    sample_key,
)
from torchtitan.tools.errors import UserError

_NO_LIMIT = 1 << 30
# CUDA graphs that are kept, one for each number of rows, length and plan. A batch that runs full needs a handful.
MAX_GRAPHS = 32


@dataclass(frozen=True, eq=False)
class Request:
    """What to continue, and how.

    Attributes:
        prompt: codes [Q, T] (integers 0..2047); T may be 0.
        max_frames: bound of the new frames.
        text_ids: ids that stand between BOS and ``<audio>``, for models of the task ``tts``.
        sample: the sample's number, which with ``sampling.seed`` decides the random numbers.
    """

    prompt: torch.Tensor
    max_frames: int
    text_ids: tuple[int, ...] = ()
    sampling: Sampling = field(default_factory=Sampling)
    sample: int = 0


@dataclass(frozen=True)
class Continuation:
    """One sample.

    Attributes:
        codes: the new frames [Q, T] (int64, on the CPU), without the prompt's; T may be 0.
        ended: True if the model drew ``</audio>``, False if the bound came first.
        dropped: ids that were drawn but are part of no whole frame in order; 0 unless unconstrained.
    """

    codes: torch.Tensor
    ended: bool
    dropped: int = 0


class Generation:
    """A request on its way through the engine.

    Attributes:
        frames: the new frames so far, Q ids each.
        finished: nothing will be added.
        ended: the model drew ``</audio>``.
        cancelled: it was given up by :meth:`Engine.cancel`.
        error: why it failed, if it did.
        started, first_frame: ``time.perf_counter()`` when its prompt was read, and when its first frame arrived.
    """

    def __init__(self, request: Request):
        self.request = request
        self.frames: list[list[int]] = []
        self.finished = self.ended = self.cancelled = False
        self.error: UserError | None = None
        self.started = self.first_frame = 0.0
        self.launched = 0  # frames that the device was asked for
        self.length = 0  # ids in its row


class Plan(NamedTuple):
    """What the rows of a batch need for sampling. A CUDA graph depends on it and on the shapes, and on nothing else."""

    most: int | None  # the largest top_k, rounded up to a power of two, so that few plans differ in it
    top_k: bool
    top_p: bool
    penalty: bool
    draws: bool  # some row has a temperature
    greedy: bool  # some row has none


class Engine:
    """Runs requests on one model.

    Args:
        lm: the model.
        rows: how many are decoded together at most.
        context: ids that a row may have before its older half is dropped; at most the model's context.
        int8: the weights of blocks and head in 8 bits (bf16 activations).
        constrained: draw only what keeps frames whole.
        compile_layers: torch.compile the model's blocks.
        consume: take the weights over from ``lm.model``, which cannot be used afterwards.

    Raises:
        UserError: the model is no Llama, or a value is out of range.
    """

    def __init__(
        self,
        lm: SpeechLM,
        rows: int = 1,
        context: int | None = None,
        int8: bool = False,
        constrained: bool = True,
        compile_layers: bool = False,
        consume: bool = False,
    ):
        config = lm.model.config
        if config.model_type != "llama":
            raise UserError(f"{lm.name}: a Llama is needed, this is a {config.model_type} model.")
        if rows < 1:
            raise UserError(f"the number of continuations at once must be 1 or more, not {rows}.")
        context = lm.max_length if context is None else context
        if context > lm.max_length:
            raise UserError(f"{lm.name}: its context holds {lm.max_length:,} ids, not {context:,}.")
        self.lm, self.stream, self.device = lm, lm.stream, lm.device
        self.rows, self.context, self.constrained = rows, context, constrained
        size = max(rows, MIN_ROWS if self.device.type == "cpu" else 1)
        with torch.inference_mode():
            self.heads = _heads(lm, constrained, int8)
            self.llama = CachedLlama(lm.model, size, context, int8, not compile_layers, consume)
            if compile_layers:
                for layer in self.llama.layers:
                    layer.compile(fullgraph=True)
            self._allocate(size, lm.model.dtype)
        self.dtype = "int8" if int8 else str(lm.model.dtype).removeprefix("torch.")
        self._queue: deque[Generation] = deque()
        self._active: list[Generation] = []  # in the order of their rows
        self._pending: deque[tuple[list[Generation], torch.Tensor, Any]] = deque()
        self._plan: Plan | None = None
        self._graphs: OrderedDict[tuple[int, int, Plan], Any] = OrderedDict()  # by last use
        self._pool: Any = None
        self._cuda_stream: torch.cuda.Stream | None = None  # for rehearsals

    def _allocate(self, rows: int, dtype: torch.dtype) -> None:
        """The state of the rows, in tensors that keep their addresses, as CUDA graphs require."""
        device, num_quantizers = self.device, self.stream.num_quantizers

        def zeros(*shape: int, dtype: torch.dtype = torch.int64) -> torch.Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        self._hidden = zeros(rows, self.llama.embedding.shape[1], dtype=dtype)
        self._frame_numbers = zeros(rows)
        self._keys = zeros(rows, 2)
        self._temperature = zeros(rows, dtype=torch.float32)
        self._top_k = zeros(rows)
        self._top_p = zeros(rows, dtype=torch.float32)
        self._penalty = zeros(rows, dtype=torch.float32)
        self._window = zeros(rows)
        # Candidates of the last frames, by frame number modulo MAX_WINDOW.
        self._history = zeros(rows, num_quantizers, MAX_WINDOW)
        self._history_frames = zeros(rows)  # frames of prompt and continuation
        self._output = zeros(rows, num_quantizers + 2)
        size = CODEBOOK_SIZE + 1 if self.constrained else self.stream.vocab_size
        self._noise = candidate_words(size, device)
        self._state = [
            *(self._hidden, self._frame_numbers, self._keys, self._temperature, self._top_k, self._top_p),
            *(self._penalty, self._window, self._history, self._history_frames),
        ]

    # Requests

    def submit(self, request: Request) -> Generation:
        """Queue a request.

        Raises:
            UserError: its prompt leaves no room for a frame in the context, or ``max_frames`` is not positive.
            ValueError: codes out of range.
        """
        prompt, num_quantizers = request.prompt, self.stream.num_quantizers
        if prompt.dim() != 2 or prompt.shape[0] != num_quantizers:
            raise ValueError(f"codes must be [{num_quantizers}, T], not {list(prompt.shape)}")
        if prompt.numel() and not 0 <= int(prompt.min()) <= int(prompt.max()) < CODEBOOK_SIZE:
            raise ValueError(f"codes must be 0 to {CODEBOOK_SIZE - 1}")
        if request.max_frames < 1:
            raise UserError(f"at least one new frame must be asked for, not {request.max_frames}.")
        length = self.stream.sample_length(prompt.shape[1], len(request.text_ids), end=False)
        if length + num_quantizers > self.context:
            raise UserError(
                f"the prompt has {length:,} ids and leaves no room for a frame of {num_quantizers} in a context of "
                f"{self.context:,}; shorten it."
            )
        generation = Generation(request)
        self._queue.append(generation)
        return generation

    def cancel(self, generation: Generation) -> None:
        """Give a request up, if it is not finished; its frames stay."""
        if generation.finished:
            return
        if generation in self._queue:
            self._queue.remove(generation)
        generation.cancelled = True
        self._finish(generation)

    def cancel_all(self) -> None:
        """Give up everything that is not finished."""
        for generation in self._unfinished():
            self.cancel(generation)

    def fail(self, error: Exception) -> None:
        """Give all requests up after an error from which the engine cannot recover."""
        for generation in self._unfinished():
            generation.error = UserError(f"{self.lm.name}: generation failed ({type(error).__name__}: {error}).")
            generation.finished = True
        self._queue.clear()
        self._active.clear()
        self._pending.clear()
        self._plan = None

    def _unfinished(self) -> list[Generation]:
        launched = [generation for generations, _, _ in self._pending for generation in generations]
        found = dict.fromkeys([*self._queue, *self._active, *launched])
        return [generation for generation in found if not generation.finished]

    @property
    def idle(self) -> bool:
        """Whether nothing is left to do."""
        return not (self._queue or self._active or self._pending)

    def generate(self, requests: Sequence[Request], on_frame: Callable[[], object] | None = None) -> list[Continuation]:
        """Run requests to their end.

        Args:
            on_frame: called after each frame of the batch.

        Raises:
            UserError: as :meth:`submit`, or logits that are not finite.
        """
        generations = [self.submit(request) for request in requests]
        try:
            while not all(generation.finished for generation in generations):
                self.advance()
                if on_frame is not None:
                    on_frame()
        finally:
            for generation in generations:
                self.cancel(generation)
        for generation in generations:
            if generation.error is not None:
                raise generation.error
        return [self.continuation(generation) for generation in generations]

    def continuation(self, generation: Generation) -> Continuation:
        """The frames of a request so far."""
        ids = torch.tensor(generation.frames, dtype=torch.int64).view(-1)
        if self.constrained:
            return Continuation(self.stream.decode(ids), generation.ended)
        if generation.ended:
            ids = ids[: (ids == self.stream.audio_end_id).nonzero()[0, 0]]
        whole = whole_frames(ids, self.stream)
        return Continuation(self.stream.decode(whole), generation.ended, ids.numel() - whole.numel())

    # One frame

    @torch.inference_mode()
    def advance(self) -> list[Generation]:
        """Compute the next frame of every request in the batch.

        Returns the requests that got a frame or finished; on CUDA the frame is the one before.
        """
        while self._queue and len(self._active) < self.rows:
            self._admit(self._queue[0])  # stays queued until it has its row, so that fail() finds it
            self._queue.popleft()
        num_quantizers = self.stream.num_quantizers
        if any(generation.length + num_quantizers > self.context for generation in self._active):
            changed = self._collect(0)
            for row, generation in enumerate(self._active):
                if generation.length + num_quantizers > self.context:
                    self._slide(row, generation)
        else:
            changed = []
        if self._active:
            self._launch()
        lag = 1 if self.device.type == "cuda" and self._active else 0
        return changed + self._collect(lag)

    def _admit(self, generation: Generation) -> None:
        """Give a request the next row and read its prompt."""
        row, request, sampling = len(self._active), generation.request, generation.request.sampling
        generation.started = time.perf_counter()
        twin = next((i for i, other in enumerate(self._active) if _same_prompt(generation, other)), None)
        if twin is not None:
            generation.length = self._active[twin].length
            self.llama.copy_row(twin, row, generation.length)
            self._hidden[row] = self._hidden[twin]
        else:
            ids = self.stream.sample(request.prompt, request.text_ids, end=False)
            generation.length = ids.numel()
            self._hidden[row] = self.llama.prefill(row, ids.to(self.device))
        self._frame_numbers[row] = 0
        self._keys[row] = torch.tensor(sample_key(sampling.seed, request.sample))
        self._temperature[row] = sampling.temperature
        self._top_k[row] = min(sampling.top_k or _NO_LIMIT, _NO_LIMIT)
        self._top_p[row] = sampling.top_p
        self._penalty[row] = sampling.repetition_penalty
        self._window[row] = sampling.repetition_window
        frames = request.prompt.shape[1]
        recent = torch.arange(max(0, frames - MAX_WINDOW), frames)
        units = request.prompt
        if not self.constrained:
            units = self.stream.encode(units).view(frames, self.stream.num_quantizers).T
        self._history[row] = 0
        self._history[row, :, recent % MAX_WINDOW] = units[:, recent].to(self.device)
        self._history_frames[row] = frames
        self._active.append(generation)
        self._plan = None

    def _slide(self, row: int, generation: Generation) -> None:
        """Drop the older half of a row's frames and read the others again."""
        request, num_quantizers = generation.request, self.stream.num_quantizers
        prefix = self.stream.sample(request.prompt[:, :0], request.text_ids, end=False)
        keep = max(1, (self.context - prefix.numel()) // num_quantizers // 2)
        made = torch.tensor(generation.frames[-keep:], dtype=torch.int64).view(-1)
        units = torch.cat([self.stream.encode(request.prompt), made])
        ids = torch.cat([prefix, units[-keep * num_quantizers :]])
        if ids.numel() + num_quantizers > self.context:
            ids = prefix
        generation.length = ids.numel()
        self._hidden[row] = self.llama.prefill(row, ids.to(self.device))

    def _launch(self) -> None:
        """Start the computation of a frame of every active row."""
        active, num_quantizers = len(self._active), self.stream.num_quantizers
        if self._plan is None:
            self._plan = _plan([generation.request.sampling for generation in self._active])
        length = max(generation.length for generation in self._active) + num_quantizers
        cuda = self.device.type == "cuda"
        if cuda:  # powers of two, since each shape is captured
            rows = min(1 << (active - 1).bit_length(), self._hidden.shape[0])
            length = 1 << (length - 1).bit_length()
        else:
            rows = max(active, MIN_ROWS)
        length = min(-(-length // BLOCK) * BLOCK, self.llama.capacity)
        if rows > active:  # rows without a request need a valid position
            self.llama.positions[active:rows] = 0
        if cuda:
            with torch.cuda.device(self.device):
                self._replay(rows, length, self._plan)
                units = torch.empty(active, num_quantizers + 2, dtype=torch.int64, pin_memory=True)
                units.copy_(self._output[:active], non_blocking=True)
                event = torch.cuda.Event()
                event.record()
        else:
            self._frame(rows, length, self._plan)
            units, event = self._output[:active].cpu().clone(), None
        self._pending.append((list(self._active), units, event))
        for generation in self._active:
            generation.launched += 1
            generation.length += num_quantizers
        for generation in [each for each in self._active if each.launched == each.request.max_frames]:
            self._release(generation)

    def _frame(self, rows: int, length: int, plan: Plan) -> None:
        """Draw a frame of the first ``rows`` rows, into ``_output`` [rows, Q + 2]: ids, whether ended, broken."""
        stream, num_quantizers = self.stream, self.stream.num_quantizers
        hidden, temperature, output = self._hidden[:rows], self._temperature[:rows], self._output[:rows]
        numbers = self._frame_numbers[:rows, None] * num_quantizers
        words = position_words(self._keys[:rows], numbers + torch.arange(num_quantizers, device=self.device))
        ended = torch.zeros(rows, dtype=torch.bool, device=self.device)
        broken = torch.zeros_like(ended)
        place = (self._history_frames[:rows] % MAX_WINDOW)[:, None]
        for quantizer in range(num_quantizers):
            logits = self._logits(hidden, quantizer)
            broken = broken | (~torch.isfinite(logits.sum(dim=1)) & ~ended)
            if plan.penalty:
                logits = penalize(logits, self._seen(rows, quantizer, logits.shape[1]), self._penalty[:rows])
            choice = logits.argmax(dim=1) if plan.greedy else None
            if plan.draws:
                values, indices = candidates(
                    logits,
                    temperature,
                    self._top_k[:rows] if plan.top_k else None,
                    self._top_p[:rows] if plan.top_p else None,
                    plan.most,
                )
                drawn = draw(values, indices, temperature, words[:, quantizer], self._noise)
                choice = drawn if choice is None else torch.where(temperature == 0, choice, drawn)
            assert choice is not None
            if not self.constrained:
                ended = ended | (choice == stream.audio_end_id)
                ids = choice
            else:
                if quantizer == 0:
                    ended = choice == CODEBOOK_SIZE
                    # A row that has ended continues with any unit, which is never read, so that shapes stay.
                    choice = choice.clamp(max=CODEBOOK_SIZE - 1)
                ids = stream.base_size + choice * num_quantizers + quantizer
            output[:, quantizer] = ids
            self._history[:rows, quantizer].scatter_(1, place, choice[:, None])
            hidden = self.llama.step(ids, length)
        self._hidden[:rows] = hidden
        self._frame_numbers[:rows] += 1
        self._history_frames[:rows] += 1
        output[:, num_quantizers] = ended
        output[:, num_quantizers + 1] = broken

    def _logits(self, hidden: torch.Tensor, quantizer: int) -> torch.Tensor:
        """Float32 logits of what can come next: [n, 2049] at a frame's start, ``</audio>`` last, else [n, 2048]."""
        if not self.constrained:
            return self.heads[0](hidden)[:, : self.stream.vocab_size].float()
        return self.heads[quantizer](hidden)[:, : CODEBOOK_SIZE + (quantizer == 0)].float()

    def _seen(self, rows: int, quantizer: int, size: int) -> torch.Tensor:
        """Which candidates a quantizer had in each row's window, bool [rows, size]."""
        age = (self._history_frames[:rows, None] - 1 - torch.arange(MAX_WINDOW, device=self.device)) % MAX_WINDOW
        within = (age < self._window[:rows, None]) & (age < self._history_frames[:rows, None])
        units = torch.where(within, self._history[:rows, quantizer], size)
        seen = torch.zeros(rows, size + 1, dtype=torch.bool, device=self.device)
        return seen.scatter_(1, units, True)[:, :size]

    def _replay(self, rows: int, length: int, plan: Plan) -> None:
        """Run :meth:`_frame` as a CUDA graph, which is captured where none is kept."""
        key = (rows, length, plan)
        if key not in self._graphs:
            if len(self._graphs) >= MAX_GRAPHS:
                self._graphs.popitem(last=False)
            self._graphs[key] = self._capture(*key)
        self._graphs.move_to_end(key)
        self._graphs[key].replay()

    def _capture(self, rows: int, length: int, plan: Plan) -> Any:
        """A CUDA graph of :meth:`_frame`."""
        # A graph that was dropped for this one may still be running, and this one takes over its memory.
        torch.cuda.synchronize(self.device)
        # One for all captures, since libraries keep a workspace for each CUDA stream.
        self._cuda_stream = self._cuda_stream or torch.cuda.Stream(self.device)
        with torch.cuda.stream(self._cuda_stream):
            self._rehearse(rows, length, plan)
        torch.cuda.current_stream(self.device).wait_stream(self._cuda_stream)
        graph = torch.cuda.CUDAGraph()
        # Other threads may call CUDA meanwhile, to decode; the graph must not contain their calls.
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            self._frame(rows, length, plan)
        self._pool = self._pool or graph.pool()
        return graph

    def _rehearse(self, rows: int, length: int, plan: Plan) -> None:
        """Run :meth:`_frame` twice and undo it, so that libraries and compiled code are set up before a capture."""
        state = [*self._state, self.llama.positions, self.llama.mask]
        saved = [tensor.clone() for tensor in state]
        for _ in range(2):
            self._frame(rows, length, plan)
            for tensor, before in zip(state, saved, strict=True):
                tensor.copy_(before)

    def _collect(self, lag: int) -> list[Generation]:
        """Give the requests their computed frames, except the last ``lag`` that were launched."""
        changed = []
        while len(self._pending) > lag:
            generations, units, event = self._pending.popleft()
            if event is not None:
                event.synchronize()
            now = time.perf_counter()
            for generation, (*ids, ended, broken) in zip(generations, units.tolist(), strict=True):
                if generation.finished:
                    continue
                changed.append(generation)
                if broken:
                    generation.error = _not_finite(self.lm, self.dtype)
                elif not (ended and self.constrained):
                    generation.frames.append(ids)
                    generation.first_frame = generation.first_frame or now
                generation.ended = bool(ended) and not broken
                if ended or broken or len(generation.frames) == generation.request.max_frames:
                    self._finish(generation)
        return changed

    def _finish(self, generation: Generation) -> None:
        generation.finished = True
        if generation in self._active:
            self._release(generation)

    def _release(self, generation: Generation) -> None:
        """Free a request's row; the last active one moves into it."""
        row, last = self._active.index(generation), len(self._active) - 1
        if row != last:
            with torch.inference_mode():
                self.llama.copy_row(last, row, self._active[last].length)
                for tensor in self._state:
                    tensor[row] = tensor[last]
            self._active[row] = self._active[last]
        self._active.pop()
        self._plan = None


def whole_frames(ids: torch.Tensor, stream: TokenStream) -> torch.Tensor:
    """The ids [n * Q] of the whole frames at the start of freely drawn ones [N]; text and marks are skipped."""
    units = ids[stream.is_unit(ids)]
    frames = units[: units.numel() // stream.num_quantizers * stream.num_quantizers].view(-1, stream.num_quantizers)
    in_order = (stream.quantizer_of(frames) == torch.arange(stream.num_quantizers)).all(dim=1)
    return frames[: int(in_order.long().cumprod(dim=0).sum())].reshape(-1)


def _heads(lm: SpeechLM, constrained: bool, int8: bool) -> list[Any]:
    """The head's rows of each quantizer's candidates, padded with zeros to a multiple of 8; or the whole head."""
    stream, weight = lm.stream, lm.model.get_output_embeddings().weight
    if not constrained:
        return [make_linear(weight, int8=int8)]
    units = weight[stream.base_size : stream.audio_start_id]
    parts = [units[quantizer :: stream.num_quantizers] for quantizer in range(stream.num_quantizers)]
    end = weight[stream.audio_end_id : stream.audio_end_id + 1]
    parts[0] = torch.cat([parts[0], end, end.new_zeros(7, end.shape[1])])
    return [make_linear(part.contiguous(), int8=int8) for part in parts]


def _plan(samplings: list[Sampling]) -> Plan:
    """What the rows of a batch need."""
    drawing = [sampling for sampling in samplings if sampling.temperature > 0]
    limits = [sampling.top_k for sampling in drawing]
    known = [limit for limit in limits if limit is not None]
    return Plan(
        most=1 << (max(known) - 1).bit_length() if known and len(known) == len(limits) else None,
        top_k=bool(known),
        top_p=any(sampling.top_p < 1 for sampling in drawing),
        penalty=any(sampling.repetition_penalty != 1 for sampling in samplings),
        draws=bool(drawing),
        greedy=len(drawing) < len(samplings),
    )


def _same_prompt(generation: Generation, other: Generation) -> bool:
    """Whether a request's row can be copied from that of another, for which no frame has been launched yet."""
    mine, theirs = generation.request, other.request
    return other.launched == 0 and mine.text_ids == theirs.text_ids and torch.equal(mine.prompt, theirs.prompt)


def _not_finite(lm: SpeechLM, dtype: str) -> UserError:
    hint = "its weights are damaged" if dtype == "float32" else "try --dtype float32"
    return UserError(f"{lm.name}: the model gives logits that are not finite numbers in {dtype}; {hint}.")
