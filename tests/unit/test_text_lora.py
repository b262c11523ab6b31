"""LoRA adapters of text: transformers' tokens with them merged, and nothing of one in another."""

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from nanovllm import LLM, LoRARequest, SamplingParams
from nanovllm.errors import InvalidRequestError
from nanovllm.models.quantization import SCHEMES, quantize
from tests.peft_oracle import EVERY_LAYER, greedy, merged, write_peft
from tests.small_engine import SMALL

NUM_TOKENS = 16
GREEDY = SamplingParams(temperature=0, max_tokens=NUM_TOKENS, ignore_eos=True)
PROMPTS = [[5, 17, 200, 31], [9] * 20, [300, 2, 44, 251, 7, 7, 19]]

MakeCheckpoint = Callable[[str], Path]


@pytest.fixture(scope="module")
def base(checkpoint: MakeCheckpoint) -> Path:
    return checkpoint("qwen3")


@pytest.fixture(scope="module")
def adapters(base: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Four adapters of different ranks, scales and places."""
    directory = tmp_path_factory.mktemp("adapters")
    return [
        write_peft(base, directory / "attention", seed=1),
        write_peft(base, directory / "everywhere", seed=2, r=8, modules=EVERY_LAYER),
        write_peft(base, directory / "mlp", seed=3, r=1, modules=["up_proj"], lora_alpha=3),
        write_peft(base, directory / "rslora", seed=4, r=6, modules=["q_proj"], use_rslora=True),
    ]


def tokens(llm: LLM, *requests: LoRARequest | None, prompt: list[int] = PROMPTS[0]) -> Any:
    """What each of several requests gets for the same prompt, together."""
    outputs = llm.generate([prompt] * len(requests), GREEDY, False, list(requests))
    return [output.outputs[0].token_ids for output in outputs]


def request(number: int, path: Path) -> LoRARequest:
    return LoRARequest(path.name, number, str(path))


@pytest.mark.parametrize("cpu_isa", ["auto", "torch"])
@pytest.mark.parametrize(
    "kind", ["qwen3", "qwen3-tied", "qwen2", "llama", "llama-bias", "mistral", "gemma3"]
)
def test_tokens_are_those_of_the_merged_weights(
    checkpoint: MakeCheckpoint, tmp_path: Path, kind: str, cpu_isa: str
) -> None:
    base = checkpoint(kind)
    adapter = write_peft(base, tmp_path / "a", modules=EVERY_LAYER)
    reference = merged(base, adapter)
    with LLM(str(base), cpu_isa=cpu_isa, **SMALL) as llm:
        outputs = llm.generate(PROMPTS, GREEDY, False, request(1, adapter))
        plain = llm.generate(PROMPTS, GREEDY, False)
    for prompt, output, unchanged in zip(PROMPTS, outputs, plain, strict=True):
        assert output.outputs[0].token_ids == greedy(reference, prompt, NUM_TOKENS)
        assert output.outputs[0].token_ids != unchanged.outputs[0].token_ids


@pytest.mark.parametrize(
    "config",
    [
        {"use_rslora": True},
        {"lora_alpha": 0.5, "use_rslora": None},
        {"rank_pattern": {"q_proj": 2, r"layers\.1\.self_attn\.v_proj": 7}},
        {"alpha_pattern": {"layers.[02].mlp.up_proj": 1, "o_proj": 16.5}},
        {"rank_pattern": {"^model.layers.0.self_attn.(q|k)_proj": 1}, "use_rslora": True},
        {"alpha_pattern": {"layers.0.*": 32}, "rank_pattern": {".*_proj": 3}},
        {"fan_in_fan_out": True, "layers_to_transform": [0, 1, 2], "eva_config": {"rho": 2.0}},
        {"init_lora_weights": "gaussian"},
        {"prefix": "base_model.model._orig_mod."},
    ],
)
def test_ranks_and_scales_are_those_of_peft(
    base: Path, tmp_path: Path, config: dict[str, Any]
) -> None:
    adapter = write_peft(base, tmp_path, seed=5, modules=EVERY_LAYER, **config)
    plain = {**config, "prefix": "base_model.model."}
    expected = merged(base, write_peft(base, tmp_path / "p", seed=5, modules=EVERY_LAYER, **plain))
    with LLM(str(base), **SMALL) as llm:
        (found,) = tokens(llm, request(1, adapter))
    assert found == greedy(expected, PROMPTS[0], NUM_TOKENS)


@pytest.mark.parametrize("max_loras", [1, 2, 4])
def test_four_adapters_and_none_in_one_batch(
    base: Path, adapters: list[Path], max_loras: int
) -> None:
    requests = [None, *(request(number, path) for number, path in enumerate(adapters, 1))]
    expected = [greedy(merged(base, path), PROMPTS[0], NUM_TOKENS) for path in adapters]
    with LLM(str(base), max_loras=max_loras, **SMALL) as llm:
        alone = [tokens(llm, lora)[0] for lora in requests]
        assert alone[1:] == expected
        for one, other in itertools.combinations(alone, 2):
            assert one != other
        assert tokens(llm, *requests, *reversed(requests)) == [*alone, *reversed(alone)]
        if max_loras == 4:
            llm.generate([PROMPTS[1]] * 5, GREEDY, False, requests)
            assert max(llm._runner.adapters._slots.tolist()) < 4  # type: ignore[union-attr]


def test_preempted_sequences_keep_their_adapters(base: Path, adapters: list[Path]) -> None:
    requests = [request(number, path) for number, path in enumerate(adapters, 1)] * 2
    with LLM(str(base), **SMALL | {"max_loras": 4, "num_kv_blocks": 8}) as llm:
        prompt = PROMPTS[1]
        alone = [tokens(llm, lora, prompt=prompt)[0] for lora in requests[:4]]
        assert tokens(llm, *requests, prompt=prompt) == alone * 2
        assert llm.engine.stats().num_preemptions


@pytest.mark.parametrize("quantization", ["int8", "int4-g32"])
class TestQuantizedWeights:
    """Adapters are exact above weights that are not."""

    @pytest.fixture
    def references(self, base: Path, adapters: list[Path], quantization: str) -> list[Any]:
        def rounded(matrix: Tensor) -> Tensor:
            return quantize(matrix, SCHEMES[quantization]).dequantize()

        return [merged(base, path, rounded) for path in adapters]

    def test_tokens(
        self, base: Path, adapters: list[Path], references: list[Any], quantization: str
    ) -> None:
        requests = [request(number, path) for number, path in enumerate(adapters, 1)]
        options = SMALL | {"max_loras": 4, "cpu_isa": "torch"}
        with LLM(str(base), quantization=quantization, **options) as llm:
            found = tokens(llm, *requests)
        assert found == [greedy(model, PROMPTS[0], NUM_TOKENS) for model in references]

    def test_kernels_that_round_activations(
        self, base: Path, adapters: list[Path], references: list[Any], quantization: str
    ) -> None:
        scored = SamplingParams(temperature=0, max_tokens=1, logprobs=20)
        with LLM(str(base), quantization=quantization, **SMALL) as llm:
            (output,) = llm.generate([PROMPTS[0]], scored, False, request(1, adapters[1]))
        assert output.outputs[0].logprobs is not None
        (top,) = output.outputs[0].logprobs
        ids = torch.tensor(list(top))
        found = torch.tensor([entry.logprob for entry in top.values()])
        with torch.inference_mode():
            own, other = (
                model(torch.tensor([PROMPTS[0]])).logits[0, -1].log_softmax(-1)[ids]
                for model in (references[1], references[0])
            )
        assert (found - own).abs().mean() < 0.3 < 1 < (found - other).abs().mean()


class TestPrefixCache:
    """What was computed with one adapter is never taken for what another makes of it."""

    def cached(self, llm: LLM, lora: LoRARequest | None) -> tuple[int, list[int]]:
        (output,) = llm.generate([list(range(100, 148))], GREEDY, False, lora)
        return output.num_cached_tokens, output.outputs[0].token_ids

    def test_adapters_share_nothing(self, base: Path, adapters: list[Path]) -> None:
        first, second = (request(n, path) for n, path in enumerate(adapters[:2], 1))
        with LLM(str(base), **SMALL) as llm:
            for lora in (None, first, second):
                assert self.cached(llm, lora)[0] == 0
            for lora in (None, first, second):
                assert self.cached(llm, lora)[0] == 32

    def test_nor_does_one_that_takes_a_name_and_an_id_over(
        self, base: Path, adapters: list[Path]
    ) -> None:
        with LLM(str(base), **SMALL) as llm:
            before = self.cached(llm, LoRARequest("a", 1, str(adapters[0])))[1]
            assert llm.remove_lora(1)
            num_cached, after = self.cached(llm, LoRARequest("a", 1, str(adapters[1])))
            assert (num_cached, after != before) == (0, True)
            assert llm.remove_lora(1)
            assert self.cached(llm, LoRARequest("a", 1, str(adapters[0]))) == (0, before)


@pytest.fixture(scope="module")
def llm(base: Path) -> LLM:
    return LLM(str(base), **SMALL)


class TestRequests:
    """Adapters as a program names them."""

    @pytest.fixture(autouse=True)
    def nothing_is_left_behind(self, llm: LLM) -> Any:
        yield
        assert not llm.has_unfinished()
        for number in llm.list_loras():
            assert llm.remove_lora(number)

    def test_they_are_loaded_once(self, llm: LLM, adapters: list[Path]) -> None:
        lora = request(3, adapters[0])
        assert llm.add_lora(lora)
        assert not llm.add_lora(lora)
        tokens(llm, lora, None, lora)
        assert llm.list_loras() == {3}
        assert llm.remove_lora(3)
        assert not llm.remove_lora(3)
        assert llm.list_loras() == set()

    def test_an_id_is_of_one_adapter(self, llm: LLM, adapters: list[Path]) -> None:
        llm.add_lora(request(3, adapters[0]))
        with pytest.raises(InvalidRequestError, match="lora_int_id 3 is that of 'attention' from"):
            tokens(llm, request(3, adapters[1]))

    def test_one_in_use_stays(self, llm: LLM, adapters: list[Path]) -> None:
        stream = llm.stream(PROMPTS[0], GREEDY, request(1, adapters[0]))
        with pytest.raises(InvalidRequestError, match="LoRA 'attention' is in use"):
            llm.remove_lora(1)
        next(stream)
        with pytest.raises(InvalidRequestError, match="LoRA 'attention' is in use"):
            llm.remove_lora(1)
        stream.close()
        assert llm.remove_lora(1)

    def test_all_ways_to_ask(self, llm: LLM, adapters: list[Path]) -> None:
        lora = request(1, adapters[0])
        ((expected,), (plain,)) = tokens(llm, lora), tokens(llm, None)
        assert expected != plain
        *_, last = llm.stream(PROMPTS[0], GREEDY, lora)
        assert last.outputs[0].token_ids == expected
        llm.add_request(PROMPTS[0], GREEDY, lora_request=lora)
        while llm.has_unfinished():
            (output,) = llm.step()
        assert output.outputs[0].token_ids == expected

    @pytest.mark.parametrize(
        ("requests", "message"),
        [
            ([None], "one for each of 2 prompts"),
            ([None] * 3, "one for each of 2 prompts"),
            ("a", "one for each of 2 prompts"),
            (7, "one for each of 2 prompts"),
            (["a", None], "lora_request must be a LoRARequest, got 'a'"),
            (LoRARequest("a", 9, "/nowhere"), "LoRA directory not found: /nowhere"),
        ],
    )
    def test_what_is_refused(self, llm: LLM, requests: Any, message: str) -> None:
        with pytest.raises(InvalidRequestError, match=message):
            llm.generate(PROMPTS[:2], GREEDY, False, requests)

    def test_an_llm_without_adapters(self, base: Path, adapters: list[Path]) -> None:
        with LLM(str(base), **SMALL | {"enable_lora": False}) as llm:
            with pytest.raises(InvalidRequestError, match="build it with enable_lora=True"):
                tokens(llm, request(1, adapters[0]))
            assert not llm.remove_lora(1)

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (("a", 0, "x"), "lora_int_id must be above 0, got 0"),
            (("a", "1", "x"), "lora_int_id must be an integer"),
            (("", 1, "x"), "must not be empty"),
            (("a", 1, ""), "must not be empty"),
            (("a", 1, None), "lora_path must be a string"),
        ],
    )
    def test_requests_that_are_none(self, arguments: Any, message: str) -> None:
        with pytest.raises(InvalidRequestError, match=message):
            LoRARequest(*arguments)


def test_no_more_is_allowed_than_the_options_say(base: Path, adapters: list[Path]) -> None:
    options = SMALL | {"lora_target_modules_lm": ["q_proj", "v_proj"], "max_lora_rank": 5}
    with LLM(str(base), **options) as llm:
        with pytest.raises(InvalidRequestError, match=r"changes model\.layers\.0\.self_attn\.k_pr"):
            llm.add_lora(request(1, adapters[0]))
        with pytest.raises(InvalidRequestError, match="rank 6: it must be 1 to max_lora_rank=5"):
            llm.add_lora(request(1, adapters[3]))
        assert llm.list_loras() == set()


def test_rows_do_not_depend_on_each_other_bit_by_bit(base: Path, adapters: list[Path]) -> None:
    requests = [None, *(request(number, path) for number, path in enumerate(adapters, 1))]
    scored = SamplingParams(temperature=0, max_tokens=4, logprobs=1)
    with LLM(str(base), deterministic=True, max_loras=4, **SMALL) as llm:
        alone = [llm.generate([PROMPTS[0]], scored, False, lora)[0] for lora in requests]
        together = llm.generate([PROMPTS[0]] * 5, scored, False, requests)
    for one, other in zip(alone, together, strict=True):
        assert one.outputs[0].logprobs == other.outputs[0].logprobs


def test_names_of_several_adapters_in_one_file(base: Path, tmp_path: Path) -> None:
    adapter = write_peft(base, tmp_path)
    path = adapter / "adapter_model.safetensors"
    tensors = load_file(path)
    renamed = {name.replace(".weight", ".default.weight"): t for name, t in tensors.items()}
    save_file(renamed, path)
    with LLM(str(base), **SMALL) as llm:
        assert llm.add_lora(request(1, adapter))
        save_file(tensors | {name: t.clone() for name, t in renamed.items()}, path)
        with pytest.raises(InvalidRequestError, match="holds several tensors"):
            llm.add_lora(request(2, adapter))
