"""What is said in the assets' clips: counting, sentences, moods and scenes."""

import random

from torchtitan.codec_training.voices import WEEKDAYS, number

MONTHS = "january february march april may june july august september october november december".split()
ORDINALS = "first second third fourth fifth sixth seventh eighth ninth tenth eleventh twelfth".split()
SUBJECTS = "the cat,the dog,my sister,your brother,the old man,a little girl,the teacher,our friend".split(",")
VERBS = "sees hears finds likes follows paints carries draws".split()
OBJECTS = "a red ball,the green house,an apple,the river,a white horse,the big tree,a warm coat,my blue book".split(",")
PROMPT_TEXT = "one two three four five six seven eight nine ten"
# Texts by mood and by background noise.
MOODS = {
    "happy": "i am so happy today,what a wonderful day,we won the big game,i love this lovely song,"
    "this is the best news,my friend is coming home".split(","),
    "sad": "i am so sad today,what a terrible day,we lost the last game,i miss my old dog,"
    "this is very bad news,my friend has gone away".split(","),
}
SCENES = {
    "rain": ["the rain is falling", "take your umbrella along", "the street is all wet"],
    "wind": ["the wind is blowing hard", "the storm shakes the trees", "the kite flies very high"],
    "engine": ["the engine is running", "the truck drives along", "the car needs some fuel"],
    "hum": ["the fridge is humming", "the lamp buzzes at night", "the old machine is on"],
}


def counting(start: int, length: int) -> str:
    return " ".join(number(n) for n in range(start, start + length))


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

    Half of the texts of four and five numbers, from which minimal pairs are made, and 12 longer ones are held out. Most
    texts are long, so that a model that goes on with the first few numbers has something to say.
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
    train_texts, held_texts = ([counting(*pair) for pair in pairs] for pairs in (train, held))
    return train_texts, held_texts, sentences


def corpus_text(rng: random.Random) -> str:
    """Numbers in no order, counting, or sentences of any kind."""
    kind = rng.random()
    if kind < 0.3:
        return " ".join(number(rng.randrange(10) if rng.random() < 0.5 else rng.randrange(30)) for _ in range(6))
    if kind < 0.6:
        return counting(rng.randint(1, 18), rng.randint(6, 10))
    if kind < 0.9:
        return f"{sentence(rng)} and {sentence(rng)}"
    everything = [text for group in (*MOODS.values(), *SCENES.values()) for text in group]
    return f"{rng.choice(everything)} {rng.choice(everything)}"
