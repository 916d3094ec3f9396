"""attn_implementation="sqa" against transformers' own attention."""

from copy import deepcopy
from dataclasses import asdict

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    BertConfig,
    BertModel,
    BloomConfig,
    DeepseekV3Config,
    Gemma2Config,
    LlamaConfig,
    MegatronBertConfig,
    MistralConfig,
    PhimoeConfig,
    Qwen2MoeConfig,
    StaticCache,
)

from sqa.interop import export, load_model
from sqa.interop.modeling_sqa import SqaConfig
from sqa.interop.transformers import register, sqa_attention

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
        # each has a config of its own: the implementation stands in it
        model = AutoModelForCausalLM.from_config(deepcopy(config), attn_implementation=implementation).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.1)
        models.append(model)
    assert [model.config._attn_implementation for model in models] == [theirs, "sqa"]
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


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable. is deprecated:FutureWarning")
@pytest.mark.parametrize("padded", [False, True], ids=["whole", "padded"])
@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointing"])
def test_bf16_autocast_trains_as_with_sdpa(prompt, checkpointing: bool, padded: bool) -> None:
    """Rotary positions hand fp32 queries and keys and bf16 values to the attention: this ended the process."""
    ids, mask = prompt
    labels = ids.masked_fill(mask == 0, -100) if padded else ids
    results = {}
    for implementation, dtype in (("sdpa", None), ("sdpa", torch.bfloat16), ("sqa", torch.bfloat16)):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(CASES["llama"][0], attn_implementation=implementation).train()
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        losses, gradients = [], []
        optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
        for _ in range(5):
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype is not None):
                loss = model(ids, attention_mask=mask if padded else None, labels=labels).loss
            loss.backward()
            gradients.append(torch.cat([parameter.grad.flatten() for parameter in model.parameters()]))
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.detach())
        results[implementation, dtype] = torch.stack(losses), gradients[0]
    exact, theirs, ours = results.values()
    assert ours[1].dtype == torch.float32
    assert (ours[1] - exact[1]).norm() <= 2 * (theirs[1] - exact[1]).norm()
    assert exact[0][-1] < exact[0][0] - 0.1
    torch.testing.assert_close(ours[0], theirs[0], atol=0, rtol=torch.finfo(torch.bfloat16).eps)


@pytest.mark.slow
@pytest.mark.parametrize("padded", [False, True], ids=["whole", "padded"])
def test_compiles_in_one_graph(pair, prompt, padded: bool) -> None:
    ids, mask = prompt
    given = mask if padded else torch.ones_like(mask)
    torch.compiler.reset()
    compiled = torch.compile(pair[1], fullgraph=True, backend="eager")
    with torch.no_grad():
        got = compiled(ids, attention_mask=given, use_cache=False).logits
        expected = pair[0](ids, attention_mask=given).logits
    torch.compiler.reset()
    torch.testing.assert_close(got[given.bool()], expected[given.bool()], atol=1e-5, rtol=1e-5)


def test_several_queries_over_more_keys_need_a_mask() -> None:
    """The keys were cut to the number of queries without a word, which is right for an empty static cache alone."""
    q, k = torch.randn(1, 4, 3, 16), torch.randn(1, 2, 9, 16)
    module = torch.nn.Module()
    with pytest.raises(ValueError, match="needs a mask for 3 queries over 9 keys, got None"):
        sqa_attention(module, q, k, k, None)
    assert sqa_attention(module, q[:, :, :1], k, k, None)[0].shape == (1, 1, 4, 16)


def test_a_float_mask_is_added_to_the_scores(pair, prompt) -> None:
    """Under a soft cap it was read as hidden or not: a bias of -1.5 hid the key."""
    ids, _ = prompt
    mask = torch.full((1, 1, 24, 24), torch.finfo(torch.float32).min).triu(1)
    mask[..., 5] -= 1.5
    with torch.no_grad():
        left, right = (model(ids, attention_mask=mask.expand(2, -1, -1, -1)).logits for model in pair)
    torch.testing.assert_close(left, right, atol=1e-5, rtol=1e-5)


def test_a_mask_longer_than_the_text_is_an_error_without_a_cache(prompt) -> None:
    """Its end was cut off without a word, so that the padding of another text was read."""
    ids, mask = prompt
    model = AutoModelForCausalLM.from_config(CASES["llama"][0], attn_implementation="sqa")
    with pytest.raises(RuntimeError):
        model(ids[:, 4:], attention_mask=mask, use_cache=False)
    caches = [StaticCache(model.config, max_cache_len=24) for _ in range(2)]
    with torch.no_grad():
        whole, cached = (
            model(ids[:, :20], attention_mask=mask[:, :length], past_key_values=cache).logits[mask[:, :20].bool()]
            for length, cache in zip((20, 24), caches, strict=True)
        )
    torch.testing.assert_close(whole, cached, atol=1e-5, rtol=1e-5)


