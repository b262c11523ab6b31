"""The `nanovllm` command; each subcommand is a file of its own.

Nothing here imports torch before a command runs, so that `nanovllm --help` answers at once.
"""

import json
import logging
import os
import re
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, NoReturn

import yaml
from cyclopts import App, ArgumentCollection, CycloptsError, Parameter
from cyclopts.config import Dict

from nanovllm import __version__
from nanovllm.cli.bench import offline, quality
from nanovllm.cli.bench import serve as bench_serve
from nanovllm.cli.bench_speech import speech
from nanovllm.cli.chat import chat
from nanovllm.cli.control import drain, health, metrics, warm
from nanovllm.cli.doctor import doctor
from nanovllm.cli.generate import generate
from nanovllm.cli.options import environment
from nanovllm.cli.serve import serve
from nanovllm.cli.speak import speak
from nanovllm.config import (
    ALIASES,
    EngineConfig,
    Options,
    PoolConfig,
    ServerConfig,
    SpeechConfig,
)
from nanovllm.errors import InvalidRequestError, NotEnoughMemoryError

USAGE_ERROR = 2
INTERRUPTED = 130
FILE_KEY = re.compile(r"\[([\w-]+)\]")
"""How cyclopts writes an option of the file."""
YAML_ERRORS = (yaml.YAMLError, ValueError, LookupError, AttributeError, RecursionError)
"""What a broken file raises: PyYAML lets some errors of Python's pass, as for `!!bool 7`."""

app = App(
    name="nanovllm",
    help="A small, readable inference engine for language models.",
    version=__version__,
    default_parameter=Parameter(negative_iterable=()),
)
# A list flag takes several values, as vLLM's do: `--served-model-name a b`.
app.command(serve, default_parameter=Parameter(negative_iterable=(), consume_multiple=True))
app.command(generate)
app.command(chat)
app.command(speak)
app.command(doctor)

benches = App(name="bench", help="Measure the engine on this machine.")
benches.command(offline)
benches.command(quality)
benches.command(bench_serve, name="serve")
benches.command(speech)
app.command(benches)

# `--endpoint` is the socket here, not the hub that the environment may set under that name.
controls = App(name="control", help="Operate a running server by its control socket.", config=())
for operation in (metrics, warm, health, drain):
    controls.command(operation)
app.command(controls)
app.meta.end_of_options_delimiter = ""  # a `--` is for the command


@app.meta.default
def launch(
    *tokens: Annotated[str, Parameter(show=False, allow_leading_hyphen=True)],
    config: Path | None = None,
) -> None:
    """Run a command; options come from flags, then the file, then the environment.

    Args:
        tokens: The command and its arguments.
        config: YAML file of options, named as the flags are. Flags win over it, and it wins over
            the `NANOVLLM_*` environment variables.
    """
    file = [] if config is None else [_read_options(config)]
    app.config = [*file, _environment(EngineConfig)]
    app["bench"]["serve"].config = file  # its options are those of a client
    app["serve"].config = [
        _check_one_model,
        *file,
        _environment(EngineConfig, PoolConfig, ServerConfig, SpeechConfig),
    ]
    app(_canonical(tokens), result_action="return_value", end_of_options_delimiter="--")


def main(arguments: list[str] | None = None) -> None:
    """Run the command line.

    Args:
        arguments: What follows the program's name; None is `sys.argv[1:]`.

    Raises:
        SystemExit: With 2 for a mistake of the user's, told in one line; 130 after Ctrl-C.
    """
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    logging.getLogger("nanovllm").setLevel(logging.INFO)
    try:
        app.meta(arguments, exit_on_error=False, print_error=False, result_action="return_value")
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)
    except BrokenPipeError:
        # The reader of our output is gone; the interpreter must not trip on it again at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except OSError as e:
        _fail(f"{e.filename}: {e.strerror}" if e.filename else str(e))
    except CycloptsError as e:
        _fail(FILE_KEY.sub(r"\1", str(e)))
    except (ImportError, InvalidRequestError, NotEnoughMemoryError) as e:
        _fail(str(e))


def _fail(message: str) -> NoReturn:
    sys.stderr.write(f"nanovllm: error: {' '.join(message.split())}\n")
    sys.exit(USAGE_ERROR)


def _environment(*classes: type[Options]) -> Dict:
    """The environment's options; a command may have no use for some of them."""
    return Dict(
        environment(*classes),
        source="the environment",
        allow_unknown=True,
        use_commands_as_keys=False,
    )


def _read_options(path: Path) -> Dict:
    """Read a YAML file whose keys are options by their names or aliases."""
    with open(os.path.expanduser(path), "rb") as file:
        try:
            options = yaml.safe_load(file)
        except YAML_ERRORS as e:
            raise InvalidRequestError(f"{path} is not valid YAML: {e}") from e
    if options is None:  # nothing but comments
        options = {}
    if not isinstance(options, dict):
        raise InvalidRequestError(f"{path} must hold options as 'name: value', one a line")
    named = {_option_name(str(name)): value for name, value in options.items()}
    values = {name: _as_flag(name.replace("-", "_"), value) for name, value in named.items()}
    return Dict(values, source=str(path), use_commands_as_keys=False)


def _as_flag(name: str, value: Any) -> Any:
    """Write a list or an object of the file as the text that its flag takes."""
    if name == "warm_prefixes" and isinstance(value, list):
        return "||".join(map(str, value))
    if name == "default_chat_template_kwargs" and isinstance(value, dict):
        return json.dumps(value)
    if name == "lora_modules" and isinstance(value, dict):
        return [f"{module}={path}" for module, path in value.items()]
    if name == "lora_modules" and isinstance(value, list):
        return [json.dumps(item) if isinstance(item, dict) else item for item in value]
    return value


def _check_one_model(
    app: App,  # noqa: ARG001
    commands: tuple[str, ...],  # noqa: ARG001
    arguments: ArgumentCollection,
) -> None:
    """Refuse `serve a --model b`; called before the file and the environment are looked at."""
    given = [
        token.value
        for argument in arguments
        if argument.field_info.name == "model"
        for token in argument.tokens
    ]
    if len(set(given)) > 1:
        raise InvalidRequestError(f"the model is given twice: {' and '.join(given)}", "model")


def _canonical(tokens: Iterable[str]) -> list[str]:
    """Turn flags in the names of the family's engines into ours, up to a `--`."""
    canonical: list[str] = []
    rest = iter(tokens)
    for token in rest:
        if token == "--":
            return [*canonical, token, *rest]
        name, equals, value = token.partition("=")
        if name.startswith("--") and (option := _option_name(name[2:])) != name[2:]:
            token = f"--{option}{equals}{value}"
        canonical.append(token)
    return canonical


def _option_name(name: str) -> str:
    return ALIASES.get(name.replace("-", "_"), name)
