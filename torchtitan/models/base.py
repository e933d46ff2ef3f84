"""What a run starts from: a Hugging Face Llama's sizes, tokenizer and, if wanted, weights."""

import json
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torchtitan.audio.conventions import conventions_of
from torchtitan.audio.token_stream import TokenStream, extend_tokenizer
from torchtitan.config.job_config import JobConfig, Model
from torchtitan.config.keys import Refuse
from torchtitan.models.llama3.args import Llama3Args, read_config
from torchtitan.models.llama3.weights import SafetensorsFolder
from torchtitan.tools.errors import UserError, first_line
from torchtitan.tools.hub import local_copy, require_model_folder
from torchtitan.tools.logging import logger

# Values of model.flavor that stand for small models, with what they have instead of the defaults of Llama3Args.
DEBUG_SIZES: dict[str, dict[str, Any]] = {
    "debug": {},
    "debugmodel": {"n_layers": 6, "n_heads": 16, "n_kv_heads": 16, "head_dim": 16, "tied": False},
}
# What to name instead of TorchTitan's "llama3", by its flavor.
PRESETS = {
    "debugmodel": "./assets/llama-small",
    **{size: f"meta-llama/Llama-3.1-{size}" for size in ("8B", "70B", "405B")},
}


def check_flavor(config: JobConfig, refuse: Refuse) -> None:
    """Refuse a size that the model does not have by its name, and presets that only TorchTitan knows."""
    name, flavor = config.model.name, config.model.flavor
    if name == "llama3" and flavor in PRESETS:
        refuse(
            "model.name",
            f'this is a preset of TorchTitan; write model.name = "{PRESETS[flavor]}", or another Llama in Hugging Face '
            "format, model.pretrained = false to start from random weights, and no model.tokenizer_path",
        )
    if flavor in DEBUG_SIZES and config.model.pretrained:
        refuse("model.flavor", "there are no weights for it, so it needs model.pretrained = false")
    if flavor not in ("", *DEBUG_SIZES) and not re.search(rf"(?<![\d.]){flavor}", name, re.IGNORECASE):
        refuse("model.flavor", f'model.name = "{name}" is not of that size by its name; leave model.flavor empty')


@dataclass
class BaseModel:
    """A base model made ready for speech.

    Attributes:
        folder: where its files lie.
        args: sizes, the audio tokens included.
        known_vocab_size: rows of its embedding that its weights hold; the rest is new.
        tokenizer: with the audio tokens.
        hf_config: its config.json as it is.
    """

    folder: Path
    args: Llama3Args
    known_vocab_size: int
    tokenizer: Any
    stream: TokenStream
    hf_config: dict[str, Any]

    @classmethod
    def load(cls, config: Model) -> "BaseModel":
        """Read a base model by hub name or folder, extend its vocabulary, or check it if it has the audio tokens.

        Raises:
            UserError: the model is missing, is no Llama, has no tokenizer, no weights where they are wanted, or audio
                tokens for another Q.
        """
        from transformers import AutoTokenizer

        require_model_folder(config.name)
        folder = Path(local_copy(config.name, weights=config.pretrained))
        hf_config = read_config(folder)
        args = Llama3Args.from_hf(hf_config, config.name)
        try:
            source = local_copy(config.tokenizer_path, weights=False) if config.tokenizer_path else folder
            tokenizer: Any = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
        except (OSError, ValueError, KeyError) as error:
            place = config.tokenizer_path or config.name
            raise UserError(f"{place}: no tokenizer could be loaded from there ({first_line(error)}).") from None
        if config.pretrained:
            SafetensorsFolder(folder)
        known = len(tokenizer)
        stream = extend_tokenizer(tokenizer, config.num_quantizers)
        if config.flavor in DEBUG_SIZES:
            args = Llama3Args(stream.vocab_size, **DEBUG_SIZES[config.flavor])
        args = replace(args, vocab_size=len(tokenizer))
        return cls(folder, args, known, tokenizer, stream, hf_config)

    @property
    def is_speech_model(self) -> bool:
        """Whether it had the audio tokens before."""
        return self.known_vocab_size == self.args.vocab_size

    def require_same_sizes(self, folder: Path) -> None:
        """Refuse a model in Hugging Face format whose weights do not fit this one.

        Raises:
            UserError: what differs.
        """
        found, wanted = Llama3Args.from_hf(read_config(folder)).to_dict(), self.args.to_dict()
        differing = [key for key in wanted if found[key] != wanted[key] and key != "max_seq_len"]
        if differing:
            raise UserError(f"{folder}: this model differs from the configured one in {differing}.")

    def warn_of_other_conventions(self, config: Model) -> None:
        """Warn when a speech model is trained further on codes that are made in another way than before."""
        for key, before in conventions_of(self.hf_config).items():
            now = getattr(config, key)
            same = before == now or (Path(before).is_dir() and Path(before).resolve() == Path(now).resolve())
            if self.is_speech_model and not same:
                logger.warning(
                    "%s was trained with model.%s = %s, this run uses %s: their codes differ.",
                    config.name,
                    key,
                    json.dumps(before),
                    json.dumps(now),
                )
