"""Build the embedded default assets but for the codec: synthetic speech, and a small base model folder without weights.

With what this writes and the codec of scripts/train_codec.py, training, inference and the evaluations run in minutes
on a CPU, without a network. Three parts:

- `speech` speaks made-up texts with espeak-ng in six voices and packs them in the layouts of the public data sets
  (MLCommons/peoples_speech, openslr/librispeech_asr, slprl/SALMon, speed/sWUGGY and its siblings), as Opus at 16 kHz.
  3 minutes.
- `tokenizer` trains a byte-level BPE on the training texts and writes the config of a small Llama beside it. 1 s.
- `corpus` speaks more texts in more voices, for training the codec; it does not ship. Half a minute.

`all` does the first two. espeak-ng (Debian package espeak-ng) is needed only here: nothing in training, inference or
evaluation calls it. Everything is seeded; the same seed, machine and library versions give the same texts, waveforms
and tokenizer.
"""

from __future__ import annotations

import argparse
import io
import json
import random
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import soundfile
import torch
import torchaudio
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from tqdm import tqdm

ESPEAK_RATE = 22_050
STORED_RATE = 16_000


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
    Voice("fay", "en-us+f4", "female", 38, 145),
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
    """Counting texts for training, counting texts held out, sentences held out. No text is in two of them.

    Held out are half of the texts of four and of five numbers, which the minimal pairs are made of, and 12 longer ones.
    Most are long, so that a model that goes on with the first few numbers has something to say.
    """
    short = [(start, length) for start in range(1, 19) for length in (4, 5)]
    long = [(start, length) for start in range(1, 19) for length in range(6, 15)]
    rng.shuffle(long)
    held = [(start, length) for start, length in short if (start + length) % 2 == 0] + long[:12]
    train = [pair for pair in short + long if pair not in held]
    sentences: list[str] = []
    while len(sentences) < 14:
        candidate = sentence(rng)
        if candidate not in sentences and len(candidate.split()) > 3:
            sentences.append(candidate)
    train_texts, held_texts = ([" ".join(counting(*pair)) for pair in pairs] for pairs in (train, held))
    return train_texts, held_texts, sentences


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
CORPUS_SCHEMA = [("id", pa.string()), ("audio", AUDIO), ("duration_ms", pa.int32()), ("text", pa.string())]


def encode_audio(wave: np.ndarray, path: str) -> dict[str, bytes | str]:
    """The struct that data sets hold: Opus bytes and a file name."""
    peak = np.abs(wave).max()
    buffer = io.BytesIO()
    samples = wave / max(1.0, peak / 0.95)
    soundfile.write(buffer, samples, STORED_RATE, format="OGG", subtype="OPUS", compression_level=0.985)
    return {"bytes": buffer.getvalue(), "path": path}


