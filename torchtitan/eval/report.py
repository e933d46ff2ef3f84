"""Tables and charts from the samples.parquet files of evaluations, for one model or several side by side.

    python -m torchtitan.eval.report RESULTS_DIR... [--targets semantic] [--reduction sum] [--window_ms 500] ...

The report computes all figures from the stored negative log-likelihoods, under any rule, without the model. It writes
report.md, report.json and one chart per benchmark.
"""

import itertools
import json
import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from torchtitan.eval.metrics import (
    SIDES,
    Rule,
    TaskResult,
    averages,
    judge,
    num_quantizers,
    pair_points,
    quantizer_losses,
)
from torchtitan.eval.results import Replacing, format_share, make_folder
from torchtitan.eval.statistics import Comparison, compare
from torchtitan.eval.suites import BENCHMARKS, Benchmark
from torchtitan.tools.errors import UserError, run_command


@dataclass
class Options:
    """The command line of a report."""

    results: list[Path]
    """Folders with a samples.parquet in them or below them."""
    targets: str | None = None
    """Scored tokens: all, semantic, acoustic, or q0, q1, ... for one quantizer. Default: those of the benchmark."""
    reduction: Literal["mean", "sum"] = "mean"
    """Whether a clip's score is the mean or the sum of the negative log-likelihoods of these tokens."""
    audio_end: bool = True
    """Also score the end of the clip, </audio>."""
    ties: Literal["half", "wrong"] = "half"
    """What a pair with equal scores counts: half a point, or nothing, as in the original evaluation."""
    window_ms: float | None = None
    """Score only a window of this length, which begins where a pair's codes first differ (localized likelihood)."""
    variants: bool = False
    """Also report the accuracy for every combination of targets, reduction and audio_end."""
    output_dir: Path | None = None
    """Output folder. Default: the deepest folder that contains all results."""
    plot: bool = True
    """Draw charts."""
    seed: int = 0
    """Seed of the bootstrap."""

    def rule(self, benchmark: Benchmark | None) -> Rule:
        targets = self.targets or (benchmark.rule.targets if benchmark else "all")
        return Rule(targets, self.audio_end, self.reduction, self.ties, self.window_ms)


@dataclass
class Run:
    """One model's samples of one benchmark.

    Attributes:
        name: name of the model in the report.
        benchmark: name of the benchmark.
        samples: the table of samples.parquet.
        results: the figures of each task.
    """

    name: str
    benchmark: str
    folder: Path
    samples: Any
    results: dict[str, TaskResult] = field(default_factory=dict)


def find_runs(paths: Sequence[Path]) -> list[Run]:
    """All samples.parquet in or below some folders, with unique names.

    Raises:
        UserError: a folder has no samples.parquet, or one of them is not a samples table.
    """
    files: dict[Path, None] = {}
    for path in paths:
        path = path.expanduser()
        own = path if path.name == "samples.parquet" else path / "samples.parquet"
        found = [own] if own.is_file() else sorted(path.rglob("samples.parquet"))
        if not found:
            raise UserError(f"{path}: there is no samples.parquet in or below this folder.")
        files.update(dict.fromkeys(Path(os.path.abspath(file)) for file in found))
    runs = [_read(file) for file in files]
    for run in runs:
        same = [other for other in runs if (other.benchmark, other.name) == (run.benchmark, run.name)]
        if len(same) > 1:
            for other in same:
                other.name = f"{other.name} ({other.folder})"
    return runs


