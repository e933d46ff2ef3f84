"""Rules, statistics and reports, all from samples tables: no model is needed."""

import json
import math
import runpy
import statistics
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from torchtitan.eval import report
from torchtitan.eval.metrics import (
    MetricsError,
    Rule,
    averages,
    clip_scores,
    first_differences,
    judge,
    pair_points,
    quantizer_losses,
    zerospeech,
)
from torchtitan.eval.results import Clip, samples_table
from torchtitan.eval.statistics import compare, mcnemar_p_value, standard_error, wilson_interval
from torchtitan.eval.suites import SALMON
from torchtitan.tools.errors import UserError

Q = 3
SETTINGS = {"benchmark": "sLM21", "model": {"name": "owner/model", "revision": None}}


def clips(task: str, pairs: int, seed: int, **columns: list) -> list[Clip]:
    """Pairs of clips of random lengths, codes and NLLs; the first frames of a pair are the same."""
    random = torch.Generator().manual_seed(seed)
    made = []
    for pair in range(pairs):
        shared = torch.randint(2048, (Q, int(torch.randint(4, (1,), generator=random))), generator=random)
        for side in ("positive", "negative"):
            own = torch.randint(2048, (Q, int(torch.randint(1, 6, (1,), generator=random))), generator=random)
            codes = torch.cat((shared, own), dim=1).to(torch.int16)
            nll = torch.rand(codes.numel() + 2, generator=random) * 9
            plain = {name: values[pair] for name, values in columns.items()}
            item = str(plain.pop("id", pair))
            made.append(Clip(task, pair, side, item, codes, nll, columns=plain))
    return made


def plain_score(clip: Clip, rule: Rule, begin: int) -> float:
    """A clip's score, target by target."""
    names = ["<audio>"] + [(t, q) for t in range(clip.codes.shape[1]) for q in range(Q)] + ["</audio>"]
    last = clip.codes.shape[1]
    values = []
    for name, value in zip(names, clip.nll.tolist(), strict=True):
        if name == "<audio>":
            frame, counts = -1, rule.targets == "all"
        elif name == "</audio>":
            frame, counts = last, rule.audio_end
        else:
            frame, q = name
            counts = {"all": True, "semantic": q == 0, "acoustic": q > 0}.get(rule.targets, rule.targets == f"q{q}")
        if rule.window_ms is not None:
            counts = counts and begin <= frame < begin + max(1, round(rule.window_ms / 80))
        if counts:
            values.append(value)
    if not values:
        return math.nan
    return sum(values) / len(values) if rule.reduction == "mean" else sum(values)


def begin_of(pair: list[Clip]) -> int | None:
    """The first frame in which two clips differ."""
    a, b = (clip.codes.T.tolist() for clip in pair)
    for frame, (left, right) in enumerate(zip(a, b, strict=False)):
        if left != right:
            return frame
    return None if len(a) == len(b) else min(len(a), len(b))


RULES = [
    Rule(),
    Rule("semantic"),
    Rule("acoustic", audio_end=False),
    Rule("q2"),
    Rule("all", reduction="sum"),
    Rule("semantic", audio_end=False, reduction="sum"),
    Rule("all", window_ms=160),
    Rule("semantic", window_ms=30),
    Rule("q1", audio_end=False, window_ms=400, reduction="sum"),
]


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_scores_are_those_of_a_plain_loop_over_the_targets(rule):
    made = clips("t", 20, 0)
    pairs = [made[i : i + 2] for i in range(0, len(made), 2)]
    expected = [plain_score(clip, rule, begin_of(pair) or 0) for pair in pairs for clip in pair]
    np.testing.assert_allclose(clip_scores(samples_table(made, Q, {}), rule), expected, rtol=1e-6)