def test_dropout_is_refused_not_dropped() -> None:
    config = LlamaConfig(**SHAPE, attention_dropout=0.1)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="sqa").train()
    with pytest.raises(ValueError, match="no dropout"):
        model(torch.ones(1, 4, dtype=torch.long))


@pytest.mark.parametrize("name", ["s_aux", "sinks", "position_bias", "indices", "block_indices"])
def test_what_would_change_the_result_is_refused_not_passed_over(name: str) -> None:
    """The keys that an indexer chose (DeepSeek V3.2) were passed over: attention was full without a word."""
    q = torch.randn(1, 2, 5, 16)
    with pytest.raises(ValueError, match=f"no {name};"):
        sqa_attention(torch.nn.Module(), q, q, q, None, **{name: torch.zeros(1)})


@pytest.mark.parametrize("decoder", [True, False], ids=["causal", "bidirectional"])
@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["", "compiled"])
def test_models_with_attention_of_their_own_are_refused(decoder: bool, compiled: bool) -> None:
    """They read no mask as no mask: each token saw those after it."""
    if decoder:
        config = BloomConfig(vocab_size=120, hidden_size=32, n_layer=1, n_head=2)
        model = AutoModelForCausalLM.from_config(config, attn_implementation="sqa")
    else:
        sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
        model = AutoModel.from_config(MegatronBertConfig(vocab_size=120, **sizes), attn_implementation="sqa")
    ids = torch.ones(1, 4, dtype=torch.long)
    torch.compiler.reset()
    with pytest.raises(Exception, match=r"'sqa' cannot run in models of (Bloom|MegatronBert)Config"):
        (torch.compile(model, backend="eager") if compiled else model)(ids, attention_mask=torch.ones_like(ids))
    torch.compiler.reset()


MOE = {"num_local_experts": 2, "num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 16}


def test_a_window_that_a_layer_does_not_name_is_an_error(prompt) -> None:
    """It was left out: Phi-3.5-MoE passes none on, and its mask said nothing of it."""
    ids, _ = prompt
    config = PhimoeConfig(**SHAPE, **MOE, sliding_window=9)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="sqa").eval()
    with pytest.raises(ValueError, match=r"PhimoeAttention does not say whether it has the window of its config \(9\)"):
        model(ids)
    model(ids[:, :9])  # it hides nothing
    config = Qwen2MoeConfig(**SHAPE, **MOE, shared_expert_intermediate_size=16)  # sliding_window=0: none
    AutoModelForCausalLM.from_config(config, attn_implementation="sqa")(ids)


@pytest.mark.parametrize("width", [12, 40], ids=["narrow", "wide"])
def test_values_as_wide_as_they_like(prompt, width: int) -> None:
    """DeepSeek's values are narrower than its keys."""
    ids, mask = prompt
    ranks = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 16, "v_head_dim": width}
    shape = {**SHAPE, "num_key_value_heads": 4, "num_hidden_layers": 1, "first_k_dense_replace": 1}
    outputs = []
    for implementation in ("sdpa", "sqa"):
        torch.manual_seed(0)
        config = DeepseekV3Config(**shape, **ranks)
        model = AutoModelForCausalLM.from_config(config, attn_implementation=implementation).eval()
        with torch.no_grad():
            outputs.append([model(ids).logits, model(ids, attention_mask=mask).logits[mask.bool()]])
    torch.testing.assert_close(outputs[0], outputs[1], atol=1e-5, rtol=1e-5)


def test_registered_classes_load_without_remote_code(config_of, model_of, saved, ids, tmp_path) -> None:
    model = model_of(config_of(bias=True))
    export(saved(model), tmp_path / "out", format="hf-remote")
    assert type(AutoConfig.from_pretrained(tmp_path / "out", trust_remote_code=False)).__module__.startswith("sqa.")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=False)
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids).logits, model(ids).logits, atol=1e-5, rtol=1e-5)
    loaded.save_pretrained(tmp_path / "again")
    fresh = AutoModelForCausalLM.from_config(SqaConfig(**asdict(model.config)))
    fresh.save_pretrained(tmp_path / "fresh")
    for folder, saver in (("again", loaded), ("fresh", fresh)):
        assert (tmp_path / folder / "modeling_sqa.py").read_bytes() == (tmp_path / "out/modeling_sqa.py").read_bytes()
        with torch.no_grad():
            ours = load_model(tmp_path / folder)(ids).logits
            torch.testing.assert_close(ours, saver(ids).logits, atol=1e-5, rtol=1e-5)