def _read(file: Path) -> Run:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        samples = pq.read_table(file)
    except (pa.ArrowInvalid, OSError) as error:
        raise UserError(f"{file}: this file cannot be read ({str(error).splitlines()[0]}).") from None
    missing = {"task", "pair", "side", "item", "frames", "nll", "cut"} - set(samples.column_names)
    metadata = samples.schema.metadata or {}
    if missing or b"num_quantizers" not in metadata:
        lack = ", ".join(sorted(missing)) or "num_quantizers in its metadata"
        raise UserError(f"{file}: this is not the samples table of an evaluation; it lacks {lack}.")
    try:
        settings, quantizers = json.loads(metadata.get(b"settings", b"{}")), num_quantizers(samples)
    except ValueError:
        settings = quantizers = None
    if not isinstance(settings, dict) or type(quantizers) is not int or quantizers < 1:
        raise UserError(f"{file}: its metadata must have a number num_quantizers and an object settings, as JSON.")
    if "error" not in samples.column_names:
        samples = samples.append_column("error", pa.nulls(samples.num_rows, pa.string()))
    if "context_cut" not in samples.column_names:
        samples = samples.append_column("context_cut", pa.array([0.0] * samples.num_rows, pa.float64()))
    samples = _typed(file, samples)
    if others := set(samples["side"].unique().to_pylist()) - set(SIDES):
        raise UserError(f'{file}: a row has the side "{min(others)}"; it must be {" or ".join(SIDES)}.')
    if samples.group_by(["task", "pair", "side"]).aggregate([]).num_rows < samples.num_rows:
        raise UserError(f"{file}: a pair has two rows for the same side.")
    model = settings.get("model")
    model = (model.get("name") if isinstance(model, dict) else model) or file.parent.name
    if os.path.isabs(str(model)) or str(model).startswith((".", "~")):
        model = os.path.join(*Path(os.path.abspath(os.path.expanduser(model))).parts[-2:])
    return Run(str(model), _benchmark_of(settings, samples), file.parent, samples)


def _typed(file: Path, samples: Any) -> Any:
    """The table with the types of docs/evaluation.md; another program may have written wider types."""
    import pyarrow as pa

    kinds = dict.fromkeys(("task", "side", "item", "error"), pa.string()) | {"pair": pa.int64(), "frames": pa.int32()}
    kinds |= {"codes": pa.list_(pa.int16()), "nll": pa.list_(pa.float32())}
    kinds |= dict.fromkeys(("cut", "context_cut"), pa.float64())
    for at, name in enumerate(samples.column_names):
        if name not in kinds:
            continue
        try:
            column = samples[name].cast(kinds[name])
        except pa.ArrowException:
            raise UserError(f"{file}: column {name} is of type {samples[name].type}, not {kinds[name]}.") from None
        if name not in ("nll", "codes", "error") and column.null_count:
            raise UserError(f"{file}: column {name} has no value in some row.")
        samples = samples.set_column(at, name, column)
    return samples


def _benchmark_of(settings: dict[str, Any], samples: Any) -> str:
    tasks = set(samples["task"].unique().to_pylist())
    known = (name for name, benchmark in BENCHMARKS.items() if tasks <= set(benchmark.tasks))
    return settings.get("benchmark") or next(known, ", ".join(sorted(tasks)))


def variants(rule: Rule, quantizers: int) -> Iterator[tuple[str, Rule]]:
    """Every combination of targets, reduction and audio_end, with its name."""
    targets = ["all", "semantic", *(["acoustic"] if quantizers > 1 else []), *(f"q{q}" for q in range(quantizers))]
    reductions: tuple[Literal["mean", "sum"], ...] = ("mean", "sum")
    for name, reduction, audio_end in itertools.product(targets, reductions, (True, False)):
        changed = replace(rule, targets=name, reduction=reduction, audio_end=audio_end)
        yield f"{name}, {reduction}, {'with' if audio_end else 'without'} </audio>", changed


