"""The part `speech` of the assets: all data sets, and the prompts."""

import random
from pathlib import Path

import soundfile

from scripts.assets.clips import build_test, build_train
from scripts.assets.pairs import build_pairs, build_salmon
from scripts.assets.texts import PROMPT_TEXT, split_texts
from torchtitan.codec_training.voices import PROMPT_SECONDS, STORED_RATE, VOICES, say


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
