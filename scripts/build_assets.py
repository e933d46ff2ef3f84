"""Build the embedded default assets: synthetic speech, a small base model folder without weights, a small Mimi codec.

With what this writes, training, inference and the evaluations run in minutes on a CPU, without a network. Three parts:

- `speech` speaks made-up texts with espeak-ng in five voices and packs them in the layouts of the public data sets
  (MLCommons/peoples_speech, openslr/librispeech_asr, slprl/SALMon, speed/sWUGGY and its siblings), as Opus at 16 kHz.
  About 2 minutes.
- `tokenizer` trains a byte-level BPE on the training texts and writes the config of a small Llama beside it. 1 s.
- `codec` trains a small transformers MimiModel on freshly synthesised speech of other texts and many voices. About
  20 minutes on one thread. The encoder is trained by regression, not as an autoencoder (see `train_encoder`), so that
  the codes of so small a codec are smooth enough in time for a language model of the same size to learn.

`all` does the three in this order; `measure` prints what the codec's codes look like on a data folder. espeak-ng
(Debian package espeak-ng) is needed only here: nothing in training, inference or evaluation calls it. Everything is
seeded; the same seed, machine and library versions give the same texts, waveforms and weights.
"""

from __future__ import annotations

import argparse
import io
import json
import math
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import soundfile
import torch
import torch.nn.functional as F
import torchaudio
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM, MimiConfig, MimiModel

ESPEAK_RATE = 22_050
STORED_RATE = 16_000
CODEC_RATE = 24_000
FRAME = 1_920  # samples of 24 kHz in a frame: 12.5 frames per second


# --------------------------------------------------------------------------------------------------------------------
# Speech synthesis


@dataclass(frozen=True)
class Voice:
    """One espeak-ng voice: `variant` is its name there, `pitch` 0..99, `speed` in words per minute."""

    name: str
    variant: str
    gender: str
    pitch: int
    speed: int


@dataclass(frozen=True)
class Style:
    """A way of speaking: what is added to a voice's pitch, and what its speed is multiplied with."""

    pitch: int = 0
    speed: float = 1.0


VOICES = (
    Voice("anna", "en-us+f2", "female", 62, 165),
    Voice("ben", "en-us+m3", "male", 42, 160),
    Voice("clara", "en-gb+f5", "female", 78, 180),
    Voice("david", "en-gb+m7", "male", 22, 150),
    Voice("eric", "en-us+klatt4", "male", 50, 170),
)
STYLES = {"neutral": Style(), "sad": Style(-14, 0.86), "happy": Style(16, 1.14)}


def speak(text: str, variant: str, pitch: int, speed: int) -> np.ndarray:
    """The text spoken by espeak-ng: float32 mono at 22,050 Hz, silence at both ends cut to 50 ms.

    Raises RuntimeError if espeak-ng is missing or refuses.
    """
    if shutil.which("espeak-ng") is None:
        raise RuntimeError("espeak-ng is not installed; rebuilding the assets needs it (Debian: apt install espeak-ng)")
    pitch = min(max(pitch, 0), 99)
    command = ["espeak-ng", "-v", variant, "-p", str(pitch), "-s", str(speed), "--stdout", text]
    done = subprocess.run(command, capture_output=True, check=False)
    if done.returncode or len(done.stdout) <= 44:
        raise RuntimeError(f"espeak-ng could not speak with voice {variant}: {done.stderr.decode().strip()}")
    wave = np.frombuffer(done.stdout[44:], dtype="<i2").astype(np.float32) / 32768
    loud = np.flatnonzero(np.abs(wave) > 0.01 * np.abs(wave).max())
    edge = ESPEAK_RATE // 20
    return wave[max(loud[0] - edge, 0) : loud[-1] + edge]


def resample(wave: np.ndarray, source: int, target: int) -> np.ndarray:
    """The wave at another rate, by the project's one resampler."""
    return torchaudio.functional.resample(torch.from_numpy(wave.copy()), source, target).numpy()


def say(text: str, voice: Voice, style: str = "neutral", rng: random.Random | None = None) -> np.ndarray:
    """The text in one of the assets' voices: float32 mono at 16 kHz, peak 0.5. `rng` varies pitch, speed and level."""
    how = STYLES[style]
    pitch, speed, level = voice.pitch + how.pitch, voice.speed * how.speed, 0.5
    if rng is not None:
        pitch, speed, level = pitch + rng.randint(-3, 3), speed * rng.uniform(0.95, 1.05), level * rng.uniform(0.6, 1.2)
    wave = resample(speak(text, voice.variant, round(pitch), round(speed)), ESPEAK_RATE, STORED_RATE)
    return wave * (level / np.abs(wave).max())


# --------------------------------------------------------------------------------------------------------------------
# Texts


def words(text: str) -> list[str]:
    return text.split()


def phrases(text: str) -> list[str]:
    return text.split(",")


ONES = words("zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen")
ONES += words("seventeen eighteen nineteen")
TENS = words("twenty thirty forty fifty sixty seventy eighty ninety")
WEEKDAYS = words("monday tuesday wednesday thursday friday saturday sunday")
MONTHS = words("january february march april may june july august september october november december")
ORDINALS = words("first second third fourth fifth sixth seventh eighth ninth tenth eleventh twelfth")
SUBJECTS = phrases("the cat,the dog,my sister,your brother,the old man,a little girl,the teacher,our friend")
VERBS = words("sees hears finds likes follows paints carries draws")
OBJECTS = phrases("a red ball,the green house,an apple,the river,a white horse,the big tree,a warm coat,my blue book")
# What is said in a happy and in a sad way; what is said in which noise.
MOODS = {
    "happy": [
        "i am so happy today",
        "what a wonderful day",
        "we won the big game",
        "i love this lovely song",
        "this is the best news",
        "my friend is coming home",
    ],
    "sad": [
        "i am so sad today",
        "what a terrible day",
        "we lost the last game",
        "i miss my old dog",
        "this is very bad news",
        "my friend has gone away",
    ],
}
SCENES = {
    "rain": ["the rain is falling", "take your umbrella along", "the street is all wet"],
    "wind": ["the wind is blowing hard", "the storm shakes the trees", "the kite flies very high"],
    "engine": ["the engine is running", "the truck drives along", "the car needs some fuel"],
    "hum": ["the fridge is humming", "the lamp buzzes at night", "the old machine is on"],
}


