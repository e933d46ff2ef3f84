"""Export a trained model in Hugging Face format, which transformers 4.53 and 5 can read."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from torchtitan import __version__
from torchtitan.audio.token_stream import TokenStream
from torchtitan.checkpoint.manager import HF_FOLDER, find_checkpoint, load_full_parameters, read_state
from torchtitan.config.job_config import Model
from torchtitan.models.llama3.args import Llama3Args
from torchtitan.models.llama3.weights import to_hf_tensors
from torchtitan.tools.errors import UserError

MAX_SHARD_BYTES = 5 * 10**9


def export_checkpoint(checkpoint: Path, output: Path, dtype: torch.dtype) -> Path:
    """Write a checkpoint in Hugging Face format. The output folder appears when it is complete.

    Raises:
        UserError: the checkpoint is incomplete or damaged, or the output folder is not empty.
    """
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UserError(f"{output}: it already exists; give another --output or remove it.")
    step = find_checkpoint(checkpoint)
    state = read_state(step)
    if not (step / HF_FOLDER).is_dir():
        raise UserError(f"{step}: its folder {HF_FOLDER}/ with config.json and tokenizer is missing.")
    partial = output.with_name(output.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    shutil.copytree(step / HF_FOLDER, partial)
    write_weights(partial, Llama3Args(**state["model_args"]), load_full_parameters(step), dtype)
    write_model_card(partial, state, output.name)
    if output.exists():
        output.rmdir()
    partial.rename(output)
    return output


def full_hf_tensors(checkpoint: Path, dtype: torch.dtype) -> Iterator[tuple[str, torch.Tensor]]:
    """All weights of a step folder, under their names in transformers.

    Raises:
        UserError: the checkpoint is damaged or not to be trusted.
    """
    args = Llama3Args(**read_state(checkpoint)["model_args"])
    yield from to_hf_tensors(args, load_full_parameters(checkpoint), dtype)


def write_hf_files(folder: Path, args: Llama3Args, tokenizer: Any, stream: TokenStream, config: Model) -> None:
    """Write everything except the weights: config.json, generation_config.json and the tokenizer."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save_pretrained(folder)
    _suit_every_version(folder)
    token_ids = {"bos_token_id": stream.bos_id, "eos_token_id": stream.audio_end_id}
    hf_config = {
        **args.to_hf(),
        **token_ids,
        "num_quantizers": stream.num_quantizers,
        "audio_tokenizer": absolute_if_local(config.audio_tokenizer),
        "codec_padding": config.codec_padding,
        "codec_window": config.codec_window,
        "resampler": config.resampler,
    }
    _write_json(folder / "config.json", hf_config)
    sampling = {"do_sample": True, "temperature": 0.8, "top_k": 30}
    _write_json(folder / "generation_config.json", {**token_ids, **sampling})


def write_weights(folder: Path, args: Llama3Args, state: dict[str, torch.Tensor], dtype: torch.dtype) -> None:
    """Write parameters (under our names) as safetensors of at most 5 GB each, and their dtype into config.json."""
    from huggingface_hub import split_torch_state_dict_into_shards
    from safetensors.torch import save_file

    tensors = dict(to_hf_tensors(args, state, dtype))
    split = split_torch_state_dict_into_shards(tensors, max_shard_size=MAX_SHARD_BYTES)
    for file, names in split.filename_to_tensors.items():
        save_file({name: tensors[name] for name in names}, folder / file, metadata={"format": "pt"})
        # safetensors makes files that only their owner can read.
        (folder / file).chmod((folder / "config.json").stat().st_mode)
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        _write_json(folder / "model.safetensors.index.json", index)
    config = json.loads((folder / "config.json").read_text())
    config["dtype"] = config["torch_dtype"] = str(dtype).removeprefix("torch.")
    _write_json(folder / "config.json", config)


def write_model_card(folder: Path, state: dict[str, Any], title: str) -> None:
    """Write README.md from a checkpoint's train_state.json."""
    config, args = state["config"], Llama3Args(**state["model_args"])
    model, training, validation = config["model"], config["training"], state.get("validation")
    tables = training.get("source") or []
    data = ", ".join(str(table.get("name") or table.get("path")) for table in tables) or training["dataset"]
    rows = {
        "Base model": model["name"] + ("" if model["pretrained"] else " (architecture only, random start)"),
        "Parameters": f"{args.num_params:,}",
        "Quantizers (Q)": model["num_quantizers"],
        "Codec": f"{model['audio_tokenizer']} (padding {model['codec_padding']}, window {model['codec_window']})",
        "Resampler": model["resampler"],
        "Data": f"{data}, task {training['task']}",
        "Step": f"{state['step']:,} of {training['steps']:,}",
        "Tokens seen": f"{state['tokens_seen']:,}",
    }
    if validation:
        rows["Validation loss"] = f"{validation['loss']:.4f} nats a token on {config['validation']['dataset']}"
    table = "\n".join(f"| {name} | {value} |" for name, value in rows.items())
    (folder / "README.md").write_text(
        f"""---
library_name: transformers
pipeline_tag: audio-to-audio
tags:
- speech-language-model
- mimi
---

# {title}

A flat speech language model: Mimi codes, semantic and acoustic interleaved, as tokens of a Llama. A sample is BOS,
`<audio>`, the {model["num_quantizers"]} codes of each 80 ms frame side by side as `<code_quantizer>`, `</audio>`.

| | |
| --- | --- |
{table}

Continue a spoken prompt with `python inference.py --model_name FOLDER --prompt FILE`, or load the model with
`AutoModelForCausalLM` and `AutoTokenizer`. Written by torchtitan (Llama-Mimi) {__version__}.
"""
    )


def absolute_if_local(name: str) -> str:
    """The absolute path of a local folder, which is valid in any working directory. Hub names stay as they are."""
    path = Path(name).expanduser()
    return str(path.resolve()) if path.is_dir() else name


def _suit_every_version(folder: Path) -> None:
    """Rewrite the tokenizer's config for all versions of transformers. Version 4.53 cannot read the name of the class
    and the list of further special tokens that version 5 writes."""
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text())
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    if isinstance(config.get("extra_special_tokens"), list):
        config["additional_special_tokens"] = config.pop("extra_special_tokens")
    for key in ("is_local", "local_files_only"):  # facts of this machine, not of the tokenizer
        config.pop(key, None)
    _write_json(path, config)


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n")