def comparisons(first: Run, second: Run, rule: Rule, seed: int = 0) -> dict[str, Comparison]:
    """Compare two models by task, on the pairs that count in the accuracies of both."""
    before, after = (pair_points(run.samples, rule) for run in (first, second))
    found = {}
    for task in before:
        # By number and id, since other data or another order give other pairs.
        a, b = ({(pair.pair, pair.item): pair.point for pair in points.get(task, [])} for points in (before, after))
        common = [pair for pair, point in a.items() if point is not None and b.get(pair) is not None]
        if common:
            found[task] = compare([a[pair] or 0.0 for pair in common], [b[pair] or 0.0 for pair in common], seed)
    return found


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table whose columns are also aligned in plain text."""
    widths = [max(len(row[i]) for row in (header, *rows)) for i in range(len(header))]

    def line(cells: Sequence[str]) -> str:
        aligned = [
            cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(cells, widths, strict=True))
        ]
        return f"| {' | '.join(aligned)} |"

    rule = "| " + " | ".join("-" * w if i == 0 else "-" * (w - 1) + ":" for i, w in enumerate(widths)) + " |"
    return "\n".join([line(header), rule, *map(line, rows)])


def make_report(runs: Sequence[Run], options: Options) -> tuple[str, dict[str, Any]]:
    """The report as Markdown, and as the content of report.json. Sets the results of the runs.

    Raises:
        UserError: a rule does not fit the samples.
    """
    parts: list[str] = []
    data: dict[str, Any] = {"benchmarks": {}}
    for name in dict.fromkeys(run.benchmark for run in runs):
        members = [run for run in runs if run.benchmark == name]
        rule = options.rule(BENCHMARKS.get(name))
        for run in members:
            run.results = judge(run.samples, rule)
        said = rule.describe()
        parts += [f"## {name}", "\n".join(f"- {key}: {text}" for key, text in said.items())]
        parts.append(_accuracies(members))
        entry: dict[str, Any] = {"rule": asdict(rule), "rule_in_words": said, "models": {}}
        for run in members:
            entry["models"][run.name] = {
                "folder": str(run.folder),
                "tasks": {task: asdict(result) for task, result in run.results.items()},
                "averages": averages(run.results),
                "quantizers": (losses := quantizer_losses(run.samples)),
            }
            parts += _quantizers(run.name, losses)
        parts += list(_zerospeech(members))
        if len(members) > 1:
            entry["comparisons"] = {}
            for run in members[1:]:
                found = comparisons(members[0], run, rule, options.seed)
                entry["comparisons"][run.name] = {task: asdict(one) for task, one in found.items()}
                parts += [f"{run.name} against {members[0].name}, on the pairs of both:", _compared(found)]
        if options.variants:
            entry["variants"] = {}
            for run in members:
                results = {v: judge(run.samples, r) for v, r in variants(rule, num_quantizers(run.samples))}
                entry["variants"][run.name] = {
                    variant: {task: result.accuracy for task, result in found.items()}
                    for variant, found in results.items()
                }
                rows = [
                    [v, *(format_share(result.accuracy) for result in found.values())] for v, found in results.items()
                ]
                parts += [f"{run.name}, under other rules:", table(["rule", *run.results], rows)]
        data["benchmarks"][name] = entry
    return "\n\n".join(parts) + "\n", data


def _accuracies(runs: Sequence[Run]) -> str:
    tasks = dict.fromkeys(task for run in runs for task in run.results)
    rows = []
    for task in tasks:
        cells = []
        for run in runs:
            result = run.results.get(task)
            cells.append("" if result is None else _cell(result.accuracy, result.standard_error, result.pairs))
        rows.append([task, *cells])
    found = [averages(run.results) for run in runs]
    for group in dict.fromkeys(group for one in found for group in one):
        for kind, error in (("mean", "standard_error"), ("pooled", "pooled_standard_error")):
            cells = [_cell(o[group][kind], o[group][error], o[group]["pairs"]) if group in o else "" for o in found]
            rows.append([f"{kind} of {group}", *cells])
    for label, count in (
        ("pairs left out", lambda result: len(result.left_out)),
        ("clips cut", lambda result: result.cut_clips + result.context_cut_clips),
    ):
        rows.append([label, *(str(sum(map(count, run.results.values()))) for run in runs)])
    return table(["task", *(run.name for run in runs)], rows)


def _cell(accuracy: float | None, error: float | None, pairs: int) -> str:
    return f"{format_share(accuracy)} ± {format_share(error)} ({pairs})"


def _quantizers(name: str, losses: dict[str, dict[str, list[dict[str, Any]]]]) -> Iterator[str]:
    """The loss of each quantizer of a model, with a row per task and side."""
    for kind, error, said in (
        ("mean", "standard_error", "mean over clips of each clip's mean"),
        ("pooled", "pooled_standard_error", "mean over all frames"),
    ):
        rows = [
            [task, side, str(found[0]["clips"]), *(f"{_nats(loss[kind])} ± {_nats(loss[error])}" for loss in found)]
            for task, sides in losses.items()
            for side, found in sides.items()
        ]
        if not rows:
            return
        yield f"{name}, negative log-likelihood in nats by quantizer, {said}:"
        yield table(["task", "side", "clips", *(f"q{q}" for q in range(len(rows[0]) - 3))], rows)


def _nats(value: float | None) -> str:
    return f"{math.nan if value is None else value:.3f}"


def _zerospeech(runs: Sequence[Run]) -> Iterator[str]:
    """The figures by ZeroSpeech's rules, if the data have the columns for them."""
    rows: dict[tuple[str, ...], list[str]] = {}
    for number, run in enumerate(runs):
        for task, result in run.results.items():
            if result.zerospeech is None:
                continue
            shares: dict[tuple[str, ...], Any] = {(task, "all items"): result.zerospeech}
            for key, value in result.zerospeech.items():
                if key.startswith("by_"):
                    shares |= {(task, f"{key[3:]} {group}"): share for group, share in value.items()}
                elif key == "in_vocabulary" and value is not None:
                    shares[task, "in vocabulary"] = value
            for key, share in shares.items():
                cell = _cell(share["accuracy"], share["standard_error"], share["items"])
                rows.setdefault(key, [""] * len(runs))[number] = cell
    if rows:
        yield "By ZeroSpeech's rules (the mean over voices, then over items):"
        yield table(["task", "items", *(run.name for run in runs)], [[*key, *cells] for key, cells in rows.items()])


