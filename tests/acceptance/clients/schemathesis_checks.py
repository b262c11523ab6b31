"""A check for schemathesis: what the description allows is accepted, but for what it cannot say."""

# mypy: disable-error-code="import-not-found, untyped-decorator"

import re
from typing import Any

import schemathesis
from schemathesis.specs.openapi.checks import positive_data_acceptance

BEYOND_A_SCHEMA = re.compile(
    # Fields that depend on each other.
    r"stream_options needs stream=true"
    r"|prompt_logprobs needs stream=false"
    r"|top_logprobs needs logprobs=true"
    r"|logprob_token_ids (needs logprobs|are told of generated tokens)"
    r"|best_of is not supported: .* use n"
    r"|exclude each other: an answer has one form|takes exactly one of"
    r"|tool_choice: .* there are no tools|is none of the tools"
    r"|min_tokens must be at most max_tokens"
    r"|add_generation_prompt and continue_final_message exclude each other"
    # What is inside a schema, a pattern or a grammar.
    r"|cannot be enforced|is not well-formed|as a grammar, more than the|a schema is a JSON object"
    r"|must be the JSON schema of the answer|the schema has more than|multipleOf:"
    r"|has too many digits to be kept exactly"
    r"|patterns for the same text|it has more than \d+ rules|must be from -1e18"
    r"|the parameters that bind the model have"
    # The model served, and its tokenizer and template.
    r"|This model's maximum context length is"
    r"|is out of range: the vocabulary has"
    r"|dimensions must be between 1 and \d+, which the model has"
    r"|the chat template"
    r"|chat_template_kwargs must not have"
    r"|this model writes text and does not speak"
    r"|single tokens for \d+ labels|must have no two of the same value"
    # Limits of the server, which are options.
    r"|n must be at most|n times the prompts must be"
    r"|a request may have \d+ (prompts|texts|stop strings)"
    # JSON inside JSON.
    r"|arguments: must be the JSON text of an object"
    # Responses: what goes together, and ids of what is there.
    r"|input: must not be empty|two of them have one name|is not among the tools"
    r"|tool_choice='required' needs tools|Previous response with id|after: there is no item"
    r"|a response is streamed once only|text\.format: .* cannot be enforced"
    # Speech: recordings inside JSON, voices and adapters that are there, and what goes together.
    r"|Invalid base64 in|Invalid latent payload in|must be base64 or a data: URL|fetches nothing"
    r"|the recording|a recording may|cannot decode|the form is cut off|of the form has no name"
    r"|must be a recording|must be JSON or multipart|is not valid JSON|there is a voice"
    r"|there is no voice|Prompt with id|are mutually exclusive|wav requires|wav prompt requires"
    r"|latents prompt requires|not allowed for zero-shot|cannot be provided at the same time"
    r"|target text must be a non-empty|speed must be 1|instructions are not supported"
    r"|input may have|retry_badcase needs|ref_text needs|give either voice or ref_audio"
    r"|Reference audio is not supported|LoRA '.*' is not registered|Runtime LoRA is disabled"
    r"|Prompt is too long|Request may exceed max_model_len|needs PyAV"
    # Anthropic's and Ollama's words for conversations.
    r"|a message of the role '.*' has no|tool_result has to follow|must be the tool to call"
    r"|must be the name of a model"
    r"|named voices need a directory|The model `.*` cannot do this"
)


@schemathesis.check
def schema_tells_what_is_accepted(ctx: Any, response: Any, case: Any) -> bool | None:
    """`positive_data_acceptance`, unless the refusal is for a reason that no schema has."""
    if response.status_code == 400 and BEYOND_A_SCHEMA.search(response.text):
        return None
    return positive_data_acceptance(ctx, response, case)  # type: ignore[no-any-return]