def test_where_clips_differ():
    def pair(number: int, positive: list[int], negative: list[int]) -> list[Clip]:
        sides = zip(("positive", "negative"), (positive, negative), strict=True)
        return [
            Clip("t", number, side, "", torch.tensor([codes]), torch.zeros(len(codes) + 2)) for side, codes in sides
        ]

    unreadable = [Clip("t", 4, "positive", "", error="no audio"), pair(4, [1], [1])[1]]
    made = [*pair(0, [1, 2, 3], [1, 5, 3]), *pair(1, [1, 2], [1, 2, 3]), *pair(2, [7], [7]), *pair(3, [1], [2])]
    samples = samples_table(made + unreadable, 1, {})
    assert first_differences(samples) == {("t", 0): 1, ("t", 1): 2, ("t", 2): None, ("t", 3): 0}
    with pytest.raises(MetricsError, match="no codes"):
        clip_scores(samples.drop_columns("codes"), Rule(window_ms=80))
    # Identical clips tie, in a window too.
    assert pair_points(samples, Rule(window_ms=80))["t"][2].tie
    result = judge(samples, Rule())["t"]
    assert result.identical_pairs == 1
    assert judge(samples.drop_columns("codes"), Rule())["t"].identical_pairs is None


def test_a_window_that_holds_no_target_leaves_its_pair_out():
    made = [
        Clip("t", 0, "positive", "0", torch.zeros(1, 1), torch.ones(3)),
        Clip("t", 0, "negative", "0", torch.zeros(1, 2), torch.ones(4)),
    ]
    samples = samples_table(made, 1, {})
    (left_out,) = judge(samples, Rule(audio_end=False, window_ms=80))["t"].left_out
    assert left_out["reason"] == "the positive clip's score is nan"
    assert judge(samples, Rule(window_ms=80))["t"].pairs == 1


def test_ties_are_half_or_wrong():
    made = [Clip("t", 0, side, "0", torch.zeros(1, 1), torch.ones(3)) for side in ("positive", "negative")]
    samples = samples_table(made, 1, {})
    assert judge(samples, Rule())["t"].accuracy == 0.5
    wrong = judge(samples, Rule(ties="wrong"))["t"]
    assert (wrong.accuracy, wrong.ties) == (0.0, 1)


@pytest.mark.parametrize(
    "values", [{"targets": "phones"}, {"targets": "q"}, {"reduction": "max"}, {"ties": "x"}, {"window_ms": 0.0}]
)
def test_rules_that_there_are_not(values):
    with pytest.raises(UserError, match=next(iter(values))):
        Rule(**values)


def test_a_quantizer_that_is_not_there():
    with pytest.raises(MetricsError, match="q0 to q2"):
        judge(samples_table(clips("t", 1, 0), Q, {}), Rule("q3"))


# --- statistics


def test_wilson_intervals_are_the_published_ones():
    # Newcombe (1998), table I: 81 of 263, 15 of 148, 0 of 20, 1 of 29.
    for right, count, low, high in ((81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611)):
        assert wilson_interval(right / count, count) == pytest.approx((low, high), abs=5e-5)
    assert wilson_interval(1 / 29, 29) == pytest.approx((0.0061, 0.1718), abs=5e-5)
    with pytest.raises(ValueError, match="at least one"):
        wilson_interval(0.5, 0)


def test_standard_error():
    points = [1.0, 0.0, 0.5, 1.0, 1.0]
    assert standard_error(points) == pytest.approx(statistics.stdev(points) / math.sqrt(5))
    assert standard_error([1.0]) is None


def test_mcnemar():
    assert mcnemar_p_value(1, 8) == 0.0390625
    assert mcnemar_p_value(8, 1) == 0.0390625
    assert mcnemar_p_value(0, 0) == mcnemar_p_value(5, 5) == 1.0
    # The normal approximation with continuity correction, where it is good.
    z = (abs(5100 - 4900) - 1) / math.sqrt(10_000)
    assert mcnemar_p_value(5100, 4900) == pytest.approx(math.erfc(z / math.sqrt(2)), rel=1e-2)


def test_two_models_on_the_same_pairs():
    random = np.random.default_rng(0)
    first = (random.random(400) < 0.6).astype(float)
    second = np.where(random.random(400) < 0.3, 1.0, first)
    found = compare(first, second)
    assert found.difference == pytest.approx(second.mean() - first.mean())
    assert (found.first_only, found.second_only) == (0, int(((first == 0) & (second == 1)).sum()))
    error = statistics.stdev(second - first) / 20
    assert found.low == pytest.approx(found.difference - 1.96 * error, abs=0.005)
    assert found.high == pytest.approx(found.difference + 1.96 * error, abs=0.005)
    assert compare(first, first).p_value == 1
    with pytest.raises(ValueError, match="same pairs"):
        compare(first, second[1:])


