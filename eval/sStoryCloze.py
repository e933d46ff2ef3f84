"""StoryCloze, spoken: does the model prefer the right ending of a story to a wrong one?

In sStoryCloze the wrong ending is a subtle one, in tStoryCloze one of another topic. A clip is scored by its mean
negative log-likelihood over the semantic units and </audio>.
"""

from torchtitan.tools.errors import run_command


def main() -> int:
    """Parse the command line and run the benchmark."""
    import tyro

    from torchtitan.eval.benchmark import Options, command
    from torchtitan.eval.suites import STORY_CLOZE

    options = tyro.cli(Options, default=Options(dataset="speed"), description=__doc__, use_underscores=True)
    return command(STORY_CLOZE, options)


if __name__ == "__main__":
    run_command(main)