def number(n: int) -> str:
    """0 <= n < 100 in words."""
    if n < 20:
        return ONES[n]
    return TENS[n // 10 - 2] + (f" {ONES[n % 10]}" if n % 10 else "")


def counting(start: int, length: int) -> list[str]:
    return [number(n) for n in range(start, start + length)]


def sentence(rng: random.Random) -> str:
    """A short structured sentence: a date, a run of weekdays, or subject, verb and object."""
    kind = rng.randrange(3)
    if kind == 0:
        return f"{rng.choice(WEEKDAYS)} the {rng.choice(ORDINALS)} of {rng.choice(MONTHS)}"
    if kind == 1:
        first, length = rng.randrange(7), rng.randint(3, 5)
        return " ".join(WEEKDAYS[(first + i) % 7] for i in range(length))
    return f"{rng.choice(SUBJECTS)} {rng.choice(VERBS)} {rng.choice(OBJECTS)}"


def split_texts(rng: random.Random) -> tuple[list[str], list[str], list[str]]:
    """Counting texts for training, counting texts held out, sentences held out. No text is in two of them."""
    texts = [" ".join(counting(start, length)) for start in range(1, 19) for length in range(4, 11)]
    rng.shuffle(texts)
    sentences: list[str] = []
    while len(sentences) < 14:
        candidate = sentence(rng)
        if candidate not in sentences and len(candidate.split()) > 3:
            sentences.append(candidate)
    return texts[28:], texts[:28], sentences


# --------------------------------------------------------------------------------------------------------------------
# Noise and rooms


def noise(kind: str, samples: int, rng: np.random.Generator) -> np.ndarray:
    """Background noise at 16 kHz, root mean square 1: rain (hiss with drops), wind (slow, low), engine, hum."""
    time_s = np.arange(samples) / STORED_RATE
    white = rng.standard_normal(samples)
    if kind == "rain":
        drops = (rng.random(samples) < 0.003) * rng.exponential(6.0, samples)
        wave = np.diff(white, prepend=0.0) * 0.5 + np.convolve(drops, np.exp(-np.arange(64) / 12), "same")
    elif kind == "wind":
        swell = 1 + 0.8 * np.sin(2 * np.pi * (0.4 * time_s + rng.random()))
        wave = np.convolve(white, np.hanning(48), "same") * swell
    elif kind == "engine":
        rate = rng.uniform(28, 40)
        wave = sum(np.sin(2 * np.pi * rate * k * time_s + rng.uniform(0, 6.28)) / k**0.5 for k in range(1, 24))
        wave = wave + np.convolve(white, np.hanning(12), "same") * 0.2
    elif kind == "hum":
        rate = rng.choice([100.0, 120.0])
        wave = sum(np.sin(2 * np.pi * rate * k * time_s + rng.uniform(0, 6.28)) / k for k in (1, 2, 3, 4, 6, 8))
        wave = wave + 0.03 * white
    else:
        raise ValueError(f"no noise is called {kind}")
    return (wave / np.sqrt(np.mean(wave**2))).astype(np.float32)


def with_noise(wave: np.ndarray, background: np.ndarray, ratio_db: float = 12.0) -> np.ndarray:
    """Speech and noise, `ratio_db` dB apart in power."""
    level = np.sqrt(np.mean(wave**2)) * 10 ** (-ratio_db / 20)
    return wave + level * background


def with_room(wave: np.ndarray, decay_s: float, rng: np.random.Generator, rate: int = STORED_RATE) -> np.ndarray:
    """Speech in a synthetic room: convolved with noise that decays by 60 dB in `decay_s`. Same length and level."""
    tail = int(decay_s * rate)
    response = rng.standard_normal(tail) * 10 ** (-3 * np.arange(tail) / tail) * 0.12
    response[0] = 1.0
    dry, tail_wave = (torch.from_numpy(samples.astype(np.float32)) for samples in (wave, response))
    wet = torchaudio.functional.fftconvolve(dry, tail_wave)
    wet = wet.numpy()[: len(wave)]
    return (wet * np.sqrt(np.mean(wave**2) / (np.mean(wet**2) + 1e-12))).astype(np.float32)


def switch(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """The first half of one clip, then the second half of another of equal length, with 30 ms of crossfade."""
    samples, fade = len(first), int(0.03 * STORED_RATE)
    ramp = np.clip((np.arange(samples) - samples // 2) / fade, 0, 1)
    return (first * (1 - ramp) + second * ramp).astype(np.float32)


# --------------------------------------------------------------------------------------------------------------------
# Data sets

AUDIO = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def encode_audio(wave: np.ndarray, path: str) -> dict[str, bytes | str]:
    """The struct that data sets hold: Opus bytes and a file name."""
    peak = np.abs(wave).max()
    buffer = io.BytesIO()
    samples = wave / max(1.0, peak / 0.95)
    soundfile.write(buffer, samples, STORED_RATE, format="OGG", subtype="OPUS", compression_level=0.985)
    return {"bytes": buffer.getvalue(), "path": path}


def write_table(path: Path, rows: list[dict], schema: list[tuple[str, pa.DataType]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows, schema=pa.schema(schema)), path, compression="zstd")


def build_train(path: Path, texts: list[str], held_out: set[str], minutes: float, rng: random.Random) -> list[str]:
    """Training speech in the layout of MLCommons/peoples_speech. Returns its texts.

    70 % counts upward; the rest are structured sentences, a third of them about a mood or a scene and spoken so.
    """
    noise_rng = np.random.default_rng(rng.randrange(2**32))
    rows: list[dict] = []
    counts = {voice.name: 0 for voice in VOICES}
    total_ms = 0
    with tqdm(total=round(minutes * 60_000), desc="train", unit="ms", unit_scale=True, mininterval=5) as bar:
        while total_ms < minutes * 60_000:
            voice, scene = rng.choice(VOICES), None
            style = rng.choice(["neutral", "neutral", "neutral", "happy", "sad"])
            if rng.random() < 0.7:
                text = rng.choice(texts)
            elif rng.random() < 0.67:
                text = sentence(rng)
            elif rng.random() < 0.5:
                style = rng.choice(list(MOODS))
                text = rng.choice(MOODS[style])
            else:
                style, scene = "neutral", rng.choice(list(SCENES))
                text = rng.choice(SCENES[scene])
            if text in held_out:
                continue
            wave = say(text, voice, style, rng)
            if not 1.4 * STORED_RATE <= len(wave) <= 5.2 * STORED_RATE:
                continue
            if scene is not None:
                wave = with_noise(wave, noise(scene, len(wave), noise_rng))
            name = f"{voice.name}/{counts[voice.name]:03d}.ogg"
            counts[voice.name] += 1
            duration_ms = round(len(wave) * 1000 / STORED_RATE)
            rows.append({"id": name, "audio": encode_audio(wave, name), "duration_ms": duration_ms, "text": text})
            total_ms += duration_ms
            bar.update(duration_ms)
    schema = [("id", pa.string()), ("audio", AUDIO), ("duration_ms", pa.int32()), ("text", pa.string())]
    write_table(path, rows, schema)
    return [row["text"] for row in rows]


def build_test(path: Path, texts: list[str], rng: random.Random) -> None:
    """Held-out utterances in the layout of openslr/librispeech_asr."""
    rows = []
    for index, text in enumerate(texts):
        speaker = index % len(VOICES)
        name = f"{speaker}-0-{index:04d}"
        audio = encode_audio(say(text, VOICES[speaker], "neutral", rng), f"{name}.ogg")
        row = {"file": f"{name}.ogg", "audio": audio, "text": text.upper()}
        rows.append({**row, "speaker_id": speaker, "chapter_id": 0, "id": name})
    schema = [("file", pa.string()), ("audio", AUDIO), ("text", pa.string())]
    schema += [("speaker_id", pa.int64()), ("chapter_id", pa.int64()), ("id", pa.string())]
    write_table(path, rows, schema)


def build_salmon(folder: Path, texts: list[str], pairs: int, rng: random.Random) -> None:
    """The eight tasks of SALMon. Positive and negative of a consistency pair share their first half."""
    noise_rng = np.random.default_rng(rng.randrange(2**32))
    women = [voice for voice in VOICES if voice.gender == "female"]
    men = [voice for voice in VOICES if voice.gender == "male"]
    domains = (("rain", "wind"), ("engine", "hum"))

    def halves(text: str, first: tuple[Voice, str], second: tuple[Voice, str]) -> np.ndarray:
        spoken = words(text)
        middle = len(spoken) // 2
        return np.concatenate([say(" ".join(spoken[:middle]), *first), say(" ".join(spoken[middle:]), *second)])

    def pair(task: str, index: int) -> tuple[np.ndarray, np.ndarray]:
        text, voice = rng.choice(texts), rng.choice(VOICES)
        plain = (voice, "neutral")
        if task == "sentiment_consistency":
            first, second = rng.sample(["happy", "sad"], 2)
            return halves(text, (voice, first), (voice, first)), halves(text, (voice, first), (voice, second))
        if task == "speaker_consistency":
            group = [other for other in VOICES if other != voice]
            return halves(text, plain, plain), halves(text, plain, (rng.choice(group), "neutral"))
        if task == "gender_consistency":
            group = men if voice.gender == "female" else women
            return halves(text, plain, plain), halves(text, plain, (rng.choice(group), "neutral"))
        if task == "sentiment_alignment":
            right, wrong = rng.sample(["happy", "sad"], 2)
            text = MOODS[right][index % len(MOODS[right])]
            return say(text, voice, right), say(text, voice, wrong)
        if task == "bg_alignment":
            right, wrong = rng.sample(list(SCENES), 2)
            wave = say(SCENES[right][index % len(SCENES[right])], voice)
            good, bad = (with_noise(wave, noise(kind, len(wave), noise_rng)) for kind in (right, wrong))
            return good, bad
        wave = say(text, voice)
        if task == "rir_consistency":
            small, large = with_room(wave, 0.12, noise_rng), with_room(wave, 0.9, noise_rng)
            return (small, switch(small, large)) if index % 2 else (large, switch(large, small))
        if task == "bg_domain_consistency":
            first, second = rng.sample(rng.choice(domains), 2)
        else:
            first, second = rng.sample(list(SCENES), 2)
        one, other = (with_noise(wave, noise(kind, len(wave), noise_rng), 8.0) for kind in (first, second))
        return one, switch(one, other)

    tasks = ["sentiment_consistency", "speaker_consistency", "gender_consistency", "bg_domain_consistency"]
    tasks += ["bg_all_consistency", "rir_consistency", "sentiment_alignment", "bg_alignment"]
    schema = [("task", pa.string()), ("ind", pa.int64()), ("positive_audio", AUDIO), ("negative_audio", AUDIO)]
    for task in tqdm(tasks, desc="SALMon"):
        rows = []
        for index in range(pairs):
            good, bad = pair(task, index)
            positive, negative = (
                encode_audio(wave, f"sample_{index}_{side}.ogg") for side, wave in enumerate((good, bad))
            )
            rows.append({"task": task, "ind": index, "positive_audio": positive, "negative_audio": negative})
        write_table(folder / task / "train-00000-of-00001.parquet", rows, schema)


NON_WORDS = {
    "seven": "vensef",
    "eleven": "nevelel",
    "twelve": "wetvel",
    "thirteen": "neerthit",
    "fourteen": "rofneet",
    "sixteen": "teexins",
    "eighteen": "neetaith",
    "nineteen": "teeninen",
    "monday": "donmay",
    "tuesday": "dusetay",
    "wednesday": "desenway",
    "thursday": "dertsay",
    "friday": "rifday",
    "saturday": "tadursay",
    "sunday": "nusday",
    "january": "nurajay",
    "march": "charm in",
    "april": "pilar",
    "september": "tembersep",
    "october": "berocto",
}


def build_pairs(folder: Path, texts: list[str], rng: random.Random) -> None:
    """sWUGGY (word or not), sBLIMP (in order or not), sStoryCloze and tStoryCloze (continued rightly or not)."""
    pair_schema = [("positive", AUDIO), ("negative", AUDIO)]

    def row(index: int, voice: Voice, positive: str, negative: str) -> dict:
        clips = (say(text, voice) for text in (positive, negative))
        positive_audio, negative_audio = (encode_audio(clip, f"{index}_{side}.ogg") for side, clip in enumerate(clips))
        return {"positive": positive_audio, "negative": negative_audio}

    rows = [row(i, VOICES[i % len(VOICES)], word, other) for i, (word, other) in enumerate(NON_WORDS.items())]
    write_table(folder / "sWUGGY" / "train-00000-of-00001.parquet", rows, pair_schema)

    rows = []
    for item, text in enumerate(texts[:5]):
        ordered = words(text)
        shuffled = ordered[:]
        while shuffled == ordered:
            rng.shuffle(shuffled)
        for voice in VOICES[:4]:
            entry = row(len(rows), voice, text, " ".join(shuffled))
            rows.append({"id": item, **entry, "voice": voice.name, "type": "counting", "subtype": f"from_{ordered[0]}"})
    schema = [("id", pa.int64()), *pair_schema, ("voice", pa.string()), ("type", pa.string()), ("subtype", pa.string())]
    write_table(folder / "sBLIMP" / "train-00000-of-00001.parquet", rows, schema)

    near, far = [], []
    for index in range(16):
        start, voice = rng.randint(1, 8), VOICES[index % len(VOICES)]
        prompt = " ".join(counting(start, 4))
        right = " ".join(counting(start + 4, 3))
        wrong_start = rng.choice([n for n in range(1, 18) if abs(n - start - 4) > 2])
        near.append(row(index, voice, f"{prompt} {right}", f"{prompt} {' '.join(counting(wrong_start, 3))}"))
        unrelated = " ".join(rng.sample(WEEKDAYS, 3))
        far.append(row(index, voice, f"{prompt} {right}", f"{prompt} {unrelated}"))
    write_table(folder / "sStoryCloze" / "train-00000-of-00001.parquet", near, pair_schema)
    write_table(folder / "tStoryCloze" / "train-00000-of-00001.parquet", far, pair_schema)


PROMPT_SECONDS = 1.28


def build_speech(output: Path, minutes: float, seed: int) -> None:
    """Everything under `<output>/speech`, and `<output>/prompt.flac`."""
    rng = random.Random(seed)
    speech = output / "speech"
    train_texts, held_counting, held_sentences = split_texts(rng)
    prompt_text = "one two three four five six"
    if prompt_text in train_texts:
        train_texts.remove(prompt_text)
    held_out = {prompt_text, *held_counting, *held_sentences}
    train_path = speech / "peoples_speech" / "clean" / "train-00000-of-00001.parquet"
    build_train(train_path, train_texts, held_out, minutes, rng)
    # 26 counting utterances and 14 sentences.
    build_test(speech / "librispeech_asr" / "clean" / "test" / "0000.parquet", held_counting[:26] + held_sentences, rng)
    long_texts = [text for text in held_counting if len(text.split()) >= 5]
    build_salmon(speech / "SALMon", long_texts, 10, rng)
    build_pairs(speech, long_texts, rng)
    # Cut off in the middle of the counting, so that there is something to continue.
    prompt = say(prompt_text, VOICES[3], "sad")[: round(PROMPT_SECONDS * STORED_RATE)]
    soundfile.write(output / "prompt.flac", prompt, STORED_RATE)
    size = sum(file.stat().st_size for file in speech.rglob("*.parquet"))
    print(f"speech: {size / 1e6:.2f} MB under {speech}")


# --------------------------------------------------------------------------------------------------------------------
# Base model folder: tokenizer and config, no weights

BOS, EOS = "<|begin_of_text|>", "<|end_of_text|>"
VOCABULARY = 512
# Words, digits by threes, punctuation, white space: pieces are never merged across these bounds.
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
    write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": BOS,
            "eos_token": EOS,
            "clean_up_tokenization_spaces": False,
            "model_input_names": ["input_ids", "attention_mask"],
            "model_max_length": 4096,
        },
    )
    write_json(folder / "config.json", llama_config(size, bos_id, eos_id))
    print(f"tokenizer: {size} tokens under {folder}")


def llama_config(vocab_size: int, bos_id: int | None, eos_id: int | None) -> dict:
    """config.json of a Llama of 1.6M parameters, in the words of transformers 4 and of transformers 5."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": 192,
        "num_hidden_layers": 4,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "intermediate_size": 512,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": True,
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 4096,
        "initializer_range": 0.02,
        "rope_theta": 500_000.0,
        "rope_scaling": None,
        "rope_parameters": {"rope_type": "default", "rope_theta": 500_000.0},
        "vocab_size": vocab_size,
        "bos_token_id": bos_id,
        "eos_token_id": eos_id,
        "torch_dtype": "float32",
        "use_cache": True,
    }


def write_json(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")


# --------------------------------------------------------------------------------------------------------------------
# Codec: what the encoder is taught

FEATURE_HOP = 240  # samples of 24 kHz between feature columns: 10 ms
MEL_BANDS = 32
CONTENT, SLOW, FAST = 16, 10, 22  # dimensions of the latent's three parts; the rest of the hidden size stays free
ACOUSTIC = SLOW + FAST
REFERENCE = ("en-us", 50)  # variant and pitch of the voice that content features are taken from
# Declared sample rates of espeak-ng's 22,050 Hz output: the others change formants, pitch and tempo together.
WARPED_RATES = (19_200, 20_000, 21_000, 22_500, 24_000, 25_600)
VARIANTS = words("m1 m2 m3 m4 m5 m6 m7 m8 f1 f2 f3 f4 f5 klatt klatt2 klatt3 klatt4 Andy Annie Alex Steph Mike Gene")


def codec_text(rng: random.Random) -> str:
    """A text for the codec's own training: numbers in no order, or a sentence of any kind."""
    kind = rng.random()
    if kind < 0.5:
        return " ".join(number(rng.randrange(10) if rng.random() < 0.6 else rng.randrange(100)) for _ in range(6))
    if kind < 0.8:
        return f"{sentence(rng)} and {sentence(rng)}"
    everything = [text for group in (*MOODS.values(), *SCENES.values()) for text in group]
    return f"{rng.choice(everything)} {rng.choice(everything)}"


def log_mel(wave: torch.Tensor, n_fft: int, hop: int, bands: int) -> torch.Tensor:
    """[..., n] at 24 kHz to mel band magnitudes [..., bands, columns], 60 Hz to 7,600 Hz, before the logarithm."""
    spectrum = torch.stft(wave, n_fft, hop, window=torch.hann_window(n_fft), return_complex=True).abs()
    return mel_filters(n_fft, bands) @ spectrum


MEL_FILTERS: dict[tuple[int, int], torch.Tensor] = {}


def mel_filters(n_fft: int, bands: int) -> torch.Tensor:
    """[bands, n_fft // 2 + 1], made once for each size."""
    if (n_fft, bands) not in MEL_FILTERS:
        filters = torchaudio.functional.melscale_fbanks(n_fft // 2 + 1, 60.0, 7600.0, bands, CODEC_RATE)
        MEL_FILTERS[n_fft, bands] = filters.T.contiguous()
    return MEL_FILTERS[n_fft, bands]


def pitch_track(wave: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Log pitch and voicing 0..1 for each 10 ms: the peak of the autocorrelation between 60 and 400 Hz."""
    n_fft = 2048
    padded = F.pad(wave, (n_fft // 2, n_fft // 2))
    windows = padded.unfold(0, n_fft, FEATURE_HOP) * torch.hann_window(n_fft)
    power = torch.fft.rfft(windows, 2 * n_fft).abs().square()
    correlation = torch.fft.irfft(power)[:, :n_fft]
    shortest, longest = CODEC_RATE // 400, CODEC_RATE // 60
    taper = 1 - torch.arange(n_fft) / n_fft
    normal = correlation / (correlation[:, :1] + 1e-3) / taper
    peak, lag = normal[:, shortest:longest].max(dim=-1)
    return torch.log(CODEC_RATE / (lag + shortest).float()), peak.clamp(0, 1)


def smooth(columns: torch.Tensor, width: int) -> torch.Tensor:
    """[bands, columns] under a moving Hann window of `width` columns."""
    window = torch.hann_window(width + 2)[1:-1]
    padded = F.pad(columns[:, None], (width // 2, width - 1 - width // 2), mode="replicate")
    return F.conv1d(padded, (window / window.sum())[None, None])[:, 0]


@dataclass
class Utterance:
    """A synthetic training clip, and its features in columns of 10 ms.

    content [bands, C]: log-mel of the same words in the reference voice, stretched to this clip's length.
    fast [2 * bands + 2, C]: own log-mel 20 ms before and after the column, voicing, pitch against the clip's.
    slow [bands + 1]: the clip's mean log-mel, and mean log pitch.
    """

    wave: torch.Tensor
    content: torch.Tensor
    fast: torch.Tensor
    slow: torch.Tensor


def make_utterance(text: str, variant: str, pitch: int, speed: int, rate: int) -> Utterance:
    own = torch.from_numpy(resample(speak(text, variant, pitch, speed), rate, CODEC_RATE))
    own = own * (0.06 / own.square().mean().sqrt())
    language = variant.split("+")[0]
    reference = torch.from_numpy(resample(speak(text, language, REFERENCE[1], speed), 22_500, CODEC_RATE))

    def features(wave: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        mel = log_mel(wave, 1024, FEATURE_HOP, MEL_BANDS)
        loud = mel.mean(0) > 0.05 * mel.mean(0).max()
        logs = torch.log(mel + 3e-3 * mel.max())
        mean = logs[:, loud].mean(1, keepdim=True)
        return logs - mean, mean[:, 0]

    own_mel, own_mean = features(own)
    reference_mel, _ = features(reference)
    columns = own_mel.shape[1]
    reference_mel = F.interpolate(reference_mel[None], columns, mode="linear", align_corners=True)[0]
    log_pitch, voicing = pitch_track(own)
    log_pitch, voicing = log_pitch[:columns], voicing[:columns]
    mean_pitch = (log_pitch * voicing).sum() / voicing.sum().clamp(min=1e-3)
    half = smooth(own_mel, 6)
    earlier, later = half.roll(2, 1), half.roll(-2, 1)
    extra = smooth(torch.stack([3 * voicing, 4 * voicing * (log_pitch - mean_pitch).clamp(-1, 1)]), 9)
    fast = torch.cat([earlier, later, extra])
    # The level is taken out of the mean: gain is a feature of its own, set when rows are made.
    slow = torch.cat([own_mean - own_mean.mean(), mean_pitch[None]])
    return Utterance(own, smooth(reference_mel, 13), fast, slow)


def make_corpus(minutes: float, seed: int) -> list[Utterance]:
    """Synthetic speech of other texts and many more voices than the assets have."""
    rng = random.Random(seed)
    corpus, seconds = [], 0.0
    with tqdm(total=round(minutes * 60), desc="codec corpus", unit="s", mininterval=5) as bar:
        while seconds < minutes * 60:
            if rng.random() < 0.4:
                voice = rng.choice(VOICES)
                variant, pitch, speed, rate = voice.variant, voice.pitch + rng.randint(-16, 18), voice.speed, 22_500
            else:
                variant = f"{rng.choice(['en-us', 'en-gb'])}+{rng.choice(VARIANTS)}"
                pitch, speed, rate = rng.randint(10, 90), 165, rng.choice(WARPED_RATES)
            speed = round(speed * rng.uniform(0.8, 1.15))
            corpus.append(make_utterance(codec_text(rng), variant, pitch, speed, rate))
            seconds += len(corpus[-1].wave) / CODEC_RATE
            bar.update(len(corpus[-1].wave) // CODEC_RATE)
    return corpus


def principal(columns: torch.Tensor, dimensions: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean [D] and basis [dimensions, D] of features [D, N], so scaled that the variances kept add to 8."""
    mean = columns.mean(1)
    values, vectors = torch.linalg.eigh(torch.cov(columns))
    order = values.argsort(descending=True)[:dimensions]
    scale = math.sqrt(8 / values[order].sum().item())
    return mean, vectors[:, order].T * scale


class Teacher:
    """Makes training rows and their targets: augmented audio [B, n], clean audio [B, n], targets [B, 48, frames]."""

    def __init__(self, corpus: list[Utterance], seed: int):
        self.corpus = corpus
        self.rng = np.random.default_rng(seed)
        self.content = principal(torch.cat([u.content for u in corpus], 1), CONTENT)
        self.fast = principal(torch.cat([u.fast for u in corpus], 1), FAST)
        slow = torch.stack([u.slow for u in corpus], 1)
        self.timbre = principal(slow[:-1], 5)
        self.pitch = (slow[-1].mean().item(), slow[-1].std().item())

    def slow_target(self, utterance: Utterance, noise_level: float, colour: float, decay: float) -> torch.Tensor:
        mean, basis = self.timbre
        timbre = 0.6 * (basis @ (utterance.slow[:-1] - mean))
        pitch = 1.6 * (utterance.slow[-1].item() - self.pitch[0]) / self.pitch[1]
        rest = [pitch, 0.0, 2.0 * noise_level - 0.4, 0.7 * colour * noise_level, 1.5 * decay - 0.2]
        return torch.cat([timbre, torch.tensor(rest)])

    def segment(self, samples: int, augment: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """One stretch of one utterance: heard [n], clean [n], targets for every 10 ms of it [48, columns]."""
        utterance = self.corpus[self.rng.integers(len(self.corpus))]
        start = FEATURE_HOP * int(self.rng.integers(max(1, (len(utterance.wave) - samples) // FEATURE_HOP)))
        clean = utterance.wave[start : start + samples]
        heard, noise_level, colour, decay = clean, 0.0, 0.0, 0.0
        if augment and self.rng.random() < 0.25:
            decay = self.rng.uniform(0.1, 0.9)
            heard = torch.from_numpy(with_room(heard.numpy(), decay, self.rng, CODEC_RATE))
        if augment and self.rng.random() < 0.45:
            noise_level, colour = self.rng.uniform(0.05, 1.0), self.rng.uniform(-1, 1)
            background = coloured_noise(len(clean), colour, self.rng)
            heard = heard + background * (0.06 * 10 ** (-(32 - 28 * noise_level) / 20))
        columns = slice(start // FEATURE_HOP, start // FEATURE_HOP + len(clean) // FEATURE_HOP + 1)
        content = self.content[1] @ (utterance.content[:, columns] - self.content[0][:, None])
        fast = self.fast[1] @ (utterance.fast[:, columns] - self.fast[0][:, None])
        slow = self.slow_target(utterance, noise_level, colour, decay)[:, None].expand(-1, content.shape[1])
        return heard, clean, torch.cat([content, slow, fast])

    def row(self, frames: int, augment: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        length = frames * FRAME
        heard, clean = torch.zeros(length), torch.zeros(length)
        target = torch.zeros(CONTENT + ACOUSTIC, length // FEATURE_HOP + 2)
        filled = 0
        while filled < length:
            share = 1.0 if self.rng.random() < 0.6 else self.rng.uniform(0.3, 0.7)
            samples = min(FEATURE_HOP * math.ceil(share * length / FEATURE_HOP), length - filled)
            one, other, columns = self.segment(samples, augment)
            end = filled + len(one) // FEATURE_HOP * FEATURE_HOP
            heard[filled:end], clean[filled:end] = one[: end - filled], other[: end - filled]
            target[:, filled // FEATURE_HOP : filled // FEATURE_HOP + columns.shape[1]] = columns[
                :, : target.shape[1] - filled // FEATURE_HOP
            ]
            filled = end
        gain = self.rng.uniform(-1, 1) if augment or self.rng.random() < 0.5 else 0.0
        heard, clean = heard * 10 ** (gain * 10 / 20), clean * 10 ** (gain * 10 / 20)
        target[CONTENT + 6] = 1.2 * gain
        if augment and self.rng.random() < 0.4:
            heard = torchaudio.functional.resample(torchaudio.functional.resample(heard, 24_000, 8_000), 8_000, 24_000)
        # The centre of frame t is its middle: column 8 t + 4.
        return heard, clean, target[:, 4 : 4 + 8 * frames : 8]

    def batch(self, rows: int, frames: int, augment: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        heard, clean, target = zip(*(self.row(frames, augment) for _ in range(rows)), strict=True)
        return torch.stack(heard), torch.stack(clean), torch.stack(target)


def coloured_noise(samples: int, colour: float, rng: np.random.Generator) -> torch.Tensor:
    """Noise of root mean square 1, from rumbling (-1) over flat (0) to hissing (1), sometimes with a steady tone."""
    spectrum = torch.fft.rfft(torch.from_numpy(rng.standard_normal(samples).astype(np.float32)))
    frequency = torch.linspace(0.002, 1, len(spectrum))
    wave = torch.fft.irfft(spectrum * frequency ** (0.9 * colour - 0.1), samples)
    wave = wave / wave.square().mean().sqrt()
    if rng.random() < 0.3:
        rate = rng.uniform(30, 200)
        time_s = torch.arange(samples) / CODEC_RATE
        tones = torch.stack([torch.sin(2 * math.pi * rate * k * time_s) / k for k in range(1, 9)]).sum(0)
        wave = (wave + 2 * tones / tones.square().mean().sqrt()) / math.sqrt(5)
    return wave


# --------------------------------------------------------------------------------------------------------------------
# Codec: model and training


def mimi_config() -> MimiConfig:
    return MimiConfig(
        hidden_size=64,
        num_filters=8,
        codebook_dim=ACOUSTIC,
        vector_quantization_hidden_dimension=ACOUSTIC,
        num_quantizers=8,
        num_semantic_quantizers=1,
        upsample_groups=64,
        num_hidden_layers=1,
        intermediate_size=256,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=16,
        layer_scale_initial_scale=0.3,
        sliding_window=250,
    )


def round_to_half(module: torch.nn.Module) -> None:
    """Give every weight a value that float16 holds, since that is how the codec is stored."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(parameter.half().float())


class Muon(torch.optim.Optimizer):
    """Momentum whose updates are made orthogonal (K. Jordan and others, 2024), a convolution taken as a matrix.

    In 200 steps it brought this encoder further than AdamW in 400. torch.optim.Muon takes matrices only.
    """

    def __init__(self, parameters: list[torch.nn.Parameter], lr: float):
        super().__init__(parameters, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                momentum = self.state[parameter].setdefault("momentum", torch.zeros_like(parameter))
                momentum.lerp_(parameter.grad, 0.05)
                update = orthogonal(parameter.grad.lerp(momentum, 0.95).flatten(1))
                scale = max(1.0, update.shape[0] / update.shape[1]) ** 0.5
                parameter.mul_(1 - 0.02 * group["lr"]).add_(update.view_as(parameter), alpha=-scale * group["lr"])


def orthogonal(matrix: torch.Tensor) -> torch.Tensor:
    """The matrix with its singular values brought near 1, by five Newton-Schulz steps."""
    x = matrix.T if matrix.shape[0] > matrix.shape[1] else matrix
    x = x / (x.norm() + 1e-7)
    for _ in range(5):
        gram = x @ x.T
        x = 3.4445 * x + (2.0315 * gram @ gram - 4.775 * gram) @ x
    return x.T if matrix.shape[0] > matrix.shape[1] else x


class Trainer:
    """Steps for the parameters of a module: Muon for matrices, AdamW for the rest, linear decay, clipped gradients."""

    def __init__(self, module: torch.nn.Module, steps: int):
        self.parameters = list(module.parameters())
        matrices = [parameter for parameter in self.parameters if parameter.ndim > 1]
        others = [parameter for parameter in self.parameters if parameter.ndim == 1]
        self.optimizers = [Muon(matrices, lr=0.02), torch.optim.AdamW(others, lr=3e-3, betas=(0.9, 0.98))]
        self.schedules = [
            torch.optim.lr_scheduler.LambdaLR(one, lambda step: min((step + 1) / 30, 1.02 - step / steps))
            for one in self.optimizers
        ]

    def step(self, loss: torch.Tensor) -> None:
        if not loss.isfinite():
            raise RuntimeError("training of the codec diverged: its loss is not finite")
        for optimizer in self.optimizers:
            optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        for part in (*self.optimizers, *self.schedules):
            part.step()


def train_encoder(model: MimiModel, teacher: Teacher, steps: int) -> None:
    """Teach the encoder to predict, from audio heard through noise, rooms and telephones, 48 features of each frame.

    The first 16 are the spectrum that the *same words have in one reference voice*: they say what is spoken, not who
    speaks. The next 10 stay the same throughout an utterance: timbre, pitch, level, noise, room. The last 22 are the
    frame's own spectrum against the utterance's. An expectation is smooth where the audio is uncertain, which is
    what keeps the codes from spelling out noise.
    """
    parts = {"content": slice(0, CONTENT), "slow": slice(CONTENT, CONTENT + SLOW), "fast": slice(CONTENT + SLOW, None)}
    samples = torch.cat([teacher.batch(6, 24, True)[2].transpose(1, 2).flatten(0, 1) for _ in range(20)])
    variance = {name: samples[:, part].var(0).sum() for name, part in parts.items()}
    encoder = model.get_submodule("encoder")
    with torch.no_grad():
        encoder.get_parameter("downsample.conv.weight").mul_(
            0.2
        )  # so that the first outputs are no larger than the targets
    trainer = Trainer(encoder, steps)
    encoder.train()
    bar = tqdm(range(steps), desc="encoder", mininterval=10)
    shown = dict.fromkeys(parts, 1.0)
    for step in bar:
        # Short rows first: more utterances in a step.
        rows, frames = (6, 24) if step < 0.7 * steps else (3, 48)
        heard, _, target = teacher.batch(rows, frames, augment=True)
        latents = encoder(heard[:, None]).latents
        losses = {
            name: (latents[:, : CONTENT + ACOUSTIC][:, part] - target[:, part]).square().mean((0, 2)).sum()
            / variance[name]
            for name, part in parts.items()
        }
        trainer.step(losses["content"] + losses["slow"] + losses["fast"])
        shown = {name: 0.97 * shown[name] + 0.03 * loss.item() for name, loss in losses.items()}
        bar.set_postfix({f"{name} error": f"{value:.3f}" for name, value in shown.items()}, refresh=False)
    encoder.eval()
    round_to_half(encoder)


def k_means(points: torch.Tensor, clusters: int, generator: torch.Generator, rounds: int = 30) -> torch.Tensor:
    """[N, D] to centroids [clusters, D]; an empty cluster starts again at a random point."""
    centroids = points[torch.randperm(len(points), generator=generator)[:clusters]].clone()
    for _ in range(rounds):
        nearest = torch.cdist(points, centroids).argmin(1)
        sums = torch.zeros_like(centroids).index_add_(0, nearest, points)
        counts = torch.bincount(nearest, minlength=clusters)
        spare = points[torch.randint(len(points), (clusters,), generator=generator)]
        centroids = torch.where(counts[:, None] > 0, sums / counts[:, None].clamp(min=1), spare)
    return centroids


def codebook(points: torch.Tensor, active: slice, clusters: int, size: int, generator: torch.Generator) -> torch.Tensor:
    """`size` distinct rows, which quantize the dimensions `active` of `points` [N, D] and are zero in the others.

    The first `clusters` rows are the centroids of speech. The others lie farther out than speech does, for sounds
    that are not speech, so that in speech the code has about `clusters` values and a language model sees each often.
    """
    inner = points[:, active]
    core = k_means(inner, clusters, generator)
    reach = torch.cdist(inner, core).min(1).values.quantile(0.999)
    outer: list[torch.Tensor] = []
    missing = size - clusters
    centre, factor = inner.mean(0), 1.5
    while missing > 0:
        picks = torch.randint(len(inner), (4 * size,), generator=generator)
        far = centre + factor * (inner[picks] - centre)
        far = far + 0.1 * inner.std(0) * torch.randn(far.shape, generator=generator)
        far = far[torch.cdist(far, core).min(1).values > 2 * reach][:missing]
        outer.append(far)
        missing -= len(far)
        factor *= 1.1
    rows = torch.zeros(size, points.shape[1])
    rows[:, active] = torch.cat([core, *outer])
    return rows.half().float()


# Which dimensions of its space each quantizer describes, and with how many centroids of speech.
SEMANTIC_PLAN = ((slice(0, CONTENT), 160),)
ACOUSTIC_PLAN = (
    (slice(0, SLOW), 96),
    (slice(SLOW, ACOUSTIC), 128),
    (slice(SLOW, ACOUSTIC), 128),
    (slice(SLOW, ACOUSTIC), 256),
    (slice(0, SLOW), 256),
    (slice(SLOW, ACOUSTIC), 256),
    (slice(SLOW, ACOUSTIC), 256),
)


@torch.no_grad()
def fill_quantizer(model: MimiModel, teacher: Teacher, seed: int) -> None:
    """Set the projections, which only pick dimensions, and the codebooks: residual k-means over latents of speech."""
    generator = torch.Generator().manual_seed(seed)
    encoder = model.get_submodule("encoder")
    latents = []
    for index in tqdm(range(100), desc="latents", mininterval=5):
        heard, _, _ = teacher.batch(6, 48, augment=index % 3 == 0)
        latents.append(encoder(heard[:, None]).latents.transpose(1, 2).flatten(0, 1))
    points = torch.cat(latents)
    halves = (
        (model.quantizer.semantic_residual_vector_quantizer, slice(0, CONTENT), SEMANTIC_PLAN),
        (model.quantizer.acoustic_residual_vector_quantizer, slice(CONTENT, CONTENT + ACOUSTIC), ACOUSTIC_PLAN),
    )
    for quantizer, part, plan in halves:
        width = part.stop - part.start
        pick = torch.zeros(ACOUSTIC, model.config.hidden_size)
        pick[:width, part] = torch.eye(width)
        quantizer.get_parameter("input_proj.weight").copy_(pick[:, :, None])
        quantizer.get_parameter("output_proj.weight").copy_(pick.T[:, :, None])
        residual = points @ pick.T
        for layer, (active, clusters) in zip(quantizer.layers, plan, strict=True):
            rows = codebook(residual, active, clusters, model.config.codebook_size, generator)
            layer.get_buffer("codebook.embed_sum").copy_(rows)
            layer.get_buffer("codebook.cluster_usage").fill_(1.0)
            vars(layer.get_submodule("codebook"))["_embed"] = None  # the cached quotient of the two
            residual = residual - rows[torch.cdist(residual, rows).argmin(1)]


def spectral_loss(made: torch.Tensor, true: torch.Tensor) -> torch.Tensor:
    """Distance of log-mel spectra at three resolutions, plus that of the magnitudes themselves."""
    loss = torch.zeros(())
    for n_fft, bands in ((512, 32), (1024, 48), (2048, 80)):
        a, b = (log_mel(wave, n_fft, n_fft // 4, bands) for wave in (made, true))
        loss = loss + (torch.log(a + 1e-2) - torch.log(b + 1e-2)).abs().mean() + (a - b).abs().mean() / b.mean()
    return loss


def train_decoder(model: MimiModel, teacher: Teacher, steps: int) -> None:
    """Teach the decoder to speak the quantized latents of the frozen encoder; half of the rows use 4 quantizers."""
    decoder = model.get_submodule("decoder")
    trainer = Trainer(decoder, steps)
    decoder.train()
    bar = tqdm(range(steps), desc="decoder", mininterval=10)
    shown = 5.0
    for step in bar:
        _, clean, _ = teacher.batch(6, 24, augment=False)
        with torch.no_grad():
            encoded: Any = model.encode(clean[:, None], num_quantizers=4 if step % 2 else 8)
            codes = encoded.audio_codes
            latents = model.quantizer.decode(codes)
        made = decoder(latents).audio_values[:, 0]
        loss = spectral_loss(made, clean)
        trainer.step(loss)
        shown = 0.97 * shown + 0.03 * loss.item()
        bar.set_postfix({"spectral loss": f"{shown:.3f}"}, refresh=False)
    decoder.eval()
    round_to_half(decoder)


def build_codec(output: Path, minutes: float, encoder_steps: int, decoder_steps: int, seed: int) -> None:
    """`<output>/mimi-small`: config.json, model.safetensors in float16, preprocessor_config.json."""
    if not hasattr(MimiModel(mimi_config()).encoder, "encoder_seanet"):
        raise RuntimeError("building the codec needs transformers 5.23 or later; running it does not")
    torch.manual_seed(seed)
    folder = output / "mimi-small"
    teacher = Teacher(make_corpus(minutes, seed + 1), seed + 2)
    model = MimiModel(mimi_config()).eval()
    train_encoder(model, teacher, encoder_steps)
    fill_quantizer(model, teacher, seed + 3)
    save_codec(model, folder)  # the codes are final from here on
    train_decoder(model, teacher, decoder_steps)
    save_codec(model, folder)
    print(f"codec: {(folder / 'model.safetensors').stat().st_size / 1e6:.2f} MB under {folder}")


def save_codec(model: MimiModel, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    model.half().save_pretrained(folder)
    model.float()
    config = json.loads((folder / "config.json").read_text())
    # Stored in half precision, but meant to run in float32.
    config["dtype"] = "float32"
    write_json(folder / "config.json", config)
    write_json(
        folder / "preprocessor_config.json",
        {
            "chunk_length_s": None,
            "feature_extractor_type": "EncodecFeatureExtractor",
            "feature_size": 1,
            "overlap": None,
            "padding_side": "right",
            "padding_value": 0.0,
            "return_attention_mask": True,
            "sampling_rate": CODEC_RATE,
        },
    )


# --------------------------------------------------------------------------------------------------------------------
# Measuring


def load_clips(paths: Iterable[Path]) -> list[torch.Tensor]:
    """The column `audio` of parquet files as waveforms at 24 kHz."""
    clips = []
    for path in paths:
        for row in pq.read_table(path, columns=["audio"]).column("audio").to_pylist():
            samples, rate = soundfile.read(io.BytesIO(row["bytes"]), dtype="float32")
            clips.append(torch.from_numpy(resample(samples, rate, CODEC_RATE)))
    return clips


@torch.no_grad()
def encode_clips(model: MimiModel, clips: list[torch.Tensor]) -> list[torch.Tensor]:
    """Codes [T, 4] of each clip by itself."""
    encoded: list[Any] = [model.encode(clip[None, None], num_quantizers=4) for clip in clips]
    return [one.audio_codes[0].T for one in encoded]


def entropies(codes: torch.Tensor) -> list[float]:
    """Entropy in nats of each quantizer's codes [N, Q]."""
    shares = [torch.bincount(column).float() / len(column) for column in codes.T]
    return [-(share[share > 0] * share[share > 0].log()).sum().item() for share in shares]


def learnability(train: list[torch.Tensor], test: list[torch.Tensor], steps: int, config: dict) -> float:
    """Loss in nats on the test codes of a small Llama trained for `steps` steps of 16 clips on the training codes."""
    base, audio = config["vocab_size"], config["vocab_size"] + 2048 * 4
    sequences, held_out = (
        [
            F.pad((base + 4 * codes + torch.arange(4)).flatten(), (2, 1), value=audio + 1)
            .index_fill(0, torch.tensor([0]), config["bos_token_id"])
            .index_fill(0, torch.tensor([1]), audio)
            for codes in group
        ]
        for group in (train, test)
    )
    model = LlamaForCausalLM(LlamaConfig(**{**config, "vocab_size": base + 2048 * 4 + 2}))
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, betas=(0.9, 0.95), weight_decay=0.1)
    decay = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min((step + 1) / 30, 1.05 - step / steps))
    for _ in tqdm(range(steps), desc="language model", mininterval=10):
        rows = [sequences[index] for index in torch.randint(len(sequences), (16,))]
        ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
        labels = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=-100)
        optimizer.zero_grad()
        model(ids, labels=labels).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        decay.step()
    with torch.no_grad():
        losses = [F.cross_entropy(model(ids[None]).logits[0, :-1], ids[1:], reduction="sum").item() for ids in held_out]
    return sum(losses) / sum(len(ids) - 1 for ids in held_out)


def measure(output: Path, speech: Path, steps: int, seed: int) -> None:
    """Print speed, entropies and learnability of the codec's codes on a folder laid out like assets/speech."""
    torch.manual_seed(seed)
    model = MimiModel.from_pretrained(output / "mimi-small", dtype=torch.float32).eval()
    train = load_clips(sorted((speech / "peoples_speech" / "clean").glob("*.parquet")))
    test = load_clips(sorted((speech / "librispeech_asr" / "clean" / "test").glob("*.parquet")))
    clip = train[0].repeat(10)[None, None, : 4 * CODEC_RATE]
    with torch.no_grad():
        model.encode(clip, num_quantizers=4)
        start = time.perf_counter()
        for _ in range(10):
            model.encode(clip, num_quantizers=4)
    print(f"encodes a clip of 4 s at {40 / (time.perf_counter() - start):.0f} x real time on one thread")
    train_codes, test_codes = encode_clips(model, train), encode_clips(model, test)
    for name, codes in (("train", torch.cat(train_codes)), ("test", torch.cat(test_codes))):
        used = [len(column.unique()) for column in codes.T]
        values = [f"{value:.2f}" for value in entropies(codes)]
        print(f"{name}: {len(codes)} frames, entropy {' '.join(values)} nats, codes in use {used}")
    mean = sum(entropies(torch.cat(test_codes))) / 4
    if steps:
        config = json.loads((output / "llama-small" / "config.json").read_text())
        loss = learnability(train_codes, test_codes, steps, config)
        print(f"language model, {steps} steps: test loss {loss:.3f}, mean entropy {mean:.3f}, {mean - loss:.3f} apart")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=["all", "speech", "tokenizer", "codec", "measure"])
    parser.add_argument("--output", type=Path, default=Path("assets"), help="folder to write to (measure: to read)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, default=26.0, help="minutes of training speech")
    parser.add_argument("--corpus-minutes", type=float, default=20.0, help="minutes that the codec is trained on")
    parser.add_argument("--encoder-steps", type=int, default=1000)
    parser.add_argument("--decoder-steps", type=int, default=800)
    parser.add_argument("--speech", type=Path, default=None, help="measure: folder of speech (default: the output's)")
    parser.add_argument("--lm-steps", type=int, default=300, help="measure: steps of the language model, 0 for none")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)  # denormal activations would slow the training of so small a network
    try:
        if args.part in ("all", "speech"):
            build_speech(args.output, args.minutes, args.seed)
        if args.part in ("all", "tokenizer"):
            build_tokenizer(args.output)
        if args.part in ("all", "codec"):
            build_codec(args.output, args.corpus_minutes, args.encoder_steps, args.decoder_steps, args.seed)
        if args.part == "measure":
            measure(args.output, args.speech or args.output / "speech", args.lm_steps, args.seed)
    except RuntimeError as error:
        sys.exit(f"build_assets: {error}")


if __name__ == "__main__":
    main()
