"""The data sets of the assets: single clips, minimal pairs, prompts, and the corpus of the codec."""

import random
from pathlib import Path

import numpy as np
import soundfile
from tqdm import tqdm

from scripts.assets.sound import corpus_row, encode_audio, noise, switch, with_noise, with_room, write_table
from scripts.assets.texts import MOODS, PROMPT_TEXT, SCENES, corpus_text, counting, sentence, split_texts
from torchtitan.codec_training.voices import PROMPT_SECONDS, STORED_RATE, VOICES, WEEKDAYS, Voice, resample, say, speak
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
PROMPT_SAMPLES = round(PROMPT_SECONDS * STORED_RATE)
# Sample rates declared for espeak-ng's output of 22,050 Hz: the others change formants, pitch and tempo together.
WARPED_RATES = (19_200, 20_000, 21_000, 22_050, 23_000, 24_500)
VARIANTS = "m1 m2 m3 m4 m5 m6 m7 m8 f1 f2 f3 f4 f5 klatt klatt2 klatt3 klatt4 Andy Annie Alex Steph Mike Gene".split()


def build_salmon(folder: Path, texts: list[str], rng: random.Random) -> None:
    """The eight tasks of SALMon. Positive and negative of a consistency pair share their first half."""
    noise_rng = np.random.default_rng(rng.randrange(2**32))
    domains = (("rain", "wind"), ("engine", "hum"))

    def halves(
        text: str, first: tuple[Voice, str], right: tuple[Voice, str], wrong: tuple[Voice, str]
    ) -> tuple[np.ndarray, np.ndarray]:
        """The first half, followed by the second half in the right and in the wrong way, at the same level."""
        spoken = text.split()
        begin, end = (" ".join(part) for part in (spoken[: len(spoken) // 2], spoken[len(spoken) // 2 :]))
        start = say(begin, *first, rng)
        peak = np.abs(start).max()
        ends = [say(end, *how, rng) for how in (right, wrong)]
        good, bad = (np.concatenate([start, wave * (peak / np.abs(wave).max())]) for wave in ends)
        return good, bad

    def pair(task: str, index: int) -> tuple[np.ndarray, np.ndarray]:
        text, voice = rng.choice(texts), VOICES[index % len(VOICES)]
        plain = (voice, "neutral")
        if task == "sentiment_consistency":
            first, second = rng.sample(["happy", "sad"], 2)
            return halves(text, (voice, first), (voice, first), (voice, second))
        if task == "speaker_consistency":
            others = [other for other in VOICES if other != voice]
            return halves(text, plain, plain, (rng.choice(others), "neutral"))
        if task == "gender_consistency":
            others = [other for other in VOICES if other.gender != voice.gender]
            return halves(text, plain, plain, (rng.choice(others), "neutral"))
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

    for task in tqdm(SALMON.tasks, desc="SALMon", mininterval=5):
        rows = []
        for index in range(MANY_PAIRS if task in MANY else FEW_PAIRS):
            clips = [encode_audio(wave, f"sample_{index}_{side}.ogg") for side, wave in enumerate(pair(task, index))]
            rows.append({"task": task, "ind": index, "positive_audio": clips[0], "negative_audio": clips[1]})
        write_table(folder / task, rows)


def build_pairs(folder: Path, texts: list[str], rng: random.Random) -> None:
    """sWUGGY (word or not), sBLIMP (in order or not), sStoryCloze and tStoryCloze (continued rightly or not)."""

    def row(index: int, voice: Voice, *texts: str) -> dict:
        manner = rng.random()  # both in the same pitch, speed and level
        waves = [say(text, voice, "neutral", random.Random(manner)) for text in texts]
        sides = zip(("positive", "negative"), waves, strict=True)
        return {side: encode_audio(wave, f"{index}_{n}.ogg") for n, (side, wave) in enumerate(sides)}

    rows = [row(i, VOICES[i % len(VOICES)], *pair.split(" ", 1)) for i, pair in enumerate(NON_WORDS)]
    write_table(folder / "sWUGGY", rows)

    rows = []
    for item in tqdm(range(MANY_PAIRS), desc="sBLIMP", mininterval=5):
        voice = VOICES[item % len(VOICES)]
        ordered = rng.choice([text for text in texts if len(text.split()) == 4]).split()
        shuffled = ordered[:]
        while shuffled == ordered:
            rng.shuffle(shuffled)
        entry = row(item, voice, " ".join(ordered), " ".join(shuffled))
        rows.append({"id": item, **entry, "voice": voice.name, "type": "counting", "subtype": f"from_{ordered[0]}"})
    write_table(folder / "sBLIMP", rows)

    near, far = [], []
    for index in range(16):
        start, voice = rng.randint(1, 8), VOICES[index % len(VOICES)]
        prompt, right = counting(start, 4), counting(start, 7)
        wrong_start = rng.choice([n for n in range(1, 18) if abs(n - start - 4) > 2])
        near.append(row(index, voice, right, f"{prompt} {counting(wrong_start, 3)}"))
        far.append(row(index, voice, right, f"{prompt} {' '.join(rng.sample(WEEKDAYS, 3))}"))
    write_table(folder / "sStoryCloze", near)
    write_table(folder / "tStoryCloze", far)


def build_train(folder: Path, texts: list[str], held_out: set[str], minutes: float, rng: random.Random) -> None:
    """Training speech in the layout of MLCommons/peoples_speech.

    70 % of the clips count upward. The rest are sentences; a third of these are about a mood or a scene, and sound so.
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
            rows.append(corpus_row(name, wave, text))
            total_ms += int(rows[-1]["duration_ms"])
            bar.update(int(rows[-1]["duration_ms"]))
    write_table(folder, rows)


def build_test(folder: Path, texts: list[str], rng: random.Random) -> None:
    """Held-out utterances in the layout of openslr/librispeech_asr."""
    rows = []
    for index, text in enumerate(texts):
        speaker = index % len(VOICES)
        name = f"{speaker}-0-{index:04d}"
        audio = encode_audio(say(text, VOICES[speaker], "neutral", rng), f"{name}.ogg")
        row = {"file": f"{name}.ogg", "audio": audio, "text": text.upper()}
        rows.append({**row, "speaker_id": speaker, "chapter_id": 0, "id": name})
    write_table(folder, rows, "0000.parquet")


def build_corpus(folder: Path, minutes: float, seed: int) -> None:
    """Speech for training the small codec, in the layout of MLCommons/peoples_speech, as FLAC at 16 kHz.

    Two thirds are in the assets' voices, the rest in many others; a tenth of both is in a noise or a room. The texts
    that `build_speech` holds out with seed 0, and the prompt's, are left out.
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
            rows.append(corpus_row(name, wave, text))
            seconds += len(wave) / STORED_RATE
            bar.update(round(len(wave) / STORED_RATE))
    write_table(folder / "clean", rows)


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
    build_train(speech / "peoples_speech" / "clean", train_texts, held_out, minutes, rng)
    # 26 counting utterances, among them the longer ones, and 14 sentences.
    build_test(speech / "librispeech_asr" / "clean" / "test", held_counting[-26:] + held_sentences, rng)
    short_texts = [text for text in held_counting if len(text.split()) <= 5]
    build_salmon(speech / "SALMon", short_texts, rng)
    build_pairs(speech, short_texts, rng)
    # Cut off in the middle of the counting, so that there is something to continue.
    prompt = say(PROMPT_TEXT, VOICES[3], "sad")[:PROMPT_SAMPLES]
    soundfile.write(output / "prompt.flac", prompt, STORED_RATE)
    build_prompts(output / "prompts", [text for text in held_counting if len(text.split()) >= 8])
    size = sum(file.stat().st_size for file in speech.rglob("*.parquet"))
    print(f"speech: {size / 1e6:.2f} MB under {speech}")
