"""Small real parts that the tests share: a Mimi codec, Llama base models and speech data sets, made once a run."""

import functools
import io
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"  # A test that needs the network is a mistake.
os.environ.setdefault("OMP_NUM_THREADS", "1")  # Of processes that tests start: two workers share two cores.

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import soundfile
import torch
import torch.distributed as dist

ROOT = Path(__file__).resolve().parent.parent
# Of the runs that the fixture ``arguments`` describes: how many steps, and after how many of them is saved.
STEPS, CUT = 6, 3
AUDIO_TYPE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
BOS, EOS = "<|begin_of_text|>", "<|end_of_text|>"
LLAMA3_SCALING = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}


# Files that take longest, in that order: what is begun last leaves the other worker idle.
LONGEST_FIRST = ("test_gpu_suite", "test_train", "test_parallel", "test_stop", "test_exactly_once", "test_checkpoint")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Long files first. (Within a file nothing changes; pytest-xdist's own order goes by the number of tests.)"""
    ranks = {name: rank for rank, name in enumerate(LONGEST_FIRST)}
    items.sort(key=lambda item: ranks.get(item.path.stem, len(ranks)))


def require_devices(ranks: int) -> None:
    """Skip a test whose ranks would each take a GPU, where there are some, but fewer."""
    if torch.cuda.is_available() and (found := torch.cuda.device_count()) < ranks:
        pytest.skip(f"{ranks} ranks take a GPU each, and there are {found}; CUDA_VISIBLE_DEVICES= runs this on the CPU")


def launch(arguments: list[str], ranks: int) -> None:
    """Run the trainer: in this process for one rank, under torchrun for several."""
    if ranks == 1:
        from torchtitan import train

        assert train.main(arguments) == 0
        return
    require_devices(ranks)
    torchrun = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={ranks}", "--master_port=0"]
    command = [*torchrun, "--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0", "-m", "torchtitan.train", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]


def figures(folder: Path) -> dict[tuple[int, str], float]:
    """Every loss, norm and rate of a run, by step and name."""
    lines = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    kept = ("loss", "grad_norm", "lr", "validation/loss", "validation/loss_q3")
    return {(line["step"], name): line[name] for line in lines for name in kept if name in line}


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory):
    os.environ["XDG_CACHE_HOME"] = str(tmp_path_factory.mktemp("cache"))  # codes of evaluation clips


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    torch.set_num_threads(1)  # The parts are too small for more to pay.


@pytest.fixture(scope="session")
def mimi_folder(tmp_path_factory) -> Path:
    """A small MimiModel: 24 kHz, 12.5 Hz, 8 codebooks of 2,048 random entries.

    The weights and layer scales of its transformers are raised, so that codes depend on what is attended to.
    """
    from transformers import MimiConfig, MimiModel

    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = MimiConfig(
            num_filters=4,
            hidden_size=32,
            num_hidden_layers=2,
            intermediate_size=64,
            num_attention_heads=2,
            num_key_value_heads=2,
            head_dim=16,
            codebook_dim=16,
            vector_quantization_hidden_dimension=16,
            upsample_groups=32,
            num_quantizers=8,
        )
        model = MimiModel(config).eval()
        for name, module in model.named_modules():
            if hasattr(module, "embed_sum"):
                module.embed_sum.normal_()
                module._embed = None
            if "transformer" in name and isinstance(module, torch.nn.Linear):
                module.weight.data.normal_(0.0, 0.3)
            if isinstance(getattr(module, "scale", None), torch.nn.Parameter):
                module.scale.data.fill_(1.0)
    folder = tmp_path_factory.mktemp("codec") / "tiny-mimi"
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def codec(mimi_folder) -> Any:
    """The codec with 4 quantizers and the default conventions."""
    from torchtitan.audio.codec import Codec

    return Codec.load(mimi_folder, 4)


@pytest.fixture(scope="session")
def make_tokenizer() -> Callable[..., Any]:
    """A function that makes a tokenizer of the 256 bytes, BOS and EOS: ``len`` is 258, any text is 1 id a byte."""
    from tokenizers import Tokenizer, decoders, pre_tokenizers
    from tokenizers.models import BPE
    from transformers import PreTrainedTokenizerFast

    def make(bos: bool = True) -> Any:
        letters = sorted(pre_tokenizers.ByteLevel.alphabet())
        tokenizer = Tokenizer(BPE({letter: i for i, letter in enumerate(letters)}, []))
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        special = {"bos_token": BOS, "eos_token": EOS} if bos else {"eos_token": EOS}
        return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)

    return make


