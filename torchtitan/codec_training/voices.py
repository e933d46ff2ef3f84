"""Synthetic speech: the six voices of the assets, as espeak-ng speaks them, and the words they say."""

import random
import shutil
import subprocess
from dataclasses import dataclass

import numpy as np
import torch
import torchaudio

ESPEAK_RATE = 22_050  # samples a second of espeak-ng's output
STORED_RATE = 16_000  # samples a second of the assets' clips
PROMPT_SECONDS = 1.28  # length of a prompt: 16 frames

ONES = "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen".split()
ONES += "seventeen eighteen nineteen".split()
TENS = "twenty thirty forty fifty sixty seventy eighty ninety".split()
WEEKDAYS = "monday tuesday wednesday thursday friday saturday sunday".split()


@dataclass(frozen=True)
class Voice:
    """One espeak-ng voice: `variant` is its name there, `pitch` 0..99, `speed` in words per minute."""

    name: str
    variant: str
    gender: str
    pitch: int
    speed: int


VOICES = (
    Voice("anna", "en-us+f2", "female", 62, 165),
    Voice("ben", "en-us+m3", "male", 42, 160),
    Voice("clara", "en-gb+f5", "female", 78, 180),
    Voice("david", "en-gb+m7", "male", 22, 150),
    Voice("eric", "en-us+klatt4", "male", 50, 170),
    Voice("fay", "en-us+f4", "female", 38, 145),
)
STYLES = {"neutral": (0, 1.0), "sad": (-14, 0.86), "happy": (16, 1.14)}  # added to the pitch, factor of the speed


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
    """The wave [n] at another rate."""
    return torchaudio.functional.resample(torch.from_numpy(wave.copy()), source, target).numpy()


def say(text: str, voice: Voice, style: str = "neutral", rng: random.Random | None = None) -> np.ndarray:
    """The text in one of the assets' voices: float32 mono at 16 kHz, peak 0.5. `rng` varies pitch, speed and level."""
    higher, faster = STYLES[style]
    pitch, speed, level = voice.pitch + higher, voice.speed * faster, 0.5
    if rng is not None:
        pitch, speed, level = pitch + rng.randint(-3, 3), speed * rng.uniform(0.95, 1.05), level * rng.uniform(0.6, 1.2)
    wave = resample(speak(text, voice.variant, round(pitch), round(speed)), ESPEAK_RATE, STORED_RATE)
    return wave * (level / np.abs(wave).max())


def number(n: int) -> str:
    """0 <= n < 100 in words."""
    if n < 20:
        return ONES[n]
    return TENS[n // 10 - 2] + (f" {ONES[n % 10]}" if n % 10 else "")
