"""The one logger of a run."""

import logging
import os
import sys

logger = logging.getLogger("torchtitan")


def init_logger() -> None:
    """Write INFO and above to stderr, with time and rank."""
    if logger.handlers:
        return
    rank = os.environ.get("RANK", "0")
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter(f"%(asctime)s [rank {rank}] %(levelname)s %(message)s", "%H:%M:%S"))
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False


def quiet_transformers() -> None:
    """No progress bars while transformers reads or writes a model of a few files."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
