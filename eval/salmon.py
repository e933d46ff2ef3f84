"""SALMon: does the model prefer a recording whose speaker, sentiment, background or room stay what they were?

Eight tasks of pairs; a clip is scored by its mean negative log-likelihood over all targets.
"""

from torchtitan.tools.errors import run_command


def main() -> int:
    """Parse the command line and run the benchmark."""
    import tyro

    from torchtitan.eval.benchmark import Options, command
    from torchtitan.eval.suites import SALMON

    options = tyro.cli(Options, default=Options(dataset="slprl/SALMon"), description=__doc__, use_underscores=True)
    return command(SALMON, options)


if __name__ == "__main__":
    run_command(main)
