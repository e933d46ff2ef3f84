"""Data sets of minimal pairs: the tasks of SALMon, sWUGGY, sBLIMP, sStoryCloze and tStoryCloze."""

import random
from pathlib import Path

import numpy as np
import pyarrow as pa
from tqdm import tqdm

from scripts.assets.sound import AUDIO, encode_audio, noise, switch, with_noise, with_room, write_table
from scripts.assets.texts import MOODS, SCENES, counting
from torchtitan.codec_training.voices import VOICES, WEEKDAYS, Voice, say
from torchtitan.eval.suites import SALMON

# Pairs of the tasks that the quickstart reports first, and of each of the others.
MANY_PAIRS, FEW_PAIRS = 200, 10
MANY = ("speaker_consistency", "gender_consistency")
# A word and a non-word of its letters.
NON_WORDS = (
    "seven vensef,eleven nevelel,twelve wetvel,thirteen neerthit,fourteen rofneet,sixteen teexins,"
    "eighteen neetaith,nineteen teeninen,monday donmay,tuesday dusetay,wednesday desenway,thursday dertsay,"
    "friday rifday,saturday tadursay,sunday nusday,january nurajay,march charm in,april pilar,"
    "september tembersep,october berocto"
).split(",")


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
        spoken = text.split()
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
    for task in tqdm(SALMON.tasks, desc="SALMon", mininterval=5):
        rows = []
        for index in range(MANY_PAIRS if task in MANY else FEW_PAIRS):
            good, bad = pair(task, index)
            positive, negative = (
                encode_audio(wave, f"sample_{index}_{side}.ogg") for side, wave in enumerate((good, bad))
            )
            rows.append({"task": task, "ind": index, "positive_audio": positive, "negative_audio": negative})
        write_table(folder / task / "train-00000-of-00001.parquet", rows, schema)


def build_pairs(folder: Path, texts: list[str], rng: random.Random) -> None:
    """sWUGGY (word or not), sBLIMP (in order or not), sStoryCloze and tStoryCloze (continued rightly or not)."""
    pair_schema = [("positive", AUDIO), ("negative", AUDIO)]

    def row(index: int, voice: Voice, positive: str, negative: str) -> dict:
        manner = rng.random()  # both in the same pitch, speed and level
        clips = (say(text, voice, "neutral", random.Random(manner)) for text in (positive, negative))
        positive_audio, negative_audio = (encode_audio(clip, f"{index}_{side}.ogg") for side, clip in enumerate(clips))
        return {"positive": positive_audio, "negative": negative_audio}

    rows = [row(i, VOICES[i % len(VOICES)], *pair.split(" ", 1)) for i, pair in enumerate(NON_WORDS)]
    write_table(folder / "sWUGGY" / "train-00000-of-00001.parquet", rows, pair_schema)

    rows = []
    for item in tqdm(range(MANY_PAIRS), desc="sBLIMP", mininterval=5):
        voice = VOICES[item % len(VOICES)]
        ordered = rng.choice([text for text in texts if len(text.split()) == 4]).split()
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
