"""The command line of the benchmarks: a dataclass of options, read by tyro."""

import sys
from collections.abc import Callable
from typing import Any

from torchtitan.tools.errors import UserError, run_command


def run(main: Callable[[Any], None], options: type, description: str | None) -> None:
    """Run a benchmark with the options that the command line gives.

    Without tyro (a bare GPU machine may lack it) it runs with the defaults; options then end it with one sentence.
    """

    def parsed() -> None:
        try:
            import tyro
        except ModuleNotFoundError:
            if len(sys.argv) > 1:
                raise UserError(
                    f"tyro is missing, so {' '.join(sys.argv[1:])} cannot be read; install it (`pip install tyro`), or "
                    "give no options to run with the defaults."
                ) from None
            main(options())
            return
        main(tyro.cli(options, description=description, use_underscores=True))

    run_command(parsed)
