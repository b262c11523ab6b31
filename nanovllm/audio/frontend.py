"""A speech model's text side: its tokenizer, the layout of its prompts, and all checks."""

from pathlib import Path
from typing import NamedTuple

from nanovllm.audio.latents import latents_fault
from nanovllm.audio.sentences import clean_text
from nanovllm.audio.tokenizer import SpeechTokenizer
from nanovllm.audio.voices import VoicePrompt
from nanovllm.batch import Key, SpeechRequest, patch_key
from nanovllm.config import EngineConfig
from nanovllm.errors import ContextLengthError, InvalidRequestError
from nanovllm.models.voxcpm.config import VoxCPMConfig
from nanovllm.sampling_params import SamplingParams
from nanovllm.speech_params import SpeechParams
from nanovllm.validation import check_type

AUDIO_START = 101
REFERENCE_START = 103
REFERENCE_END = 104
"""Ids that the reference implementation does not look up either."""


def check_text(text: object) -> None:
    """Refuse what nobody can speak.

    Raises:
        InvalidRequestError: It is no text, or blank.
    """
    if not isinstance(text, str) or not text.strip():
        raise InvalidRequestError("target text must be a non-empty string", "text")


def check_types(text: object, params: object, prompt: VoicePrompt | None = None) -> None:
    """Refuse arguments that no request is made of.

    Raises:
        InvalidRequestError: One is of another type than it should be, or the text is blank.
    """
    check_text(text)
    if params is not None:
        check_type("params", params, SpeechParams, "SpeechParams")
    prompt = prompt or VoicePrompt()
    check_type("prompt_text", prompt.prompt_text, str, "a string")
    for name in ("prompt_latents", "ref_audio_latents"):
        if (latents := getattr(prompt, name)) is not None:
            check_type(name, latents, bytes, "bytes, as encode() returns them")


class SpeechInput(NamedTuple):
    """A request ready for the engine.

    Args:
        keys: What stands at the prompt's positions.
        params: How many patches at most, and the seed.
        payload: What else the runner needs.
        num_target_tokens: Tokens of the text to speak, by which bad cases are known.
    """

    keys: list[Key]
    params: SamplingParams
    payload: SpeechRequest
    num_target_tokens: int


