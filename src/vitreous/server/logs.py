"""Logs: a line of JSON for each event, on standard error. What was in an image, a name or a token is not in them."""

import json
import logging
import sys
import time
from typing import Any

logger = logging.getLogger("vitreous.server")

_FIELDS = "fields"


class JsonFormatter(logging.Formatter):
    """Formats a record as one line of JSON."""

    def format(self, record: logging.LogRecord) -> str:
        """Returns the line."""
        seconds = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        line: dict[str, Any] = {
            "time": f"{seconds}.{int(record.msecs):03}Z",
            "level": record.levelname.lower(),
            "event": record.getMessage(),
            **getattr(record, _FIELDS, {}),
        }
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=True, default=str)


def log(event: str, *, level: int = logging.INFO, exc_info: BaseException | None = None, **fields: Any) -> None:
    """Logs an event with its fields."""
    if logger.isEnabledFor(level):
        logger.log(level, event, extra={_FIELDS: fields}, exc_info=exc_info)


def start_logs() -> None:
    """Sends the logs of the server, and what uvicorn has to warn of, to standard error."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter())
    for name, level in (("vitreous.server", logging.INFO), ("uvicorn", logging.WARNING)):
        each = logging.getLogger(name)
        each.handlers, each.propagate = [handler], False
        each.setLevel(level)
    for name in ("uvicorn.error", "uvicorn.access"):  # uvicorn gives these handlers of their own where it is asked to
        logging.getLogger(name).handlers = []
