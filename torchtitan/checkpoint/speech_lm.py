"""A trained speech language model: a Llama in Hugging Face format, its tokenizer and its codec.

What inference and the evaluations load, published checkpoints and exported ones alike. config.json says which codec
made the training codes, and how. A checkpoint that does not say gets the settings of the published ones.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from torchtitan.audio.codec import Codec
from torchtitan.audio.conventions import conventions_of
from torchtitan.audio.token_stream import TokenStream
from torchtitan.checkpoint.hf_export import full_hf_tensors
from torchtitan.checkpoint.manager import HF_FOLDER, find_checkpoint
from torchtitan.tools.errors import UserError, first_line
from torchtitan.tools.hub import SAFE, commit_of, local_copy, require_model_folder
from torchtitan.tools.logging import quiet_transformers
from torchtitan.tools.utils import DTYPES


@dataclass
class SpeechLM:
    """A loaded model, with everything that turns audio into its tokens and back.

    Attributes:
        name: hub name or folder that it was loaded from.
        model: a causal language model of transformers in eval mode, without gradients.
        stream: the token stream, with Q (``stream.num_quantizers``).
        codec: the codec with the conventions of the checkpoint, on the model's device.
        folder: folder of the weights, if they are not from the hub; for a training run, its latest checkpoint.
        revision: commit of a model from the hub.
    """

    name: str
    model: Any
    tokenizer: Any
    stream: TokenStream
    codec: Codec
    folder: Path | None = None
    revision: str | None = None

    @classmethod
    def load(
        cls,
        model_name: str,
        audio_tokenizer: str | None = None,
        device: str | torch.device | None = None,
        dtype: str | torch.dtype | None = None,
        revision: str | None = None,
        resampler: str | None = None,
    ) -> "SpeechLM":
        """Load a model by hub name or folder.

        A folder may also be a training checkpoint, unconverted, or hold some, of which the latest is taken.

        Args:
            audio_tokenizer: hub name or folder of the codec. Default: the codec in the model's config.json.
            device: default: cuda if there is one, then mps, then cpu.
            resampler: one of :data:`~torchtitan.audio.waveform.RESAMPLERS`. Default: that of the model's config.json.
            dtype: precision of the language model (the codec is always fp32). Default: bfloat16 on cuda, else float32.

        Raises:
            UserError: the model does not exist, is not a causal language model, has no audio tokens or was trained with
                another resampler; its codec cannot be loaded; or there is no such device.
        """
        from safetensors import SafetensorError
        from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

        quiet_transformers()
        device = choose_device(device)
        if isinstance(dtype, str):
            if dtype not in DTYPES:
                raise UserError(f"dtype must be one of {', '.join(DTYPES)}, not {dtype!r}.")
            dtype = DTYPES[dtype]
        if dtype is None:
            dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        checkpoint = _training_checkpoint(model_name)
        if checkpoint is None:
            require_model_folder(model_name)
        source = local_copy(model_name, revision) if checkpoint is None else str(checkpoint / HF_FOLDER)
        model: Any
        try:
            config = AutoConfig.from_pretrained(source, trust_remote_code=False)
            tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
            stream = TokenStream.from_tokenizer(tokenizer, getattr(config, "num_quantizers", None))
            if checkpoint is None:
                model = AutoModelForCausalLM.from_pretrained(source, dtype=dtype, **SAFE)
            else:
                weights = dict(full_hf_tensors(checkpoint, dtype))
                model = LlamaForCausalLM.from_pretrained(None, config=config, state_dict=weights, dtype=dtype)
        except UserError:
            raise
        except (OSError, KeyError, ValueError, SafetensorError) as error:
            raise UserError(
                f"{model_name}: no language model could be loaded from there ({first_line(error)})."
            ) from None
        rows = model.get_input_embeddings().weight.shape[0]
        if rows < stream.vocab_size:
            raise UserError(
                f"{model_name}: the model has {rows:,} embeddings, but its tokenizer has {stream.vocab_size:,} ids."
            )
        conventions = conventions_of(config.to_dict())
        trained_with = conventions["resampler"]
        if resampler is not None and getattr(config, "resampler", None) and trained_with != resampler:
            raise UserError(f"{model_name}: the model was trained with resampler {trained_with}, not {resampler}.")
        codec_name = audio_tokenizer or conventions["audio_tokenizer"]
        if codec_name.startswith((".", "/", "~")) and not Path(codec_name).expanduser().is_dir():
            raise UserError(
                f"{codec_name}: there is no such codec folder; name the model's codec with --audio_tokenizer."
            )
        codec = Codec.load(
            codec_name,
            stream.num_quantizers,
            conventions["codec_padding"],
            conventions["codec_window"],
            device,
            resampler=resampler or trained_with,
        )
        path = Path(model_name).expanduser()
        folder = checkpoint or (path if path.is_dir() else None)
        model = model.to(device).eval().requires_grad_(False)
        return cls(model_name, model, tokenizer, stream, codec, folder, commit_of(source))

    @property
    def device(self) -> torch.device:
        return self.codec.device

    @property
    def max_length(self) -> int:
        """The context of the model, in tokens."""
        return self.model.config.max_position_embeddings


def _training_checkpoint(name: str) -> Path | None:
    """The step folder of a training checkpoint or run; None for other names."""
    path = Path(name).expanduser()
    if not path.is_dir() or (path / "config.json").is_file():
        return None
    try:
        return find_checkpoint(path)
    except UserError:
        return None


def choose_device(name: str | torch.device | None = None) -> torch.device:
    """The device of a name. None stands for cuda if there is one, then mps, then cpu.

    Raises:
        UserError: the name is unknown, or there is no such device here.
    """
    if name is None:
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"device must be cpu, cuda (or cuda:N) or mps, not {name!r}.") from None
    available = {"cpu": 1, "cuda": torch.cuda.device_count(), "mps": int(torch.backends.mps.is_available())}
    if (device.index or 0) >= available.get(device.type, 0):
        raise UserError(f"device {str(name)!r} is not available on this machine; cpu always is.")
    return device
