"""The folder of a codec."""

import json
import os
from pathlib import Path
from typing import Any

from torchtitan.audio.codec import published_names
from torchtitan.audio.waveform import SAMPLE_RATE


def save_codec(model: Any, folder: Path) -> None:
    """The folder that MimiModel.from_pretrained of any version loads: weights in float16, to be run in float32."""
    from safetensors.torch import save

    folder.mkdir(parents=True, exist_ok=True)
    weights = {name: value.detach().cpu().half().contiguous() for name, value in model.state_dict().items()}
    weights = published_names(weights)
    partial = folder / "model.safetensors.partial"
    partial.write_bytes(save(weights, metadata={"format": "pt"}))  # with the permissions of other files
    os.replace(partial, folder / "model.safetensors")
    config = {**model.config.to_diff_dict(), "architectures": ["MimiModel"], "dtype": "float32"}
    (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    extractor = {
        "chunk_length_s": None,
        "feature_extractor_type": "EncodecFeatureExtractor",
        "feature_size": 1,
        "overlap": None,
        "padding_side": "right",
        "padding_value": 0.0,
        "return_attention_mask": True,
        "sampling_rate": SAMPLE_RATE,
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(extractor, indent=2) + "\n")
