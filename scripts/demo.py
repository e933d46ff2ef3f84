"""A page for continuations of spoken prompts: ``uv run --extra demo python scripts/demo.py``, then open the
address that it prints.

A prompt is uploaded, recorded or the example's; its continuations are heard while the model makes them, and shown as
waveform and spectrogram. Nothing is needed from the network, and nothing that is sent is kept.
"""

import os
import signal
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import tyro

from torchtitan.checkpoint.speech_lm import SpeechLM, choose_device
from torchtitan.tools.errors import UserError, run_command
from torchtitan.tools.logging import init_logger

QUICKSTART_MODEL = "outputs/quickstart/hf/quickstart"
EXAMPLE = Path(__file__).resolve().parent.parent / "assets" / "prompt.flac"


@dataclass
class Options:
    """Serve a page on which a spoken prompt is continued."""

    model_name: str | None = None
    """The model: a hub name, or a folder in Hugging Face format. Default: the quickstart's, if it has been run."""
    audio_tokenizer: str | None = None
    """The codec: a hub name or a folder. Default: the one that the model's config.json names, else kyutai/mimi."""
    device: str | None = None
    """cpu, cuda, cuda:1, ... or mps. Default: cuda if there is one, then mps, then cpu."""
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Of the language model; the codec is always in float32. Default: bfloat16 on cuda, float32 elsewhere."""
    host: str = "127.0.0.1"
    """The address to listen on; the default is reached from this machine only."""
    allowed_hosts: list[str] = field(default_factory=list)
    """Further names under which the page is opened, such as a proxy's. The server knows its address and its machine."""
    port: int = 7860
    """The port to listen on; 0 takes a free one."""
    max_seconds: float | None = None
    """What prompt and continuation may last together. Default: what fits into 1,024 ids (20.4 s with 4 quantizers)."""
    max_requests: int = 4
    """Continuations that are made at once; further requests are turned away."""


def run(options: Options) -> None:
    """Load the model and serve until interrupted.

    Raises:
        UserError: a package or the model is missing, or the address cannot be listened on.
    """
    try:
        from torchtitan.demo.server import DemoServer
    except ModuleNotFoundError as error:
        raise UserError(f"the package {error.name} is missing; install it with `uv sync --extra demo`.") from None
    model_name, device = find_model(options.model_name), choose_device(options.device)
    init_logger()
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    lm = SpeechLM.load(model_name, options.audio_tokenizer, device, options.dtype)
    bounds = (options.max_seconds, options.max_requests)
    hosts = options.allowed_hosts
    server = DemoServer(lm, options.host, options.port, *bounds, example=EXAMPLE, allowed_hosts=hosts)
    with server:
        print(f"{lm.name} on {device}: open {server.address} in a browser; Ctrl-C ends it", flush=True)
        server.serve_forever()


def find_model(name: str | None) -> str:
    """The model that was named, or else the quickstart's.

    Raises:
        UserError: none was named and the quickstart has not been run.
    """
    if name is not None:
        return name
    if not os.path.isfile(os.path.join(QUICKSTART_MODEL, "config.json")):
        raise UserError(
            "there is no model yet: run scripts/quickstart.py, which trains a small one in a few minutes, or name one, "
            "as --model_name llm-jp/Llama-Mimi-1.3B."
        )
    return QUICKSTART_MODEL


def main() -> None:
    run(tyro.cli(Options, use_underscores=True))


if __name__ == "__main__":
    run_command(main)
