"""How the server logs: lines for people, or one JSON object a line."""

import asyncio
import json
import logging
from datetime import datetime, timezone

from nanovllm.config import ServerConfig

TEXT_FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"


class JSONFormatter(logging.Formatter):
    """One JSON object a record."""

    def format(self, record: logging.LogRecord) -> str:
        time = datetime.fromtimestamp(record.created, timezone.utc)
        entry = {
            "time": time.isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        if record.exc_info:
            entry["exception"] = self.formatException(record.exc_info)
        return json.dumps(entry)


def configure_logging(config: ServerConfig) -> None:
    """Send all loggers' records to standard error in one format, uvicorn's too."""
    handler = logging.StreamHandler()
    text = logging.Formatter(TEXT_FORMAT)
    handler.setFormatter(JSONFormatter() if config.log_format == "json" else text)
    level = logging.getLevelName(config.log_level.upper())
    # What uvicorn and others say below a warning, our own lines say better.
    logging.basicConfig(handlers=[handler], level=max(level, logging.WARNING), force=True)
    logging.getLogger("nanovllm").setLevel(level)
    logging.getLogger("uvicorn.access").setLevel("INFO" if config.access_log else "WARNING")
    logging.getLogger("uvicorn.error").addFilter(_is_news)


def _is_news(record: logging.LogRecord) -> bool:
    """Whether uvicorn did not mean to do it: of requests that it cancels it says how many."""
    return not (record.exc_info and isinstance(record.exc_info[1], asyncio.CancelledError))
