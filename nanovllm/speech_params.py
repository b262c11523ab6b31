"""What a user may ask of speech. Fields, names and defaults are VoxCPM's."""

from dataclasses import dataclass

from nanovllm.errors import InvalidRequestError
from nanovllm.sampling_params import MAX_SEED
from nanovllm.validation import conform

DEFAULT_MAX_PATCHES = 2000
LEAST_PATCHES_AT_MOST = 10
"""Patches that the shortest of texts may take."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SpeechParams:
    """How to speak one text. A patch is 80 or 160 ms of speech, by the model.

    It stays as it was checked: `dataclasses.replace` makes another one.

    Args:
        cfg_value: Weight of classifier-free guidance, in [0, 10]: how closely the speech follows
            the text. At 1 there is none, and a patch costs half.
        inference_timesteps: Steps of the flow-matching sampler, 2 to 100.
        temperature: Factor on the sampler's noise, in [0, 100].
        seed: Makes the noise reproducible; without one each request gets its own.
        min_len: The model may stop after patch `min_len + 1`, counted from 0.
        max_generate_length: Patches at most; None is 2000, or what the model's context leaves if
            that is less. Speech ends before when it has
            `retry_badcase_ratio_threshold` times as many patches as the text has tokens, and 10.
        retry_badcase: Whether speech that reaches that ratio, so that it went astray, is generated
            again with the next seed. It takes a response that is not streamed.
        retry_badcase_max_times: Attempts in all, 1 to 10; the last is returned whatever it is.
        retry_badcase_ratio_threshold: Patches a token of the text, above 0 and at most 1000.

    Raises:
        InvalidRequestError: A field is outside its range; the message says which and what is right.
    """

    cfg_value: float = 2.0
    inference_timesteps: int = 10
    temperature: float = 1.0
    seed: int | None = None
    min_len: int = 2
    max_generate_length: int | None = None
    retry_badcase: bool = False
    retry_badcase_max_times: int = 3
    retry_badcase_ratio_threshold: float = 6.0

    def __post_init__(self) -> None:
        conform(self)
        self._check("cfg_value", 0 <= self.cfg_value <= 10, "in [0, 10]")
        self._check("inference_timesteps", 2 <= self.inference_timesteps <= 100, "in [2, 100]")
        self._check("temperature", 0 <= self.temperature <= 100, "in [0, 100]")
        self._check("seed", self.seed is None or abs(self.seed) < MAX_SEED, "a 64-bit integer")
        self._check("min_len", self.min_len >= 0, ">= 0")
        longest = self.max_generate_length
        self._check("max_generate_length", longest is None or longest >= 1, ">= 1")
        self._check(
            "retry_badcase_max_times", 1 <= self.retry_badcase_max_times <= 10, "in [1, 10]"
        )
        ratio = self.retry_badcase_ratio_threshold
        self._check("retry_badcase_ratio_threshold", 0 < ratio <= 1000, "in (0, 1000]")

    def max_patches(self, num_target_tokens: int) -> int:
        """Patches that a text of so many tokens may take, at most."""
        longest = self.retry_badcase_ratio_threshold * num_target_tokens + LEAST_PATCHES_AT_MOST
        return min(int(longest), self.max_generate_length or DEFAULT_MAX_PATCHES)

    def is_bad_case(self, num_patches: int, num_target_tokens: int) -> bool:
        """Whether the speech is so long for its text that it went astray."""
        return num_patches >= self.retry_badcase_ratio_threshold * num_target_tokens

    def _check(self, name: str, valid: bool, expected: str) -> None:
        if not valid:
            raise InvalidRequestError(f"{name} must be {expected}, got {getattr(self, name)}", name)
