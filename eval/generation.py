"""Generated speech: continue a folder of prompts, and score speaker, naturalness, words, repetition, or ask a judge.

The same command goes on where one was interrupted. What a metric needs is downloaded when it is asked for.
"""

from torchtitan.tools.errors import run_command


def main() -> int:
    """Parse the command line and run the evaluation."""
    import tyro

    from torchtitan.eval.generation import Options, command

    return command(tyro.cli(Options, description=__doc__, use_underscores=True))


if __name__ == "__main__":
    run_command(main)
