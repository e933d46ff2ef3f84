"""Speech continuations: the engine, and the functions that need no engine at hand.

sampling.py   candidates and draws
linear.py     linear layers for few rows
llama.py      the Llama with a static cache, one position a step
engine.py     requests, batches, frames
speech.py     waveforms in, waveforms out, also while they are made
"""

from torchtitan.generation.engine import Continuation, Engine, Generation, Request
from torchtitan.generation.sampling import Sampling
from torchtitan.generation.speech import (
    BATCH_ROWS,
    DEFAULT_MAX_IDS,
    SpeechService,
    continue_codes,
    frame_bound,
    require_room,
    sample_requests,
    stream_speech,
    text_prompt,
)

__all__ = [
    "BATCH_ROWS",
    "DEFAULT_MAX_IDS",
    "Continuation",
    "Engine",
    "Generation",
    "Request",
    "Sampling",
    "SpeechService",
    "continue_codes",
    "frame_bound",
    "require_room",
    "sample_requests",
    "stream_speech",
    "text_prompt",
]
