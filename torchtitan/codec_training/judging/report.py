"""The figures as tables."""

from typing import Any

from torchtitan.codec_training.judging.judge import QUANTIZERS


def tables(figures: dict[str, Any]) -> str:
    """The figures as Markdown."""

    def with_error(value: dict[str, Any], key: str, digits: int, factor: int = 1, unit: str = "") -> str:
        if value[key] is None:
            return ""
        error = "" if value["standard_error"] is None else f" ± {factor * value['standard_error']:.{digits}f}"
        return f"{factor * value[key]:.{digits}f}{error}{unit}"

    def mean(value: dict[str, Any], digits: int) -> str:
        return with_error(value, "mean", digits)

    def share(value: dict[str, Any]) -> str:
        return with_error(value, "accuracy", 1, 100, " %")

    def table(head: list[str], rows: list[list[str]]) -> str:
        lines = [head, ["---"] * len(head), *rows]
        return "\n".join(f"| {' | '.join(line)} |" for line in lines)

    trips, books, words, speakers = (figures[key] for key in ("round_trips", "codebooks", "words", "speakers"))
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

    head = ["quantizer", "entries used", "entropy, nats", "perplexity", f"voice (chance {100 * books['chance']:.1f} %)"]
    for what in ("voice", "sound"):
        head.append(f"nats about the {what} (of {books['quantizers'][0][f'about_{what}']['at_most']:.2f})")
    rows = []
    for book in books["quantizers"]:
        row = [str(book["quantizer"]), f"{book['used']:,} ({100 * book['share']:.0f} %)", f"{book['entropy']:.2f}"]
        row += [f"{book['perplexity']:.0f}", share(book["voice"])]
        rows.append([*row, *(with_error(book[key], "nats", 2) for key in ("about_voice", "about_sound"))])
    parts.append(table(head, rows))

    heard = ["clean", *map(str, QUANTIZERS)]
    head = ["heard right", "clean", *(f"{q} quantizers" for q in QUANTIZERS), "chance", "clips"]
    judged = [] if "skipped" in words else [("word", {name: words[name] for name in heard}, words["chance"])]
    for kind, chance in (("voice", "chance"), ("gender", "gender_chance")):
        judged.append((kind, {name: speakers[name][kind] for name in heard}, speakers[chance]))
    rows = [
        [kind, *map(share, found.values()), f"{100 * chance:.1f} %", str(found["clean"]["clips"])]
        for kind, found, chance in judged
    ]
    parts.append(table(head, rows))

    found = figures["continuations"]
    if "skipped" not in found:
        head = [f"{figures['model']}, {found['num_quantizers']} quantizers"]
        for kind, chance in (("voice", "chance"), ("gender", "gender_chance")):
            head.append(f"{kind} (chance {100 * found[chance]:.1f} %)")
        kinds = {
            "clean_prompt": "clean prompt",
            "clean_rest": "clean rest of the clip",
            "round_trip_of_rest": "its round trip",
            "continuation": "continuation",
        }
        rows = [
            [name, *(share(found[key][kind]) for kind in ("voice", "gender")), str(found[key]["voice"]["clips"])]
            for key, name in kinds.items()
        ]
        parts.append(table([*head, "clips"], rows))
        length = f"mean length {found['mean_seconds']:.2f} s"
        parts.append(f"Silent continuations: {share(found['silent'])} of {found['prompts']}; {length}.")
    parts += [part["skipped"] for part in (words, found) if "skipped" in part]
    timing = figures["timing"]
    speed = f"Encoded at {timing['encoded_times_real_time']:.0f} times real time"
    return "\n\n".join([*parts, f"{speed}; {timing['seconds']:.0f} s in all."])