class SpeechFrontend:
    """What checks a request for speech and turns it into an engine's.

    Args:
        directory: The checkpoint.
        config: Where else the tokenizer comes from.

    Raises:
        FileNotFoundError: A file of the checkpoint is missing.
        UnsupportedModelError: The checkpoint's files cannot be read.
    """

    def __init__(self, directory: Path, config: EngineConfig) -> None:
        self.model_config = VoxCPMConfig.from_directory(directory)
        self.tokenizer = SpeechTokenizer.from_directory(
            directory if config.tokenizer is None else Path(config.tokenizer).expanduser()
        )
        self._bytes_per_patch = self.model_config.patch_size * self.model_config.feat_dim * 4

    @property
    def samples_per_patch(self) -> int:
        """Samples that the encoder makes a patch of; recordings are padded to a multiple."""
        return self.model_config.patch_size * self.model_config.vae.hop

    def process(
        self,
        text: str,
        params: SpeechParams,
        max_model_len: int,
        prompt_latents: bytes | None = None,
        prompt_text: str = "",
        ref_audio_latents: bytes | None = None,
    ) -> SpeechInput:
        """Check a request and lay out its prompt.

        A VoxCPM2 prompt is `[103, reference, 104, text, 101, prompt audio]`, where the text is that
        of the prompt audio and the target in one; the others have no reference.

        Args:
            text: What to say. In VoxCPM2 it may begin with the description of a voice in
                parentheses.
            params: How.
            max_model_len: Longest prompt plus speech, in positions.
            prompt_latents: A recording that the speech continues: float32 `[frames, feat_dim]`, the
                frames a multiple of `patch_size`.
            prompt_text: What is said in it.
            ref_audio_latents: A recording whose voice is taken; VoxCPM2 only.

        Raises:
            InvalidRequestError: Something is missing, does not fit the rest or is no latents.
            ContextLengthError: Prompt and speech may not fit `max_model_len`.
        """
        check_text(text)
        self._check_prompt(prompt_latents, prompt_text, ref_audio_latents)
        text = clean_text(text)
        longer = "prompt_text" if len(prompt_text) > len(text) else "text"
        self._check_size(len(prompt_text) + len(text), max_model_len, longer)
        largest = _largest(
            {"prompt_latents": prompt_latents, "ref_audio_latents": ref_audio_latents}
        )
        num_bytes = len(prompt_latents or b"") + len(ref_audio_latents or b"")
        _check_prompt_len(num_bytes // self._bytes_per_patch, max_model_len, largest)
        prompt = self._patches(prompt_latents)
        reference = self._patches(ref_audio_latents)
        keys = [
            *self._reference_keys(reference),
            *self._token_ids(prompt_text + text),
            AUDIO_START,
            *map(patch_key, prompt),
        ]
        num_target_tokens = len(self.tokenizer.encode(text))
        num_others = len(keys) - num_target_tokens
        if num_others >= max_model_len:  # no text fits beside the voice
            num_said = num_others - len(prompt) - len(reference)
            too_long = "prompt_text" if num_said > len(prompt) + len(reference) else largest
            _check_prompt_len(len(keys), max_model_len, too_long)
        max_patches = params.max_patches(num_target_tokens)
        if params.max_generate_length is None:  # nobody asked for more than there is room for
            max_patches = max(1, min(max_patches, max_model_len - len(keys)))
        _check_lengths(len(keys), max_patches, max_model_len)
        payload = SpeechRequest(
            latents=b"".join(reference + prompt),
            cfg_value=params.cfg_value,
            inference_timesteps=params.inference_timesteps,
            temperature=params.temperature,
            min_len=min(params.min_len, max_patches),
        )
        sampling = SamplingParams(max_tokens=max_patches, seed=params.seed)
        return SpeechInput(keys, sampling, payload, num_target_tokens)

    def check_latents(self, latents: bytes, name: str) -> None:
        """Refuse latents that the model has no use for.

        Args:
            latents: What should be float32 `[frames, feat_dim]`.
            name: The field they came in.

        Raises:
            InvalidRequestError: They are no whole patches, or have values that nothing has.
        """
        shape = self.model_config
        if why := latents_fault(latents, shape.patch_size, shape.feat_dim):
            raise InvalidRequestError(f"{name}: {why}", name)

    def _check_prompt(self, latents: bytes | None, text: str, reference: bytes | None) -> None:
        if latents is None and text:
            raise InvalidRequestError(
                "Prompt text is not allowed when prompt latents are not provided", "prompt_text"
            )
        if latents is not None:
            if not text.strip():
                raise InvalidRequestError(
                    "Prompt text is required when prompt latents are provided", "prompt_text"
                )
            self.check_latents(latents, "prompt_latents")
        if reference is not None:
            if not self.model_config.supports_reference:
                raise InvalidRequestError(
                    "Reference audio is not supported by the loaded model", "ref_audio_latents"
                )
            self.check_latents(reference, "ref_audio_latents")

    def _check_size(self, num_chars: int, max_model_len: int, param: str) -> None:
        """Refuse a text that cannot fit, without the seconds that millions of characters take."""
        num_tokens = num_chars // self.tokenizer.max_token_chars
        if num_tokens > max_model_len:
            raise ContextLengthError(
                f"Prompt is too long for max_model_len: {num_chars} characters are at least "
                f"{num_tokens} tokens > max_model_len={max_model_len}",
                param,
            )

    def _patches(self, latents: bytes | None) -> list[bytes]:
        latents, size = latents or b"", self._bytes_per_patch
        return [latents[start : start + size] for start in range(0, len(latents), size)]

    def _reference_keys(self, patches: list[bytes]) -> list[Key]:
        return [REFERENCE_START, *map(patch_key, patches), REFERENCE_END] if patches else []

    def _token_ids(self, text: str) -> list[int]:
        """Encode the text of a prompt.

        Raises:
            InvalidRequestError: The tokenizer has a token of the text, and the model has not.
        """
        ids = self.tokenizer.encode(text)
        if (highest := max(ids, default=0)) >= self.model_config.vocab_size:
            raise InvalidRequestError(
                f"the text has token id {highest}, and the model's vocabulary ends at "
                f"{self.model_config.vocab_size - 1}: the tokenizer is another model's",
                "text",
            )
        return ids


def _largest(latents: dict[str, bytes | None]) -> str:
    return max(latents, key=lambda name: len(latents[name] or b""))


def _check_prompt_len(prompt_len: int, max_model_len: int, param: str = "text") -> None:
    """Refuse a prompt of at least so many positions.

    Args:
        prompt_len: How many.
        max_model_len: How many there may be.
        param: What it is to blame on; anything but the text is of the voice.

    Raises:
        ContextLengthError: It is too long.
    """
    if prompt_len > max_model_len:
        hint = "" if param == "text" else ": the voice alone fills it, so take a shorter one"
        raise ContextLengthError(
            f"Prompt is too long for max_model_len: prompt_len={prompt_len} > "
            f"max_model_len={max_model_len}{hint}",
            param,
        )


def _check_lengths(prompt_len: int, max_patches: int, max_model_len: int) -> None:
    _check_prompt_len(prompt_len, max_model_len)
    total = prompt_len + max_patches
    if total > max_model_len:
        raise ContextLengthError(
            f"Request may exceed max_model_len: prompt_len({prompt_len}) + "
            f"max_generate_length({max_patches}) = {total} > max_model_len({max_model_len}). "
            "Reduce input length or max_generate_length, or increase max_model_len.",
            "max_generate_length",
        )
