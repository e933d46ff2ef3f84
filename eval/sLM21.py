"""sLM21: does the model prefer words to non-words (sWUGGY) and grammatical sentences to others (sBLIMP)?

A clip is scored by its mean negative log-likelihood over the semantic units and </audio>.
"""

from torchtitan.tools.errors import run_command


def main() -> int:
    """Parse the command line and run the benchmark."""
    import tyro

    from torchtitan.eval.benchmark import Options, command
    from torchtitan.eval.suites import SLM21

    options = tyro.cli(Options, default=Options(dataset="speed"), description=__doc__, use_underscores=True)
    return command(SLM21, options)


if __name__ == "__main__":
    run_command(main)