def test_averages_of_salmon():
    made = [clip for i, task in enumerate(SALMON.tasks) for clip in clips(task, 3 + i, i)]
    results = judge(samples_table(made, Q, {}), Rule())
    found = averages(results)
    assert [found[group]["tasks"] for group in ("all", "consistency", "alignment")] == [8, 6, 2]
    mean = statistics.mean(results[task].accuracy for task in SALMON.tasks[:6])
    assert found["consistency"]["mean"] == pytest.approx(mean)
    right = [results[task].accuracy * results[task].pairs for task in SALMON.tasks[6:]]
    assert found["alignment"]["pairs"] == 9 + 10
    assert found["alignment"]["pooled"] == pytest.approx(sum(right) / 19)
    errors = [results[task].standard_error for task in SALMON.tasks[6:]]
    assert found["alignment"]["standard_error"] == pytest.approx(math.hypot(*errors) / 2)
    assert found["alignment"]["pooled_standard_error"] == pytest.approx(math.hypot(9 * errors[0], 10 * errors[1]) / 19)


# --- losses by quantizer


def of_lengths(quantizers: int, lengths: list[tuple[int, int]], seed: int = 0) -> list[Clip]:
    """Pairs of clips of so many frames, positive and negative, with random NLLs."""
    random = torch.Generator().manual_seed(seed)
    made = []
    for pair, frames in enumerate(lengths):
        for side, count in zip(("positive", "negative"), frames, strict=True):
            nll = torch.rand(quantizers * count + 2, generator=random) * 9
            made.append(Clip("t", pair, side, str(pair), torch.zeros(quantizers, count), nll))
    return made


@pytest.mark.parametrize("quantizers", [1, 2, 4])
def test_losses_by_quantizer_are_those_of_a_plain_loop(quantizers):
    made = of_lengths(quantizers, [(3, 5), (1, 2), (4, 4), (7, 1), (2, 6), (5, 3)])
    # Pairs 2 and 4 are left out as a whole, 2 for an NLL of its negative clip, 4 for a clip that could not be read.
    made[5].nll[-2] = math.nan
    made[8] = Clip("t", 4, "positive", "4", error="no audio")
    found = quantizer_losses(samples_table(made, quantizers, {}))
    assert list(found) == ["t"]
    for side, start in (("positive", 0), ("negative", 1)):
        assert len(found["t"][side]) == quantizers
        for q, loss in enumerate(found["t"][side]):
            sums, counts = [], []
            for pair in (0, 1, 3, 5):
                units = made[2 * pair + start].nll.tolist()[1:-1]
                values = [value for i, value in enumerate(units) if i % quantizers == q]
                sums.append(sum(values))
                counts.append(len(values))
            means = [total / count for total, count in zip(sums, counts, strict=True)]
            assert (loss["clips"], loss["frames"]) == (4, sum(counts))
            assert loss["mean"] == pytest.approx(statistics.mean(means))
            assert loss["standard_error"] == pytest.approx(statistics.stdev(means) / 2)
            ratio = sum(sums) / sum(counts)
            residuals = [total - ratio * count for total, count in zip(sums, counts, strict=True)]
            squares = sum(residual**2 for residual in residuals)
            assert loss["pooled"] == pytest.approx(ratio)
            assert loss["pooled_standard_error"] == pytest.approx(math.sqrt(4 / 3 * squares) / sum(counts))


def test_frames_of_a_clip_are_no_independent_draws():
    """Clips that repeat one value each: more frames of the same clips make no figure surer."""
    errors = []
    for frames in (2, 200):
        made = [
            Clip("t", pair, side, "", torch.zeros(1, frames), torch.full((frames + 2,), float(pair)))
            for pair in range(4)
            for side in ("positive", "negative")
        ]
        loss = quantizer_losses(samples_table(made, 1, {}))["t"]["positive"][0]
        errors += [loss["standard_error"], loss["pooled_standard_error"]]
    assert errors == pytest.approx([statistics.stdev(range(4)) / 2] * 4)


