"""From a request to what is sampled: the limits of the server, the defaults of the model."""

from nanovllm.config import ServerConfig
from nanovllm.errors import InvalidRequestError
from nanovllm.sampling_params import SamplingParams
from nanovllm.server.chat.checks import check_stop, note_ignored
from nanovllm.server.openai.requests import GenerationRequest
from nanovllm.server.sampling import sampling_from
from nanovllm.server.state import ServerState

MAX_COMPLETIONS = 1024
"""Of one request, over all its prompts, unless `max_n` or `max_prompts` is more."""


def sampling_params(
    request: GenerationRequest, state: ServerState, num_prompts: int = 1
) -> SamplingParams:
    """Return what to sample for each prompt of a request.

    Raises:
        InvalidRequestError: The request asks for more than this server gives, or contradicts
            itself.
    """
    note_ignored(request)
    _check_consistent(request)
    _check_limits(request, num_prompts, state.config)
    scored = request.logprob_token_ids or None
    structure = request.structure()
    return sampling_from(
        state,
        request,
        max_tokens=None if request.token_limit is None else max(request.token_limit, 1),
        logprobs=None if scored else request.num_logprobs,
        logprob_token_ids=scored,
        structured_outputs=None if structure is None else structure[1],
    )


def _check_consistent(request: GenerationRequest) -> None:
    if request.stream_options is not None and not request.stream:
        raise InvalidRequestError("stream_options needs stream=true", "stream_options")
    if request.prompt_logprobs is not None and request.stream:
        raise InvalidRequestError("prompt_logprobs needs stream=false", "prompt_logprobs")
    if request.logprob_token_ids and request.num_logprobs is None:
        raise InvalidRequestError("logprob_token_ids needs logprobs", "logprob_token_ids")
    if request.logprob_token_ids and request.token_limit == 0:
        raise InvalidRequestError(
            "logprob_token_ids are told of generated tokens: max_tokens must be at least 1",
            "logprob_token_ids",
        )
    if request.best_of is not None and request.best_of != (request.n or 1):
        raise InvalidRequestError(
            "best_of is not supported: every completion that is generated is returned; use n",
            "best_of",
        )


def _check_limits(request: GenerationRequest, num_prompts: int, config: ServerConfig) -> None:
    n = request.n or 1
    if n > config.max_n:
        raise InvalidRequestError(f"n must be at most {config.max_n}, got {n}", "n")
    if num_prompts > config.max_prompts:
        raise InvalidRequestError(
            f"a request may have {config.max_prompts} prompts, got {num_prompts}", "prompt"
        )
    most = max(MAX_COMPLETIONS, config.max_n, config.max_prompts)
    if n * num_prompts > most:
        raise InvalidRequestError(
            f"n times the prompts must be at most {most}, got {n} times {num_prompts}", "n"
        )
    check_stop(request.stop, config)
