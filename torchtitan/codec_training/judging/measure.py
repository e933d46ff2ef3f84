"""The judgement of a codec, from top to bottom, and its tables."""

import json
import time
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from torchtitan.audio.codec import Codec
from torchtitan.checkpoint.speech_lm import SpeechLM
from torchtitan.codec_training.judging.clips import (
    WORDS,
    held_out_clips,
    other_clips,
    pair_clips,
    spoken_words,
    training_clips,
)
from torchtitan.codec_training.judging.hearing import load_pystoi
from torchtitan.codec_training.judging.judge import QUANTIZERS, CodecJudge
from torchtitan.codec_training.options import check_positive
from torchtitan.tools.errors import UserError
from torchtitan.tools.logging import quiet_transformers

CHANCES = {"voice": "chance", "gender": "gender_chance"}  # kinds of scores, and the keys of their chances
CONTINUATIONS = {
    "clean_prompt": "clean prompt",
    "clean_rest": "clean rest of the clip",
    "round_trip_of_rest": "its round trip",
    "continuation": "continuation",
}


@dataclass
class Options:
    """Judge a small Mimi codec on speech."""

    codec: str = "assets/mimi-small"
    """The codec: a folder or a hub id."""
    speech: Path = Path("assets/speech")
    """Folder of speech laid out like assets/speech, with clips of the voices of scripts/build_assets.py."""
    model: str | None = None
    """A converted model that was trained on this codec's codes; its continuations are judged too."""
    real: list[str] | None = None
    """Further data sets, as training reads them, for round trips of speech that the codec was not trained on."""
    real_clips: int = 100
    """Clips of each further data set, spread evenly."""
    continuations: int = 60
    """Prompts to continue: the first clips of SALMon/speaker_consistency that are long enough."""
    renditions: int = 4
    """Renditions of each word in each voice for the classifier of words; half as many others test it."""
    output: Path = Path("outputs/measures")
    """Folder for measures.json and the spoken words."""
    seed: int = 0
    """Seed of spoken words, clusters and continuations."""
    threads: int = 1
    """Threads on the CPU."""


def load_model(name: str, codec: str) -> Any:
    """A SpeechLM with the codec that is judged.

    Raises:
        UserError: it cannot be loaded, or names another codec whose codes it was trained on.
    """
    lm = SpeechLM.load(name, codec, "cpu", "float32")
    own = getattr(lm.model.config, "audio_tokenizer", None)
    if own and Path(own).is_dir():
        trained_on = Codec.load(own, lm.stream.num_quantizers, lm.codec.padding, lm.codec.window)
        if trained_on.fingerprint() != lm.codec.fingerprint():
            raise UserError(f"{name}: it was trained on the codes of {own}, which are not those of {codec}.")
    return lm


def measure(options: Options) -> dict[str, Any]:
    """All figures.

    Raises:
        UserError: an option does not fit, or something that is needed is missing or cannot be read.
    """
    check_positive(options, "real_clips", "continuations", "renditions", "threads")
    load_pystoi()
    started = time.perf_counter()
    torch.set_num_threads(options.threads)
    torch.set_flush_denormal(True)  # denormal activations slow a CPU several times
    quiet_transformers()
    # All inputs are loaded before anything is measured.
    codec = Codec.load(options.codec, max(QUANTIZERS))
    lm = None if options.model is None else load_model(options.model, options.codec)
    pairs = [] if lm is None else pair_clips(options.speech, options.continuations)
    held_out = held_out_clips(options.speech)
    training = training_clips(options.speech)
    real = {path: other_clips(path, options.real_clips) for path in options.real or []}
    try:
        options.output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{options.output}: the folder cannot be made ({error.strerror}).") from None

    judge = CodecJudge(codec, training, held_out, options.seed)
    figures: dict[str, Any] = {
        "codec": options.codec,
        "codec_fingerprint": codec.fingerprint(),
        "speech": str(options.speech),
        "model": options.model,
        "settings": {"seed": options.seed, "threads": options.threads, "renditions": options.renditions},
        "versions": {name: metadata.version(name) for name in ("torch", "torchaudio", "transformers", "pystoi")},
        "round_trips": judge.round_trips(real),
        "codebooks": judge.codebooks(),
    }
    try:
        words = spoken_words(options.output, WORDS, options.renditions, options.seed)
    except RuntimeError as error:
        figures["words"] = {"skipped": f"No words were judged: {error}."}
    else:
        figures["words"] = judge.words(words)
    figures["speakers"] = judge.speakers()
    if lm is None:
        figures["continuations"] = {"skipped": "No continuations were judged: no --model was given."}
    else:
        figures["continuations"] = judge.continuations(lm, pairs)
    return {**figures, "timing": {**judge.timing, "seconds": time.perf_counter() - started}}