def _compared(found: dict[str, Comparison]) -> str:
    rows = [
        [
            task,
            f"{one.difference:+.4f}",
            f"{one.low:+.4f} to {one.high:+.4f}",
            f"{one.first_only} / {one.second_only}",
            f"{one.p_value:.2g}",
            str(one.pairs),
        ]
        for task, one in found.items()
    ]
    return table(["task", "difference", "95 % (bootstrap)", "only first / second right", "McNemar p", "pairs"], rows)


def main() -> int:
    """Parse the command line, print the report and write it."""
    import tyro

    configuration = (tyro.conf.PositionalRequiredArgs,)
    return command(tyro.cli(Options, description=__doc__, use_underscores=True, config=configuration))


def command(options: Options) -> int:
    """Make and write a report. Returns the exit code."""
    runs = find_runs(options.results)
    text, data = make_report(runs, options)
    print(text)
    folder = options.output_dir
    if folder is None:
        folder = Path(os.path.commonpath([run.folder for run in runs]))
    make_folder(folder)
    written = [folder / "report.md", folder / "report.json"]
    for path, content in zip(written, (text, json.dumps(data, indent=2, allow_nan=False) + "\n"), strict=True):
        with Replacing(path) as partial:
            partial.write_text(content, encoding="utf-8")
    if options.plot:
        from torchtitan.eval.charts import draw

        for benchmark in dict.fromkeys(run.benchmark for run in runs):
            members = {run.name: run.results for run in runs if run.benchmark == benchmark}
            written.append(folder / f"{benchmark.replace('/', '_')}.png")
            draw(written[-1], benchmark, members)
    print(f"Written: {', '.join(map(str, written))}")
    return 0


if __name__ == "__main__":
    run_command(main)