def test_losses_by_quantizer_of_one_clip_and_of_none():
    loss = quantizer_losses(samples_table(of_lengths(2, [(3, 1)]), 2, {}))["t"]["positive"][1]
    assert loss["mean"] == loss["pooled"] > 0
    assert (loss["standard_error"], loss["pooled_standard_error"]) == (None, None)
    made = of_lengths(2, [(3, 1)])
    made[0].nll[0] = math.inf
    loss = quantizer_losses(samples_table(made, 2, {}))["t"]["negative"][0]
    assert loss == {"clips": 0, "frames": 0} | dict.fromkeys(
        ("mean", "standard_error", "pooled", "pooled_standard_error")
    )


def test_a_report_has_the_losses_by_quantizer(tmp_path, capsys):
    table = write(tmp_path / "a", 0, benchmark="SALMON", tasks=SALMON.tasks)
    pq.write_table(table.drop_columns(["codes"]), tmp_path / "a" / "samples.parquet")
    assert run(tmp_path) == 0
    data = json.loads((tmp_path / "a" / "report.json").read_text())["benchmarks"]["SALMON"]["models"]["owner/model"]
    expected = quantizer_losses(table)
    assert data["quantizers"] == expected
    printed = capsys.readouterr().out
    loss = expected["bg_alignment"]["negative"][2]
    assert f"{loss['mean']:.3f} ± {loss['standard_error']:.3f} |\n" in printed
    assert f"{loss['pooled']:.3f} ± {loss['pooled_standard_error']:.3f} |\n" in printed
    rows = [line for line in printed.splitlines() if "| positive |" in line or "| negative |" in line]
    assert len(rows) == 2 * 2 * len(SALMON.tasks)


# --- ZeroSpeech's rules


def of_points(points: list[float], **columns: list):
    """A samples table whose pairs count these points."""
    made = []
    for pair, point in enumerate(points):
        plain = {name: values[pair] for name, values in columns.items()}
        item = str(plain.pop("id", pair))
        for side, value in (("positive", 1.0), ("negative", 0.5 + point)):
            made.append(Clip("t", pair, side, item, torch.zeros(1, 1), torch.full((3,), value), columns=dict(plain)))
    return samples_table(made, 1, {})


def test_voices_are_averaged_before_items():
    table = of_points([1, 1, 0, 0.5, 0], id=["a", "a", "a", "b", "c"], voice=["x", "y", "z", "x", "x"])
    found = zerospeech(table, Rule())["t"]
    assert found["accuracy"] == pytest.approx((2 / 3 + 0.5 + 0) / 3)
    assert found["items"] == 3
    assert found["standard_error"] == pytest.approx(statistics.stdev([2 / 3, 0.5, 0]) / math.sqrt(3))
    assert set(found) == {"accuracy", "standard_error", "items"}
    assert judge(table, Rule())["t"].zerospeech == found


def test_words_by_frequency_and_length():
    table = of_points(
        [1, 0, 1, 0, 1, 0, 1],
        id=list("abcdefg"),
        voice=["x"] * 7,
        frequency=[0, 1, 4, 5, 20, 99, 100],
        length=[3, 3, 4, 4, 4, 5, 5],
    )
    found = zerospeech(table, Rule())["t"]
    # The bands of the challenge's program: [0, 1), [1, 5), [5, 20), [20, 100), [100, inf).
    by_band = {name: (share["accuracy"], share["items"]) for name, share in found["by_frequency"].items()}
    assert by_band == {"oov": (1, 1), "1-5": (0.5, 2), "6-20": (0, 1), "21-100": (0.5, 2), ">100": (1, 1)}
    assert list(found["by_frequency"]) == ["oov", "1-5", "6-20", "21-100", ">100"]
    assert (found["in_vocabulary"]["accuracy"], found["in_vocabulary"]["items"]) == (0.5, 6)
    assert {name: share["items"] for name, share in found["by_length"].items()} == {"3": 2, "4": 3, "5": 2}


def test_frequencies_may_be_texts_or_missing():
    table = of_points([1, 0, 1, 0], id=list("abcd"), voice=["x"] * 4, frequency=["oov", "7", "", None])
    found = zerospeech(table, Rule())["t"]
    assert {name: share["items"] for name, share in found["by_frequency"].items()} == {"oov": 1, "6-20": 1}
    assert found["in_vocabulary"]["items"] == 1
    assert found["items"] == 4


