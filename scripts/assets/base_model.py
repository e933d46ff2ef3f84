"""The part `tokenizer` of the assets: a base model folder with tokenizer and config, without weights."""

import json
from pathlib import Path

import pyarrow.parquet as pq
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

BOS, EOS = "<|begin_of_text|>", "<|end_of_text|>"
VOCABULARY = 512
ROPE_THETA = 500_000.0
CONTEXT = 4096  # tokens
# Words, up to three digits, punctuation, white space: tokens do not cross these bounds.
WORD_PATTERN = r"(?i:'(?:s|t|re|ve|m|ll|d))|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+|\s+"


def build_tokenizer(output: Path) -> None:
    """`<output>/llama-small`: a byte-level BPE of 512 tokens that prepends BOS, and the config of a small Llama."""
    train = output / "speech" / "peoples_speech" / "clean" / "train-00000-of-00001.parquet"
    if not train.is_file():
        raise RuntimeError(f"{train} is not there; build the part `speech` first")
    texts = pq.read_table(train, columns=["text"]).column("text").to_pylist()
    # In both cases of letters, because librispeech_asr writes capitals.
    texts += [text.upper() for text in texts]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORD_PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[BOS, EOS],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    bos_id, eos_id = tokenizer.token_to_id(BOS), tokenizer.token_to_id(EOS)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS}:1 $B:1", special_tokens=[(BOS, bos_id)]
    )
    size = tokenizer.get_vocab_size()
    if size != VOCABULARY:
        raise RuntimeError(f"the texts gave {size} tokens instead of {VOCABULARY}")

    folder = output / "llama-small"
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": BOS, "eos_token": EOS}
    config |= {"clean_up_tokenization_spaces": False, "model_input_names": ["input_ids", "attention_mask"]}
    write_json(folder / "tokenizer_config.json", {**config, "model_max_length": CONTEXT})
    write_json(folder / "config.json", llama_config(size, bos_id, eos_id))
    print(f"tokenizer: {size} tokens under {folder}")


def llama_config(vocab_size: int, bos_id: int | None, eos_id: int | None) -> dict:
    """config.json of a Llama of 1.6M parameters, in the words of transformers 4 and of transformers 5."""
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 192, "num_hidden_layers": 4}
    config |= {"num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 32, "intermediate_size": 512}
    config |= {"hidden_act": "silu", "attention_bias": False, "mlp_bias": False, "tie_word_embeddings": True}
    config |= {"rms_norm_eps": 1e-5, "max_position_embeddings": CONTEXT, "initializer_range": 0.02}
    config |= {"rope_theta": ROPE_THETA, "rope_scaling": None}
    config |= {"rope_parameters": {"rope_type": "default", "rope_theta": ROPE_THETA}, "vocab_size": vocab_size}
    return {**config, "bos_token_id": bos_id, "eos_token_id": eos_id, "torch_dtype": "float32", "use_cache": True}


def write_json(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")
