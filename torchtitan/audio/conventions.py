"""What the codes of a recording depend on besides the codec's weights, as a model's config.json states it."""

from typing import Any

from torchtitan.audio.waveform import recorded_resampler

# The published checkpoints: kyutai/mimi through a transformers version that attended over the whole clip.
PUBLISHED_CONVENTIONS = {
    "audio_tokenizer": "kyutai/mimi",
    "codec_padding": "exact",
    "codec_window": "full",
    "resampler": "torchaudio",
}


def conventions_of(config: dict[str, Any]) -> dict[str, str]:
    """The codec's name and conventions that a config.json states, or those of the published checkpoints."""
    known = {key: config.get(key) or default for key, default in PUBLISHED_CONVENTIONS.items()}
    return {**known, "resampler": recorded_resampler(known["resampler"])}
