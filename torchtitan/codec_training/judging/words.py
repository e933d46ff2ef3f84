"""Spoken words."""

import json
import os
import random
import shutil
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from torchtitan.audio.waveform import resample
from torchtitan.codec_training.voices import STORED_RATE, VOICES, WEEKDAYS, number, say

WORDS = [*(number(n) for n in range(1, 21)), *WEEKDAYS]


@dataclass(frozen=True)
class Word:
    """A spoken word: waveform float32 [n] at 24 kHz, its number in the list of words, and whether it tests."""

    waveform: torch.Tensor
    word: int
    test: bool


def spoken_words(folder: Path, words: list[str], renditions: int, seed: int) -> list[Word]:
    """Each word in each voice, as espeak-ng says it at various pitches (+-13), speeds (+-20 %) and levels.

    `renditions` of a word and voice are to learn from, half as many (one at least) to test with. They are kept in
    <folder>/words.npz for the next time.

    Raises:
        RuntimeError: espeak-ng is not installed.
    """
    tests = max(1, renditions // 2)
    voices = [asdict(voice) for voice in VOICES]
    made_by = json.dumps({"words": words, "renditions": [renditions, tests], "seed": seed, "voices": voices})
    stored = _load_words(folder / "words.npz", made_by)
    if stored is None:
        if shutil.which("espeak-ng") is None:
            raise RuntimeError("espeak-ng is not installed")
        samples, numbers, test = [], [], []
        tasks = [(w, v, n) for w in range(len(words)) for v in range(len(VOICES)) for n in range(renditions + tests)]
        for w, v, n in tqdm(tasks, "spoken words", mininterval=5):
            rng = random.Random(f"{seed} {words[w]} {VOICES[v].name} {n}")
            pitch, speed = VOICES[v].pitch + rng.randint(-10, 10), round(VOICES[v].speed * rng.uniform(0.85, 1.15))
            wave = say(words[w], replace(VOICES[v], pitch=pitch, speed=speed), "neutral", rng)
            samples.append((32767 * wave).round().astype(np.int16))
            numbers.append(w)
            test.append(n >= renditions)
        stored = {
            "samples": np.concatenate(samples),
            "starts": np.cumsum([0, *map(len, samples)]),
            "words": np.array(numbers),
            "test": np.array(test),
        }
        np.savez(folder / "words.partial.npz", made_by=np.array(made_by), **stored)
        os.replace(folder / "words.partial.npz", folder / "words.npz")
    parts = np.split(stored["samples"].astype(np.float32) / 32767, stored["starts"][1:-1])
    return [
        Word(resample(torch.from_numpy(part), STORED_RATE), int(word), bool(test))
        for part, word, test in zip(parts, stored["words"], stored["test"], strict=True)
    ]


def _load_words(path: Path, made_by: str) -> dict[str, np.ndarray] | None:
    """The words kept in a file, if it is there and they were made the same way."""
    if not path.exists():
        return None
    with np.load(path) as stored:
        found = dict(stored)
    return found if str(found.pop("made_by")) == made_by else None
