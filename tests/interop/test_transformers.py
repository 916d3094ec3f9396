"""attn_implementation="sqa" against transformers' own attention."""

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    BertConfig,
    BertModel,
    Gemma2Config,
    LlamaConfig,
    MistralConfig,
)

from sqa.interop import export
from sqa.interop.transformers import register

SHAPE = {
    "vocab_size": 120,
    "hidden_size": 64,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": 0,
}
CASES = {
    "llama": (LlamaConfig(**SHAPE), "sdpa"),
    "mistral window": (MistralConfig(**SHAPE, sliding_window=9), "sdpa"),
    "gemma2": (
        Gemma2Config(**SHAPE, head_dim=16, sliding_window=9, query_pre_attn_scalar=20, attn_logit_softcapping=2.0),
        "eager",
    ),
}


@pytest.fixture(scope="module", autouse=True)
def registered() -> None:
    register()
    register()  # twice is no error


@pytest.fixture(params=CASES)
def pair(request: pytest.FixtureRequest):
    """The same model with their attention and with ours."""
    config, theirs = CASES[request.param]
    models = []
    for implementation in (theirs, "sqa"):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, attn_implementation=implementation).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.1)
        models.append(model)
    assert models[1].config._attn_implementation == "sqa"
    return models


@pytest.fixture
def prompt() -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.randint(1, 120, (2, 24), generator=torch.Generator().manual_seed(2))
    mask = torch.ones_like(ids)
    mask[1, :7] = 0
    return ids, mask


def test_logits_and_gradients(pair, prompt) -> None:
    theirs, ours = pair
    ids, mask = prompt
    with torch.no_grad():
        torch.testing.assert_close(ours(ids).logits, theirs(ids).logits, atol=1e-5, rtol=1e-5)
        real = mask.bool()
        left, right = (model(ids, attention_mask=mask).logits[real] for model in pair)
        torch.testing.assert_close(left, right, atol=1e-5, rtol=1e-5)
        flipped = mask.flip(1)
        left, right = (model(ids, attention_mask=flipped).logits[flipped.bool()] for model in pair)
        torch.testing.assert_close(left, right, atol=1e-5, rtol=1e-5)
    gradients = []
    for model in pair:
        model(ids, labels=ids).loss.backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    for left, right in zip(*gradients, strict=True):
        torch.testing.assert_close(left, right, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_generation_with_left_padding(pair, prompt, cache: str) -> None:
    ids, mask = prompt
    for given in (torch.ones_like(mask), mask):
        theirs, ours = (
            model.generate(
                ids,
                attention_mask=given,
                max_new_tokens=20,
                do_sample=False,
                cache_implementation=cache,
                disable_compile=True,
            )
            for model in pair
        )
        assert torch.equal(theirs, ours)


def test_chunked_prefill(pair, prompt) -> None:
    ids, _ = prompt
    with torch.no_grad():
        for model in pair:
            first = model(ids[:, :15], use_cache=True)
            rest = model(ids[:, 15:], past_key_values=first.past_key_values).logits
            torch.testing.assert_close(rest, pair[0](ids).logits[:, 15:], atol=1e-5, rtol=1e-5)


def test_packed_sequences_stay_apart(pair, prompt) -> None:
    ids, _ = prompt
    positions = torch.cat((torch.arange(10), torch.arange(14)))[None].expand(2, -1)
    with torch.no_grad():
        left, right = (model(ids, position_ids=positions, use_cache=False).logits for model in pair)
    torch.testing.assert_close(left, right, atol=1e-5, rtol=1e-5)


def test_encoder() -> None:
    config = BertConfig(vocab_size=90, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=40)
    ids = torch.randint(1, 90, (2, 12), generator=torch.Generator().manual_seed(2))
    mask = torch.ones_like(ids)
    mask[0, 8:] = 0
    outputs = []
    for implementation in ("sdpa", "sqa"):
        torch.manual_seed(0)
        model = BertModel._from_config(config, attn_implementation=implementation).eval()
        with torch.no_grad():
            outputs.append([model(ids).last_hidden_state, model(ids, attention_mask=mask).last_hidden_state[0, :8]])
    torch.testing.assert_close(outputs[0], outputs[1], atol=1e-5, rtol=1e-5)


def test_dropout_is_refused_not_dropped() -> None:
    config = LlamaConfig(**SHAPE, attention_dropout=0.1)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="sqa").train()
    with pytest.raises(ValueError, match="no dropout"):
        model(torch.ones(1, 4, dtype=torch.long))


def test_registered_classes_load_without_remote_code(config_of, model_of, saved, ids, tmp_path) -> None:
    model = model_of(config_of(bias=True))
    export(saved(model), tmp_path / "out", format="hf-remote")
    assert type(AutoConfig.from_pretrained(tmp_path / "out", trust_remote_code=False)).__module__.startswith("sqa.")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=False)
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids).logits, model(ids).logits, atol=1e-5, rtol=1e-5)