def test_sentences_by_type_and_subtype():
    table = of_points(
        [1, 0, 0, 1],
        id=["0", "0", "0", "1"],
        voice=["x", "y", "x", "x"],
        type=["agreement", "agreement", "binding", "binding"],
        subtype=["a1", "a1", "b1", "b2"],
    )
    found = zerospeech(table, Rule())["t"]
    # The same number in another type is another sentence.
    assert found["items"] == 3
    assert {name: share["accuracy"] for name, share in found["by_type"].items()} == {"agreement": 0.5, "binding": 0.5}
    assert {name: share["items"] for name, share in found["by_subtype"].items()} == {"a1": 1, "b1": 1, "b2": 1}


def test_pairs_that_are_left_out_are_in_no_item():
    table = of_points([1, math.nan, 0], id=["a", "a", "b"], voice=["x", "y", "x"])
    assert zerospeech(table, Rule())["t"]["accuracy"] == 0.5


def test_without_voices_there_are_no_such_figures():
    assert zerospeech(of_points([1], id=["a"]), Rule()) == {}


# --- reports


def write(folder: Path, seed: int, name: str = "owner/model", benchmark: str = "sLM21", tasks=("sWUGGY", "sBLIMP")):
    folder.mkdir(parents=True)
    made = [clip for i, task in enumerate(tasks) for clip in clips(task, 12, seed + i)]
    table = samples_table(made, Q, {"benchmark": benchmark, "model": {"name": name}})
    pq.write_table(table, folder / "samples.parquet")
    return table


def run(*arguments: object) -> int:
    return report.command(report.Options([Path(str(a)) for a in arguments]))


def test_a_report_of_one_model(tmp_path, capsys):
    table = write(tmp_path / "sLM21" / "owner" / "model", 0)
    assert run(tmp_path / "sLM21") == 0
    printed = capsys.readouterr().out
    folder = tmp_path / "sLM21" / "owner" / "model"
    assert (folder / "report.md").read_text() in printed
    data = json.loads((folder / "report.json").read_text())["benchmarks"]["sLM21"]
    expected = judge(table, Rule("semantic"))
    tasks = data["models"]["owner/model"]["tasks"]
    assert {name: task["accuracy"] for name, task in tasks.items()} == {n: r.accuracy for n, r in expected.items()}
    assert f"{expected['sWUGGY'].accuracy:.4f} ± {expected['sWUGGY'].standard_error:.4f} (12)" in printed
    assert data["rule"]["targets"] == "semantic"
    assert (folder / "sLM21.png").read_bytes().startswith(b"\x89PNG")


def test_several_models_are_compared_on_the_pairs_of_both(tmp_path, capsys):
    tables = [write(tmp_path / name, 10 * i, name) for i, name in enumerate(("first", "second"))]
    assert run(tmp_path / "first", tmp_path / "second") == 0
    data = json.loads((tmp_path / "report.json").read_text())["benchmarks"]["sLM21"]
    points = [[p.point for p in pair_points(table, Rule("semantic"))["sBLIMP"]] for table in tables]
    found = data["comparisons"]["second"]["sBLIMP"]
    assert found["difference"] == pytest.approx(statistics.mean(points[1]) - statistics.mean(points[0]))
    assert found["pairs"] == 12
    printed = capsys.readouterr().out
    assert "second against first" in printed
    assert "McNemar p" in printed


def test_rules_and_variants(tmp_path, capsys):
    table = write(tmp_path / "a", 3)
    options = report.Options([tmp_path], targets="q1", reduction="sum", audio_end=False, window_ms=160, variants=True)
    assert report.command(options) == 0
    data = json.loads((tmp_path / "a" / "report.json").read_text())["benchmarks"]["sLM21"]
    rule = Rule("q1", False, "sum", "half", 160)
    assert data["models"]["owner/model"]["tasks"]["sWUGGY"]["accuracy"] == judge(table, rule)["sWUGGY"].accuracy
    found = data["variants"]["owner/model"]
    assert len(found) == 6 * 2 * 2
    variant = Rule("acoustic", True, "mean", "half", 160)
    assert found["acoustic, mean, with </audio>"]["sBLIMP"] == judge(table, variant)["sBLIMP"].accuracy
    assert "acoustic, mean, with </audio>" in capsys.readouterr().out