def write_table(path: Path, rows: list[dict], schema: list[tuple[str, pa.DataType]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    table = pa.Table.from_pylist(rows, schema=pa.schema(schema))
    # Recordings do not repeat, so a dictionary would only take room.
    pq.write_table(table, path, compression="zstd", compression_level=19, use_dictionary=False, write_statistics=False)


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
            if not 1.4 * STORED_RATE <= len(wave) <= 7.6 * STORED_RATE:
                continue
            if scene is not None:
                wave = with_noise(wave, noise(scene, len(wave), noise_rng))
            name = f"{voice.name}/{counts[voice.name]:03d}.ogg"
            counts[voice.name] += 1
            duration_ms = round(len(wave) * 1000 / STORED_RATE)
            rows.append({"id": name, "audio": encode_audio(wave, name), "duration_ms": duration_ms, "text": text})
            total_ms += duration_ms
            bar.update(duration_ms)
    write_table(path, rows, CORPUS_SCHEMA)
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


# Pairs of the tasks that the quickstart reports first, and of each of the others.
MANY_PAIRS, FEW_PAIRS = 200, 10
SALMON_TASKS = {
    "sentiment_consistency": FEW_PAIRS,
    "speaker_consistency": MANY_PAIRS,
    "gender_consistency": MANY_PAIRS,
    "bg_domain_consistency": FEW_PAIRS,
    "bg_all_consistency": FEW_PAIRS,
    "rir_consistency": FEW_PAIRS,
    "sentiment_alignment": FEW_PAIRS,
    "bg_alignment": FEW_PAIRS,
}


def build_salmon(folder: Path, texts: list[str], rng: random.Random) -> None:
    """The eight tasks of SALMon. Positive and negative of a consistency pair share their first half."""
    noise_rng = np.random.default_rng(rng.randrange(2**32))
    women = [voice for voice in VOICES if voice.gender == "female"]
    men = [voice for voice in VOICES if voice.gender == "male"]
    domains = (("rain", "wind"), ("engine", "hum"))

    def halves(
        text: str, first: tuple[Voice, str], right: tuple[Voice, str], wrong: tuple[Voice, str]
    ) -> tuple[np.ndarray, np.ndarray]:
        """One first half, followed by the second half spoken rightly and wrongly, at the same level."""
        spoken = words(text)
        begin, end = (" ".join(part) for part in (spoken[: len(spoken) // 2], spoken[len(spoken) // 2 :]))
        start = say(begin, *first, rng)
        peak = np.abs(start).max()
        good, bad = (say(end, *how, rng) for how in (right, wrong))
        good, bad = (np.concatenate([start, wave * (peak / np.abs(wave).max())]) for wave in (good, bad))
        return good, bad

    def pair(task: str, index: int) -> tuple[np.ndarray, np.ndarray]:
        text, voice = rng.choice(texts), VOICES[index % len(VOICES)]
        plain = (voice, "neutral")
        if task == "sentiment_consistency":
            first, second = rng.sample(["happy", "sad"], 2)
            return halves(text, (voice, first), (voice, first), (voice, second))
        if task == "speaker_consistency":
            group = [other for other in VOICES if other != voice]
            return halves(text, plain, plain, (rng.choice(group), "neutral"))
        if task == "gender_consistency":
            group = men if voice.gender == "female" else women
            return halves(text, plain, plain, (rng.choice(group), "neutral"))
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

    schema = [("task", pa.string()), ("ind", pa.int64()), ("positive_audio", AUDIO), ("negative_audio", AUDIO)]
    for task, pairs in tqdm(SALMON_TASKS.items(), desc="SALMon", mininterval=5):
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
        manner = rng.random()  # both in the same pitch, speed and level
        clips = (say(text, voice, "neutral", random.Random(manner)) for text in (positive, negative))
        positive_audio, negative_audio = (encode_audio(clip, f"{index}_{side}.ogg") for side, clip in enumerate(clips))
        return {"positive": positive_audio, "negative": negative_audio}

    rows = [row(i, VOICES[i % len(VOICES)], word, other) for i, (word, other) in enumerate(NON_WORDS.items())]
    write_table(folder / "sWUGGY" / "train-00000-of-00001.parquet", rows, pair_schema)

    rows = []
    for item in tqdm(range(MANY_PAIRS), desc="sBLIMP", mininterval=5):
        voice, ordered = (
            VOICES[item % len(VOICES)],
            words(rng.choice([text for text in texts if len(words(text)) == 4])),
        )
        shuffled = ordered[:]
        while shuffled == ordered:
            rng.shuffle(shuffled)
        entry = row(item, voice, " ".join(ordered), " ".join(shuffled))
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


PROMPT_TEXT = "one two three four five six seven eight nine ten"
PROMPT_SECONDS = 1.28


def build_prompts(folder: Path, texts: list[str]) -> None:
    """A held-out prompt in each voice, `<folder>/<voice>.flac`: the beginning of a longer text of counting."""
    folder.mkdir(parents=True, exist_ok=True)
    for voice, text in zip(VOICES, texts, strict=False):
        soundfile.write(
            folder / f"{voice.name}.flac", say(text, voice)[: round(PROMPT_SECONDS * STORED_RATE)], STORED_RATE
        )


def build_speech(output: Path, minutes: float, seed: int) -> None:
    """Everything under `<output>/speech`, and `<output>/prompt.flac`."""
    rng = random.Random(seed)
    speech = output / "speech"
    train_texts, held_counting, held_sentences = split_texts(rng)
    if PROMPT_TEXT in train_texts:
        train_texts.remove(PROMPT_TEXT)
    held_out = {PROMPT_TEXT, *held_counting, *held_sentences}
    train_path = speech / "peoples_speech" / "clean" / "train-00000-of-00001.parquet"
    build_train(train_path, train_texts, held_out, minutes, rng)
    # 26 counting utterances, the longer ones among them, and 14 sentences.
    test_texts = held_counting[-26:] + held_sentences
    build_test(speech / "librispeech_asr" / "clean" / "test" / "0000.parquet", test_texts, rng)
    short_texts = [text for text in held_counting if len(text.split()) <= 5]
    build_salmon(speech / "SALMon", short_texts, rng)
    build_pairs(speech, short_texts, rng)
    # Cut off in the middle of the counting, so that there is something to continue.
    prompt = say(PROMPT_TEXT, VOICES[3], "sad")[: round(PROMPT_SECONDS * STORED_RATE)]
    soundfile.write(output / "prompt.flac", prompt, STORED_RATE)
    build_prompts(output / "prompts", [text for text in held_counting if len(text.split()) >= 8])
    size = sum(file.stat().st_size for file in speech.rglob("*.parquet"))
    print(f"speech: {size / 1e6:.2f} MB under {speech}")


# Declared sample rates of espeak-ng's 22,050 Hz output: the others change formants, pitch and tempo together.
WARPED_RATES = (19_200, 20_000, 21_000, 22_050, 23_000, 24_500)
VARIANTS = words("m1 m2 m3 m4 m5 m6 m7 m8 f1 f2 f3 f4 f5 klatt klatt2 klatt3 klatt4 Andy Annie Alex Steph Mike Gene")


def corpus_text(rng: random.Random) -> str:
    """Numbers in no order, counting, or sentences of any kind."""
    kind = rng.random()
    if kind < 0.3:
        return " ".join(number(rng.randrange(10) if rng.random() < 0.5 else rng.randrange(30)) for _ in range(6))
    if kind < 0.6:
        return " ".join(counting(rng.randint(1, 18), rng.randint(6, 10)))
    if kind < 0.9:
        return f"{sentence(rng)} and {sentence(rng)}"
    everything = [text for group in (*MOODS.values(), *SCENES.values()) for text in group]
    return f"{rng.choice(everything)} {rng.choice(everything)}"


def build_corpus(folder: Path, minutes: float, seed: int) -> None:
    """Speech for training the small codec, in the layout of MLCommons/peoples_speech, as FLAC at 16 kHz.

    Two thirds are in the assets' voices, the rest in many others; of each, a tenth is in a noise or a room. No text is
    one of the texts held out by `build_speech` with seed 0, nor the prompt's.
    """
    _, held_counting, held_sentences = split_texts(random.Random(0))
    held_out = {PROMPT_TEXT, *held_counting, *held_sentences}
    rng, noise_rng = random.Random(seed), np.random.default_rng(seed)
    rows: list[dict] = []
    seconds = 0.0
    with tqdm(total=round(minutes * 60), desc="codec corpus", unit="s", mininterval=5) as bar:
        while seconds < minutes * 60:
            text = corpus_text(rng)
            if text in held_out:
                continue
            if rng.random() < 0.67:
                voice, style = rng.choice(VOICES), rng.choice(["neutral", "neutral", "happy", "sad"])
                wave = say(text, voice, style, rng)
            else:
                voice = Voice("", f"{rng.choice(['en-us', 'en-gb'])}+{rng.choice(VARIANTS)}", "", 0, 0)
                spoken = speak(text, voice.variant, rng.randint(10, 90), rng.randint(135, 190))
                wave = resample(spoken, rng.choice(WARPED_RATES), STORED_RATE)
                wave = wave * (rng.uniform(0.3, 0.6) / np.abs(wave).max())
            if rng.random() < 0.07:
                wave = with_noise(wave, noise(rng.choice(list(SCENES)), len(wave), noise_rng), rng.uniform(6, 20))
            elif rng.random() < 0.03:
                wave = with_room(wave, rng.uniform(0.1, 0.9), noise_rng)
            buffer = io.BytesIO()
            soundfile.write(buffer, wave / max(1.0, np.abs(wave).max() / 0.95), STORED_RATE, format="FLAC")
            name = f"{voice.name or voice.variant}/{len(rows):05d}.flac"
            duration = len(wave) / STORED_RATE
            audio = {"bytes": buffer.getvalue(), "path": name}
            rows.append({"id": name, "audio": audio, "duration_ms": round(1000 * duration), "text": text})
            seconds += duration
            bar.update(round(duration))
    write_table(folder / "clean" / "train-00000-of-00001.parquet", rows, CORPUS_SCHEMA)


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


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=["all", "speech", "tokenizer", "corpus"])
    parser.add_argument("--output", type=Path, help="folder to write to: assets, for the corpus outputs/codec_corpus")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, default=30.0, help="minutes of training speech")
    parser.add_argument("--corpus-minutes", type=float, default=100.0, help="minutes of the codec's corpus")
    args = parser.parse_args(argv)
    output = args.output or Path("outputs/codec_corpus" if args.part == "corpus" else "assets")
    torch.set_num_threads(1)
    try:
        if args.part in ("all", "speech"):
            build_speech(output, args.minutes, args.seed)
        if args.part in ("all", "tokenizer"):
            build_tokenizer(output)
        if args.part == "corpus":
            build_corpus(output, args.corpus_minutes, args.seed + 1)
    except RuntimeError as error:
        sys.exit(f"build_assets: {error}")


if __name__ == "__main__":
    main()
