"""Data sets of single clips (training, held-out, the corpus of the codec), prompts, and all of `speech`."""

import random
from pathlib import Path

import numpy as np
import pyarrow as pa
import soundfile
from tqdm import tqdm

from scripts.assets.pairs import build_pairs, build_salmon
from scripts.assets.sound import AUDIO, CORPUS_SCHEMA, encode_audio, noise, with_noise, with_room, write_table
from scripts.assets.texts import MOODS, PROMPT_TEXT, SCENES, corpus_text, sentence, split_texts
from torchtitan.codec_training.voices import PROMPT_SECONDS, STORED_RATE, VOICES, Voice, resample, say, speak

PROMPT_SAMPLES = round(PROMPT_SECONDS * STORED_RATE)
# Declared sample rates of espeak-ng's 22,050 Hz output: the others change formants, pitch and tempo together.
WARPED_RATES = (19_200, 20_000, 21_000, 22_050, 23_000, 24_500)
VARIANTS = "m1 m2 m3 m4 m5 m6 m7 m8 f1 f2 f3 f4 f5 klatt klatt2 klatt3 klatt4 Andy Annie Alex Steph Mike Gene".split()


def build_train(path: Path, texts: list[str], held_out: set[str], minutes: float, rng: random.Random) -> None:
    """Training speech in the layout of MLCommons/peoples_speech.

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
            name = f"{voice.name or voice.variant}/{len(rows):05d}.flac"
            duration = len(wave) / STORED_RATE
            audio = encode_audio(wave, name)
            rows.append({"id": name, "audio": audio, "duration_ms": round(1000 * duration), "text": text})
            seconds += duration
            bar.update(round(duration))
    write_table(folder / "clean" / "train-00000-of-00001.parquet", rows, CORPUS_SCHEMA)


def build_prompts(folder: Path, texts: list[str]) -> None:
    """A held-out prompt in each voice, `<folder>/<voice>.flac`: the beginning of a longer text of counting."""
    folder.mkdir(parents=True, exist_ok=True)
    for voice, text in zip(VOICES, texts, strict=False):
        soundfile.write(folder / f"{voice.name}.flac", say(text, voice)[:PROMPT_SAMPLES], STORED_RATE)


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
    prompt = say(PROMPT_TEXT, VOICES[3], "sad")[:PROMPT_SAMPLES]
    soundfile.write(output / "prompt.flac", prompt, STORED_RATE)
    build_prompts(output / "prompts", [text for text in held_counting if len(text.split()) >= 8])
    size = sum(file.stat().st_size for file in speech.rglob("*.parquet"))
    print(f"speech: {size / 1e6:.2f} MB under {speech}")