def test_samples_without_codes_are_enough_where_codes_are_not_needed(tmp_path):
    table = write(tmp_path / "a", 0)
    pq.write_table(table.drop_columns(["codes", "error", "context_cut"]), tmp_path / "a" / "samples.parquet")
    assert run(tmp_path) == 0
    data = json.loads((tmp_path / "a" / "report.json").read_text())["benchmarks"]["sLM21"]
    found = data["models"]["owner/model"]["tasks"]["sWUGGY"]["accuracy"]
    assert found == judge(table, Rule("semantic"))["sWUGGY"].accuracy
    with pytest.raises(UserError, match="no codes"):
        report.command(report.Options([tmp_path], window_ms=80))


def test_a_chart_of_salmon_has_the_published_points(tmp_path):
    from torchtitan.eval import charts

    write(tmp_path / "a", 0, benchmark="SALMON", tasks=SALMON.tasks)
    assert run(tmp_path) == 0
    assert (tmp_path / "a" / "SALMON.png").stat().st_size > 10_000
    source, published = charts.references("SALMON")
    assert "slp-rl/salmon" in source
    assert published["humans"]["gender_consistency"] == 98.6
    assert published["pGSLM"]["speaker_consistency"] == 83.0
    assert published["SpiritLM 7B (expressive)"]["bg_alignment"] == 59.5
    assert all(set(figures) == set(SALMON.tasks) for figures in published.values())
    assert charts.references("sLM21") == ("", {})


def test_a_chart_where_all_or_no_pairs_are_right(tmp_path):
    """There one end of the interval is the accuracy itself; rounding must not put it on the wrong side."""
    from torchtitan.eval import charts

    assert all(wilson_interval(share, n)[int(share)] == share for share in (0.0, 1.0) for n in range(1, 200))
    results = [judge(of_points([point] * 12), Rule()) for point in (0.0, 1.0)]
    charts.draw(tmp_path / "chart.png", "SALMON", {"none": results[0], "all": results[1]})
    assert (tmp_path / "chart.png").read_bytes().startswith(b"\x89PNG")


def test_long_names_stay_within_a_chart(tmp_path, monkeypatch):
    from matplotlib.figure import Figure

    from torchtitan.eval import charts

    inside = []
    save = Figure.savefig

    def saved(figure, *arguments, **options):
        save(figure, *arguments, **options)
        (legend,) = figure.legends
        box = legend.get_window_extent()
        inside.append(box.x0 >= 0 and box.x1 <= figure.bbox.width)

    monkeypatch.setattr(Figure, "savefig", saved)
    results = judge(of_points([0.0, 1.0]), Rule())
    for name in ("short", "outputs/a-run-whose-name-tells-its-model-and-its-data/step-100000", 200 * "x"):
        charts.draw(tmp_path / "chart.png", "sLM21", {f"{name}{i}": results for i in range(3)})
    assert inside == [True] * 3


def test_pairs_of_other_data_are_not_compared(tmp_path):
    """Pairs are the same ones when number and id are."""
    write(tmp_path / "a", 0, "first")
    table = write(tmp_path / "b", 1, "second")
    items = [f"other {row['item']}" if row["pair"] < 4 else row["item"] for row in table.to_pylist()]
    at = table.column_names.index("item")
    pq.write_table(table.set_column(at, "item", [items]), tmp_path / "b" / "samples.parquet")
    assert run(tmp_path) == 0
    data = json.loads((tmp_path / "report.json").read_text())["benchmarks"]["sLM21"]
    assert data["comparisons"]["second"]["sBLIMP"]["pairs"] == 8


def test_wrong_input_is_one_sentence(tmp_path, monkeypatch, capsys):
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "samples.parquet").write_bytes(b"PAR1 and no more")
    (tmp_path / "other").mkdir()
    pq.write_table(samples_table([], 1, {}).drop_columns("nll"), tmp_path / "other" / "samples.parquet")
    for folder, said in (("nowhere", "no samples.parquet"), ("broken", "cannot be read"), ("other", "lacks nll")):
        monkeypatch.setattr(sys, "argv", ["report", str(tmp_path / folder)])
        with pytest.raises(SystemExit) as stopped:
            runpy.run_path(report.__file__, run_name="__main__")
        assert stopped.value.code == 2
        lines = capsys.readouterr().err.strip().splitlines()
        assert len(lines) == 1
        assert said in lines[0]


