"""The logger of a run."""

import json
import logging
import os
import sys
from datetime import datetime
from typing import Any

logger = logging.getLogger("torchtitan")


class JsonFormatter(logging.Formatter):
    """One JSON object per line: time (ISO 8601), level, rank, message, and the ``extra={"figures": {...}}``."""

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created).astimezone().isoformat(timespec="milliseconds"),
            "level": record.levelname,
            "rank": int(os.environ.get("RANK", "0")),
            "message": record.getMessage(),
            **getattr(record, "figures", {}),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False)


def init_logger(as_json: bool = False) -> None:
    """Write INFO and above to stderr: as text with time and rank, or as JSON."""
    if not logger.handlers:
        logger.addHandler(logging.StreamHandler(sys.stderr))
        logger.setLevel(logging.INFO)
        logger.propagate = False
    rank = os.environ.get("RANK", "0")
    text = logging.Formatter(f"%(asctime)s [rank {rank}] %(levelname)s %(message)s", "%H:%M:%S")
    for handler in logger.handlers:
        if type(handler) is logging.StreamHandler:
            handler.stream = sys.stderr  # stderr may have been replaced since the last call
            handler.setFormatter(JsonFormatter() if as_json else text)


def quiet_transformers() -> None:
    """Turn off the progress bars of transformers for reading and writing models, and a warning of what it imports."""
    from torchtitan.tools.torch_private import quiet_pytree

    quiet_pytree()
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