def report(options: Options) -> None:
    """Measure, write measures.json, print the tables.

    Raises:
        UserError: see :func:`measure`, or the result cannot be written.
    """
    figures = measure(options)
    path = options.output / "measures.json"
    try:
        path.write_text(json.dumps(figures, indent=2) + "\n")
    except OSError as error:
        raise UserError(f"{path}: it cannot be written ({error.strerror}).") from None
    print(tables(figures))


def with_error(value: dict[str, Any], key: str, digits: int, factor: int = 1, unit: str = "") -> str:
    """A figure and its standard error, as far as they are known."""
    if value[key] is None:
        return ""
    error = "" if value["standard_error"] is None else f" ± {factor * value['standard_error']:.{digits}f}"
    return f"{factor * value[key]:.{digits}f}{error}{unit}"


def mean(value: dict[str, Any], digits: int) -> str:
    return with_error(value, "mean", digits)


def percent(value: dict[str, Any]) -> str:
    return with_error(value, "accuracy", 1, 100, " %")


def table(head: list[str], rows: list[list[str]]) -> str:
    """A table in Markdown."""
    return "\n".join(f"| {' | '.join(line)} |" for line in [head, ["---"] * len(head), *rows])


def tables(figures: dict[str, Any]) -> str:
    """The figures as Markdown."""
    trips, words, speakers, continued = (figures[key] for key in ("round_trips", "words", "speakers", "continuations"))
    parts = [f"Codec {figures['codec']}, speech {figures['speech']}. What follows ± is the standard error."]

    rows = []
    for name, by_number in {"held out": trips["held_out"], **trips["real"]}.items():
        for q, found in by_number.items():
            stoi = found["stoi"]
            lowest = "" if stoi["minimum"] is None else f"{stoi['minimum']:.3f}"
            rows.append([name, q, str(stoi["clips"]), mean(stoi, 3), lowest, mean(found["log_mel_distance_db"], 2)])
    parts.append(table(["round trip", "quantizers", "clips", "STOI", "lowest", "log-mel distance, dB"], rows))

    by_voice = {q: found["stoi_by_voice"] for q, found in trips["held_out"].items()}
    rows = [[f"{q} quantizers", *(mean(value, 3) for value in found.values())] for q, found in by_voice.items()]
    parts.append(table(["STOI by voice", *by_voice[str(QUANTIZERS[0])]], rows))

    books = figures["codebooks"]
    head = ["quantizer", "entries used", "entropy, nats", "perplexity", f"voice (chance {100 * books['chance']:.1f} %)"]
    for what in ("voice", "sound"):
        head.append(f"nats about the {what} (of {books['quantizers'][0][f'about_{what}']['at_most']:.2f})")
    rows = [
        [
            *(str(book["quantizer"]), f"{book['used']:,} ({100 * book['share']:.0f} %)", f"{book['entropy']:.2f}"),
            *(f"{book['perplexity']:.0f}", percent(book["voice"])),
            *(with_error(book[key], "nats", 2) for key in ("about_voice", "about_sound")),
        ]
        for book in books["quantizers"]
    ]
    parts.append(table(head, rows))

    heard = ["clean", *map(str, QUANTIZERS)]
    judged = [] if "skipped" in words else [("word", [words[name] for name in heard], words["chance"])]
    for kind, chance in CHANCES.items():
        judged.append((kind, [speakers[name][kind] for name in heard], speakers[chance]))
    head = ["heard right", "clean", *(f"{q} quantizers" for q in QUANTIZERS), "chance", "clips"]
    rows = [
        [kind, *map(percent, scores), f"{100 * chance:.1f} %", str(scores[0]["clips"])]
        for kind, scores, chance in judged
    ]
    parts.append(table(head, rows))

    if "skipped" not in continued:
        head = [f"{figures['model']}, {continued['num_quantizers']} quantizers"]
        head += [f"{kind} (chance {100 * continued[chance]:.1f} %)" for kind, chance in CHANCES.items()]
        rows = [
            [name, *(percent(continued[key][kind]) for kind in CHANCES), str(continued[key]["voice"]["clips"])]
            for key, name in CONTINUATIONS.items()
        ]
        parts.append(table([*head, "clips"], rows))
        length = f"mean length {continued['mean_seconds']:.2f} s"
        parts.append(f"Silent continuations: {percent(continued['silent'])} of {continued['prompts']}; {length}.")
    parts += [part["skipped"] for part in (words, continued) if "skipped" in part]
    timing = figures["timing"]
    speed = f"Encoded at {timing['encoded_times_real_time']:.0f} times real time"
    return "\n\n".join([*parts, f"{speed}; {timing['seconds']:.0f} s in all."])
