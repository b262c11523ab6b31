"""Where a checkpoint lies: in a directory, on a hub, or in the package."""

import logging
from importlib import import_module
from pathlib import Path

from nanovllm.config import DEMO_MODEL, EngineConfig
from nanovllm.errors import UnsupportedModelError

logger = logging.getLogger(__name__)

TEXT_PATTERNS = ["*.json", "*.jinja", "*.model", "*.txt"]
WEIGHT_PATTERNS = ["*.safetensors", "audiovae.pth"]
PICKLED_PATTERNS = ["pytorch_model*"]
"""The weights of speech models of which the hub has no others."""
IGNORED_PATTERNS = ["original/*", "consolidated*"]
"""The same weights once more, in the layout of their authors."""


def resolve_model(config: EngineConfig) -> Path:
    """Return the directory of the checkpoint that `config.model` names, downloaded if need be.

    Args:
        config: Names the checkpoint and the hub; with `dummy_weights` no weights are downloaded.

    Raises:
        FileNotFoundError: There is no such directory, repository or revision; or it is not
            downloaded and must not be.
        UnsupportedModelError: It is a file.
        PermissionError: The hub wants a token, or another one.
        ConnectionError: The hub cannot be reached, or does not answer as it should.
        ImportError: The hub's package is not installed.
    """
    if config.model is None:
        # A warning, so that it is seen where nobody has set logging up.
        logger.warning("no model given: using the bundled demo model")
        return DEMO_MODEL
    path = Path(config.model).expanduser()
    if path.is_dir():
        return path
    if path.is_file():
        raise UnsupportedModelError(
            f"model {config.model!r} is a file; nanovllm reads a directory with config.json, "
            "tokenizer.json and *.safetensors, and no GGUF",
            "model",
        )
    if config.model.startswith(("/", "./", "../", "~")) or config.model.count("/") > 1:
        raise FileNotFoundError(
            f"model directory {config.model!r} does not exist (that is {path.absolute()})"
        )
    patterns = TEXT_PATTERNS if config.dummy_weights else TEXT_PATTERNS + WEIGHT_PATTERNS
    path = _download(config.model, config, patterns)
    if not config.dummy_weights and _lacks_weights(path):
        path = _download(config.model, config, patterns + PICKLED_PATTERNS)
    return path


def _lacks_weights(path: Path) -> bool:
    """Whether a speech model has come with nothing but its autoencoder."""
    names = {file.name for file in path.glob("*.safetensors")} - {"audiovae.safetensors"}
    return not names and any(path.glob("audiovae.*"))


def _download(model_id: str, config: EngineConfig, patterns: list[str]) -> Path:
    if config.model_source == "modelscope":
        return _download_from_modelscope(model_id, config, patterns)
    return _download_from_huggingface(model_id, config, patterns)


def _download_from_huggingface(model_id: str, config: EngineConfig, patterns: list[str]) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
    )

    try:
        snapshot: str = snapshot_download(
            model_id,
            revision=config.revision,
            cache_dir=config.download_dir,
            token=config.hf_token,
            endpoint=config.endpoint,
            local_files_only=config.local_files_only,
            allow_patterns=patterns,
            ignore_patterns=IGNORED_PATTERNS,
        )
    except HFValidationError as e:
        raise FileNotFoundError(
            f"model {model_id!r} is no directory, and no id of a repository either: {e}"
        ) from e
    except (HfHubHTTPError, LocalEntryNotFoundError) as e:
        raise _explained(e, model_id, config) from e
    except OSError:
        raise  # the disk is full or not ours to write to, and the error says so
    except Exception as e:
        raise ConnectionError(f"download of {model_id!r} failed: {type(e).__name__}: {e}") from e
    return Path(snapshot)


def _explained(error: BaseException, model_id: str, config: EngineConfig) -> OSError:
    """Say what a failure of the hub library means for the user, and what to do about it."""
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    name = f"{model_id!r} at revision {config.revision or 'main'!r}"
    cause = error.__cause__
    if isinstance(error, LocalEntryNotFoundError):
        if config.local_files_only or isinstance(cause, OfflineModeIsEnabled):
            return FileNotFoundError(
                f"model {name} is not (completely) downloaded, and downloads are off: run once "
                "with local_files_only=False and without HF_HUB_OFFLINE, or give a directory"
            )
        return _explained(cause or ConnectionError(str(error)), model_id, config)
    if isinstance(error, HfHubHTTPError):
        status = error.response.status_code
        missing = error.response.headers.get("X-Error-Code") == "RepoNotFound"
        if isinstance(error, GatedRepoError) or (status in (401, 403) and not missing):
            return PermissionError(
                f"the hub refuses model {name} ({status}): accept its terms on its page if it has "
                "any, and pass a token that may read it as hf_token= or HF_TOKEN"
            )
        if isinstance(error, RevisionNotFoundError):
            return FileNotFoundError(f"model {model_id!r} has no revision {config.revision!r}")
        if isinstance(error, RepositoryNotFoundError):
            return FileNotFoundError(
                f"the hub has no model {name}, and there is no directory of that name: check the "
                "spelling; a private model needs hf_token= or HF_TOKEN"
            )
    return ConnectionError(
        f"cannot download model {name}: check the network and endpoint=, or give a directory "
        f"({type(error).__name__}: {error})"
    )


def _download_from_modelscope(model_id: str, config: EngineConfig, patterns: list[str]) -> Path:
    try:
        modelscope = import_module("modelscope")
    except ImportError as e:
        raise ImportError(
            'model_source="modelscope" needs its package: pip install modelscope'
        ) from e
    try:
        return Path(
            modelscope.snapshot_download(
                model_id,
                revision=config.revision,
                cache_dir=config.download_dir,
                local_files_only=config.local_files_only,
                allow_patterns=patterns,
                ignore_patterns=IGNORED_PATTERNS,
            )
        )
    except Exception as e:
        if config.local_files_only:
            raise FileNotFoundError(
                f"model {model_id!r} is not downloaded from modelscope, and downloads are off: "
                "run once with local_files_only=False, or give a directory"
            ) from e
        raise ConnectionError(
            f"cannot download model {model_id!r} from modelscope: {type(e).__name__}: {e}"
        ) from e