@pytest.fixture(scope="session")
def make_base_model(tmp_path_factory, make_tokenizer) -> Callable[..., Path]:
    """A function that makes the folder of a Llama with its tokenizer; the same arguments give the same folder.

    The weights are large enough for logits of several nats. The embedding has 272 rows, the tokenizer 258 ids.

    Args of the function:
        tied: whether head and embedding are one.
        scaled: with Llama 3.1's rope scaling.
        old_config: config.json as transformers 4 wrote it (rope_theta, rope_scaling, torch_dtype).
        dtype: of the stored weights.
        max_shard_size: stored in several files when smaller than the model.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    made: dict[tuple, Path] = {}

    def make(
        tied: bool = True,
        scaled: bool = False,
        old_config: bool = False,
        dtype: torch.dtype = torch.float32,
        max_shard_size: str = "1GB",
    ) -> Path:
        key = (tied, scaled, old_config, dtype, max_shard_size)
        if key in made:
            return made[key]
        scaling = LLAMA3_SCALING if scaled else {"rope_type": "default"}
        with torch.random.fork_rng():
            torch.manual_seed(0)
            config = LlamaConfig(
                vocab_size=272,
                hidden_size=48,
                intermediate_size=96,
                num_hidden_layers=2,
                num_attention_heads=4,
                num_key_value_heads=2,
                head_dim=16,
                max_position_embeddings=256,
                rms_norm_eps=1e-5,
                rope_parameters={"rope_theta": 5_000.0, **scaling},
                tie_word_embeddings=tied,
                initializer_range=0.2,
                bos_token_id=256,
                eos_token_id=257,
            )
            model = LlamaForCausalLM(config)
            for name, parameter in model.named_parameters():
                if "norm" in name:
                    parameter.data.uniform_(0.5, 1.5)
        folder = tmp_path_factory.mktemp("base") / "tiny-llama"
        model.to(dtype).save_pretrained(folder, max_shard_size=max_shard_size)
        make_tokenizer().save_pretrained(folder)
        if old_config:
            path = folder / "config.json"
            stored = json.loads(path.read_text())
            rope = stored.pop("rope_parameters")
            stored["rope_theta"] = rope.pop("rope_theta")
            stored["rope_scaling"] = rope if scaled else None
            stored["torch_dtype"] = stored.pop("dtype")
            path.write_text(json.dumps(stored))
        made[key] = folder
        return folder

    return make


@pytest.fixture(scope="session")
def save_speech_model(make_tokenizer) -> Callable[..., Path]:
    """A function that writes the folder of a random Llama with audio tokens, as the converter exports one.

    Args of the function:
        folder: where to write it.
        codec: folder of its codec.
        num_quantizers: Q.
        context: longest sequence of ids.
        broken: with a weight that is NaN.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    from torchtitan.audio.token_stream import extend_tokenizer

    def save(folder: Path, codec: Path, num_quantizers: int = 4, context: int = 2048, broken: bool = False) -> Path:
        tokenizer = make_tokenizer()
        stream = extend_tokenizer(tokenizer, num_quantizers)
        config = LlamaConfig(
            vocab_size=stream.vocab_size,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=context,
            initializer_range=0.3,
            bos_token_id=stream.bos_id,
            eos_token_id=stream.audio_end_id,
            num_quantizers=num_quantizers,
            audio_tokenizer=str(codec),
            codec_padding="exact",
            codec_window="codec",
        )
        with torch.random.fork_rng():
            torch.manual_seed(num_quantizers)
            model = LlamaForCausalLM(config)
        if broken:
            model.model.norm.weight.data[0] = float("nan")
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return folder

    return save


@pytest.fixture(scope="session")
def speech_model(tmp_path_factory, mimi_folder, save_speech_model) -> Callable[[int], Path]:
    """A function: number of quantizers to the folder of a small random Llama with that many, made once."""

    @functools.cache
    def make(num_quantizers: int) -> Path:
        return save_speech_model(tmp_path_factory.mktemp("llama") / f"q{num_quantizers}", mimi_folder, num_quantizers)

    return make


@pytest.fixture
def load(speech_model) -> Callable[[int], Any]:
    """A function: number of quantizers to a freshly loaded SpeechLM, which the test may change."""
    from torchtitan.checkpoint.speech_lm import SpeechLM

    return lambda num_quantizers: SpeechLM.load(str(speech_model(num_quantizers)), device="cpu")


@pytest.fixture
def lm(load) -> Any:
    return load(4)


@pytest.fixture(scope="session")
def random_codes() -> Callable[..., torch.Tensor]:
    """A function that draws codes [Q, frames]."""

    def make(num_quantizers: int, frames: int, seed: int = 1) -> torch.Tensor:
        return torch.randint(2048, (num_quantizers, frames), generator=torch.Generator().manual_seed(seed))

    return make


@pytest.fixture(scope="session")
def make_sound() -> Callable[..., bytes]:
    """A function that makes a recording: a rising tone with bursts of noise, as the bytes of a file."""

    def make(seed: int, seconds: float, rate: int = 24_000, file_format: str = "FLAC") -> bytes:
        noise = np.random.default_rng(seed)
        t = np.arange(round(seconds * rate)) / rate
        tone = 0.4 * np.sin(2 * np.pi * (120 + 40 * seed) * t * (1 + t / 2))
        bursts = 0.2 * noise.standard_normal(len(t)) * (np.sin(2 * np.pi * 3 * t) > 0.5)
        file = io.BytesIO()
        soundfile.write(file, (tone + bursts).clip(-0.99, 0.99), rate, format=file_format, subtype="PCM_16")
        return file.getvalue()

    return make