def docs_section(title: str) -> str:
    text = (Path(__file__).parents[1] / "docs" / "evaluation.md").read_text("utf-8")
    return text.split(f"\n## {title}\n")[1].split("\n## ")[0]


def test_the_docs_list_every_column_and_setting(tmp_path):
    cells = [
        [cell.strip(" `") for cell in line.split("|")[1:]] for line in docs_section("samples.parquet").splitlines()
    ]
    listed = {row[0]: row[1:3] for row in cells if len(row) == 6}
    table = write(tmp_path / "a", 0)
    kinds = {field.name: str(field.type) for field in table.schema}
    arrow = {"list of int16": "list<item: int16>", "list of float32": "list<item: float>", "float64": "double"}
    written = {name: arrow.get(kind, kind) for name, (kind, _) in listed.items() if name in kinds}
    assert list(written.items()) == list(kinds.items())
    assert {"voice`, `type`, `subtype", "frequency`, `length"} < listed.keys()
    for name in kinds:
        pq.write_table(table.drop_columns([name]), tmp_path / "a" / "samples.parquet")
        if listed[name][1] == "required":
            with pytest.raises(UserError, match=f"lacks {name}"):
                report.find_runs([tmp_path])
        else:
            assert run(tmp_path) == 0
    pq.write_table(table.replace_schema_metadata({b"settings": b"{}"}), tmp_path / "a" / "samples.parquet")
    with pytest.raises(UserError, match="num_quantizers"):
        report.find_runs([tmp_path])


def test_the_example_in_the_docs_is_a_report(tmp_path, monkeypatch):
    """Another system's likelihoods, as the docs say to write them."""
    monkeypatch.chdir(tmp_path)
    exec(docs_section("samples.parquet").split("```python\n")[1].split("```")[0], {})
    assert run(".") == 0
    found = json.loads((tmp_path / "report.json").read_text())["benchmarks"]["sLM21"]["models"]["my/system"]
    assert found["tasks"]["sWUGGY"]["accuracy"] == 1.0
    losses = found["quantizers"]["sWUGGY"]
    assert [loss["mean"] for loss in losses["positive"]] == pytest.approx([2.3, 3.55])
    assert [loss["mean"] for loss in losses["negative"]] == pytest.approx([2.9, 3.5])


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda rows: rows[0].update(side="left"), 'side "left"'),
        (lambda rows: rows[1].update(side="positive"), "two rows for the same side"),
        (lambda rows: rows[1].update(frames=None), "column frames has no value"),
        (lambda rows: [row.update(nll="none") for row in rows], "column nll is of type string"),
        (lambda rows: rows[0].update(frames=1), "row 0 has 4 NLLs, but its 1 frames need 3"),
    ],
)
def test_rows_that_cannot_be_reported_are_one_sentence(tmp_path, change, said):
    clip = {"task": "t", "pair": 0, "item": "0", "frames": 2, "nll": [1.0, 2.0, 3.0, 4.0], "cut": 0.0}
    rows = [{**clip, "side": side} for side in ("positive", "negative")]
    change(rows)
    table = pa.Table.from_pylist(rows).replace_schema_metadata({"num_quantizers": "1"})
    pq.write_table(table, tmp_path / "samples.parquet")
    with pytest.raises(UserError, match=said) as caught:
        run(tmp_path)
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("metadata", [{"num_quantizers": "four"}, {"num_quantizers": "0"}, {"num_quantizers": "2.5"}])
def test_wrong_metadata_are_one_sentence(tmp_path, metadata):
    pq.write_table(samples_table([], 1, {}).replace_schema_metadata(metadata), tmp_path / "samples.parquet")
    with pytest.raises(UserError, match="must have a number num_quantizers"):
        run(tmp_path)


def test_the_same_name_twice_is_told_apart(tmp_path):
    write(tmp_path / "a", 0)
    write(tmp_path / "b", 1)
    names = [run.name for run in report.find_runs([tmp_path])]
    assert len(set(names)) == 2
    assert all(name.startswith("owner/model (") for name in names)
