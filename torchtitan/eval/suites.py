"""The benchmarks: SALMon, sLM21 and StoryCloze."""

from dataclasses import dataclass

from torchtitan.eval.metrics import Rule


@dataclass(frozen=True)
class Benchmark:
    """The properties of a benchmark.

    Attributes:
        name: its name, and its folder in the output folder.
        tasks: names of the tasks, which are also the names of their data sets, configurations or folders.
        columns: columns with the positive and the negative clip.
        item_column: column with the id of a pair, if the data set has one.
        rule: how clips are scored.
        as_configurations: on the hub, the tasks are configurations of one data set; otherwise data sets of one owner.
    """

    name: str
    tasks: tuple[str, ...]
    columns: tuple[str, str]
    item_column: str
    rule: Rule
    as_configurations: bool = False


# The configurations all, all_consistency and all_alignment on the hub are unions of these, not tasks.
SALMON = Benchmark(
    name="SALMON",
    tasks=(
        "sentiment_consistency",
        "speaker_consistency",
        "gender_consistency",
        "bg_domain_consistency",
        "bg_all_consistency",
        "rir_consistency",
        "sentiment_alignment",
        "bg_alignment",
    ),
    columns=("positive_audio", "negative_audio"),
    item_column="ind",
    rule=Rule("all"),
    as_configurations=True,
)
SLM21 = Benchmark("sLM21", ("sWUGGY", "sBLIMP"), ("positive", "negative"), "id", Rule("semantic"))
STORY_CLOZE = Benchmark("sStoryCloze", ("sStoryCloze", "tStoryCloze"), ("positive", "negative"), "id", Rule("semantic"))

BENCHMARKS = {benchmark.name: benchmark for benchmark in (SALMON, SLM21, STORY_CLOZE)}
