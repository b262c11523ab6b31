"""What the processes of `speech_peers.py` share: commands come in by lines, figures go out."""

import json
import os
import sys
from collections.abc import Callable
from typing import Any

TEXT = "Once upon a time there was a miller who had three sons, a mill, a donkey and a cat. " * 8

Speak = Callable[[int], dict[str, float]]


def work(load: Callable[[dict[str, Any]], Speak]) -> None:
    """Load an engine, then speak as often as is asked. Standard output is for the figures alone."""
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def reply(message: dict[str, float]) -> None:
        replies.write(json.dumps(message) + "\n")
        replies.flush()

    speak = load(json.loads(sys.argv[1]))
    reply({})
    for line in sys.stdin:
        reply(speak(json.loads(line)["num_streams"]))