@pytest.fixture(scope="session")
def write_rows() -> Callable[..., Path]:
    """A function that writes a parquet file of speech: rows of id, audio (bytes, a struct, or None) and text."""

    def write(path: Path, rows: list[tuple[str, Any, str | None]], **columns: list) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        ids, audio, text = (list(column) for column in zip(*rows, strict=True))
        structs = [
            {"bytes": a, "path": f"{i}.flac"} if isinstance(a, bytes) else a for i, a in zip(ids, audio, strict=True)
        ]
        table = {"id": ids, "audio": pa.array(structs, AUDIO_TYPE), "text": pa.array(text, pa.string()), **columns}
        pq.write_table(pa.table(table), path)
        return path

    return write


@pytest.fixture(scope="session")
def speech_folder(tmp_path_factory, make_sound, write_rows) -> Path:
    """Synthetic speech in the public layouts: ``peoples_speech`` (3 train files of 6, 1 and 4 clips) and
    ``librispeech_asr`` (3 test clips), of different lengths, rates and, in one file, containers."""
    folder = tmp_path_factory.mktemp("speech")
    seed = 0
    for number, size in enumerate((6, 1, 4)):
        rows, durations = [], []
        for _ in range(size):
            seconds = 0.3 + 0.11 * seed
            sound = make_sound(seed, seconds, (24_000, 16_000, 44_100)[seed % 3], "WAV" if number == 1 else "FLAC")
            rows.append((f"clip-{seed}", sound, f"text {seed}"))
            durations.append(round(1000 * seconds))
            seed += 1
        path = folder / "peoples_speech" / "clean" / f"train-{number:05d}-of-00003.parquet"
        write_rows(path, rows, duration_ms=durations)
    rows = [(f"1-2-{i}", make_sound(20 + i, 0.5 + i / 4, 16_000), f"HELD OUT {i}") for i in range(3)]
    path = folder / "librispeech_asr" / "clean" / "test" / "0000.parquet"
    write_rows(path, rows, file=[f"{i}.flac" for i in range(3)], speaker_id=[1] * 3, chapter_id=[2] * 3)
    return folder


@pytest.fixture
def arguments(make_base_model, mimi_folder, speech_folder) -> Callable[..., list[str]]:
    """A function that gives the arguments of a run of :data:`STEPS` steps on small parts, with accumulation, validation
    and checkpoints.

    Args of the function:
        folder: the run is in its folder ``run``.
        ranks: on how many.
        more: further arguments.
    """

    def make(folder: Path, ranks: int = 1, *more: str) -> list[str]:
        return [
            *("--job.dump_folder", str(folder), "--job.wandb_run_name", "run"),
            *("--model.name", str(make_base_model()), "--model.audio_tokenizer", str(mimi_folder)),
            *("--training.dataset_path", str(speech_folder / "peoples_speech")),
            *("--training.steps", str(STEPS), "--training.seq_len", "128", "--training.local_batch_size", "2"),
            *("--training.global_batch_size", str(4 * ranks), "--training.mixed_precision_param", "float32"),
            *("--validation.enabled", "--validation.dataset_path", str(speech_folder / "librispeech_asr")),
            *("--validation.freq", "2", "--validation.seq_len", "128", "--validation.local_batch_size", "2"),
            *("--checkpoint.enable_checkpoint", "--checkpoint.interval", str(CUT)),
            *("--metrics.log_freq", "1", "--lr_scheduler.warmup_steps", "2", *more),
        ]

    return make


@pytest.fixture
def one_rank():
    """A process group of this process alone, for what needs one."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture(scope="session")
def write_code_shards() -> Callable[..., Path]:
    """A function that encodes sounds (bytes by name) into a set of two code shards with six quantizers."""
    from torchtitan.audio.codec import Codec
    from torchtitan.audio.waveform import load_audio
    from torchtitan.datasets.shards import Recording, merge_parts, shard_name, write_part

    def write(folder: Path, sounds: dict[str, bytes], codec: str | Path, texts: dict[str, str] | None = None) -> Path:
        folder.mkdir(parents=True, exist_ok=True)
        wider = Codec.load(codec, 6)
        header = {
            **{"format": 1, "of": 2, "num_quantizers": 6, "source": {"name": "clips"}},
            **{"codec_fingerprint": wider.fingerprint(), **wider.conventions()},
        }
        recordings = []
        for name, sound in sounds.items():
            waveform = load_audio(sound)
            codes = wider.encode([waveform])[0].T.numpy().astype(np.uint16)
            text = (texts or {}).get(name)
            recordings.append(Recording(f"clip ({name})", codes, len(waveform) / 24_000, text, "clips"))
        half = len(recordings) // 2 + 1
        for number, some in enumerate((recordings[:half], recordings[half:])):
            part = folder / "part"
            write_part(part, some, {"failed": [], "left_out": 0})
            merge_parts([part], folder / shard_name(number, 2), {**header, "shard": number, "rows": len(some)})
            part.unlink()
        return folder

    return write
