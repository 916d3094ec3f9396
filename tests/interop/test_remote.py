"""hf-remote: one file of our own beside the weights, loaded where sqa is not installed."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, StaticCache

from sqa import ModelConfig, Rope, RopeScaling
from sqa.interop import export, load_config, load_model

Make = Callable[..., ModelConfig]

CASES = {
    "published shape": {"bias": True, "final_norm": False, "norm_eps": 2.0**-23},
    "reverse": {"num_query_heads": 2, "num_kv_heads": 4},
    "window and sinks": {"window": 6, "num_sink_tokens": 2},
    "capped": {"logit_softcap": 3.0, "scale": 0.2},
    "interleaved yarn": {
        "rope": Rope(interleaved=True, scaling=RopeScaling(kind="yarn", factor=4.0, original_max_seq_len=24))
    },
    "llama3": {"rope": Rope(scaling=RopeScaling(kind="llama3", factor=4.0, original_max_seq_len=24))},
    "linear": {"rope": Rope(scaling=RopeScaling(kind="linear", factor=2.0))},
    "no positions": {"rope": None},
    "norm and bias": {"qk_norm": True, "qkv_bias": True, "tie_embeddings": True},
}


def per_layer(config: ModelConfig) -> ModelConfig:
    layer = config.layers[0]
    return config.replace(attention=(layer, layer.replace(num_query_heads=2, num_kv_heads=1, window=9)))


def test_pytorch_gets_a_mask_only_where_one_is_needed(
    config_of: Make, model_of, saved, ids: torch.Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    export(saved(model_of(config_of())), tmp_path / "out", format="hf-remote")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=True)
    given: list[tuple[bool, bool]] = []
    attention = torch.nn.functional.scaled_dot_product_attention

    def watched(*args, attn_mask=None, is_causal=False, **options):  # type: ignore[no-untyped-def]
        given.append((attn_mask is not None, is_causal))
        return attention(*args, attn_mask=attn_mask, is_causal=is_causal, **options)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", watched)
    padding = torch.ones_like(ids)
    with torch.no_grad():
        whole = theirs(ids, attention_mask=padding).logits
        assert set(given) == {(False, True)}
        given.clear()
        first = theirs(ids[:, :7], use_cache=True)
        rest = theirs(ids[:, 7:-1], past_key_values=first.past_key_values)  # needs one: not causal from the first key
        last = theirs(ids[:, -1:], past_key_values=rest.past_key_values)
        assert set(given) == {(False, True), (True, False), (False, False)}
        chunks = torch.cat([part.logits for part in (first, rest, last)], dim=1)
        torch.testing.assert_close(chunks, whole, atol=1e-5, rtol=1e-5)
        given.clear()
        padding[0, :5] = 0
        theirs(ids, attention_mask=padding)
        assert set(given) == {(True, False)}


@pytest.mark.parametrize("name", [*CASES, "per layer"])
def test_logits_and_generation_are_ours(
    name: str, config_of: Make, model_of, saved, ids: torch.Tensor, tmp_path: Path
) -> None:
    config = per_layer(config_of()) if name == "per layer" else config_of(**CASES[name])
    model = model_of(config)
    export(saved(model), tmp_path / "out", format="hf-remote")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=True)
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    with torch.no_grad():
        torch.testing.assert_close(theirs(ids).logits, model(ids).logits, atol=1e-5, rtol=1e-5)
        ours, other = model(ids, padding_mask=mask.bool()).logits, theirs(ids, attention_mask=mask).logits
        torch.testing.assert_close(other[mask.bool()], ours[mask.bool()], atol=1e-5, rtol=1e-5)
    for padding in (torch.ones_like(ids), mask):
        ours = model.generate(ids, max_new_tokens=20, padding_mask=padding.bool())
        options = {"attention_mask": padding, "max_new_tokens": 20, "do_sample": False, "eos_token_id": None}
        for use_cache in (True, False):
            assert torch.equal(theirs.generate(ids, use_cache=use_cache, **options), ours)
    # the same directory is one of ours
    assert load_config(tmp_path / "out") == config
    again = load_model(tmp_path / "out")
    assert all(torch.equal(again.state_dict()[key], value) for key, value in model.state_dict().items())


def test_saved_again_by_transformers_it_is_still_both(
    config_of: Make, model_of, saved, ids: torch.Tensor, tmp_path: Path
) -> None:
    model = model_of(config_of(bias=True))
    export(saved(model), tmp_path / "out", format="hf-remote")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=True)
    theirs.save_pretrained(tmp_path / "again")
    with torch.no_grad():
        torch.testing.assert_close(load_model(tmp_path / "again")(ids).logits, model(ids).logits)
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "again", trust_remote_code=True)
        torch.testing.assert_close(loaded(ids).logits, theirs(ids).logits)


def test_it_trains_with_gradient_checkpointing(
    config_of: Make, model_of, saved, ids: torch.Tensor, tmp_path: Path
) -> None:
    export(saved(model_of(config_of(bias=True))), tmp_path / "out", format="hf-remote")
    gradients = []
    for checkpointing in (False, True):
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=True).train()
        if checkpointing:
            model.activation_checkpointing_enable()
        output = model(ids, labels=ids)
        expected = torch.nn.functional.cross_entropy(output.logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
        torch.testing.assert_close(output.loss, expected)
        output.loss.backward()
        gradients.append(model.model.layers[0].self_attn.q_proj.weight.grad)
    torch.testing.assert_close(*gradients)


def test_it_needs_no_sqa(config_of: Make, model_of, saved, ids: torch.Tensor, tmp_path: Path) -> None:
    model = model_of(config_of(bias=True))
    export(saved(model), tmp_path / "out", format="hf-remote")
    code = f"""
import json, sys
sys.modules["sqa"] = None  # importing it fails
import torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained({str(tmp_path / "out")!r}, trust_remote_code=True)
print(json.dumps(model(torch.tensor({ids[:1, :4].tolist()})).logits[0, -1].tolist()))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    with torch.no_grad():
        torch.testing.assert_close(
            torch.tensor(json.loads(done.stdout)), model(ids[:1, :4]).logits[0, -1], atol=1e-5, rtol=1e-5
        )


def test_an_encoder_is_refused(config_of: Make, model_of, saved, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="encoder"):
        export(saved(model_of(config_of(causal=False))), tmp_path / "out", format="hf-remote")


@pytest.mark.parametrize("name", ["published shape", "window and sinks", "capped", "norm and bias"])
def test_documents_in_a_row_stay_apart_where_positions_begin_again(
    name: str, config_of: Make, model_of, saved, ids: torch.Tensor, tmp_path: Path
) -> None:
    export(saved(model_of(config_of(**CASES[name]))), tmp_path / "out", format="hf-remote")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=True)
    positions = torch.cat([torch.arange(9), torch.arange(ids.shape[1] - 9)])[None]
    with torch.no_grad():
        apart = torch.cat([model(ids[:, :9]).logits, model(ids[:, 9:]).logits], dim=1)
        torch.testing.assert_close(model(ids, position_ids=positions).logits, apart, atol=1e-5, rtol=1e-5)


def test_outputs_are_what_was_asked_for(config_of: Make, model_of, saved, ids: torch.Tensor, tmp_path: Path) -> None:
    export(saved(model_of(config_of())), tmp_path / "out", format="hf-remote")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=True)
    with torch.no_grad():
        logits, _ = model(ids, return_dict=False)
        assert torch.equal(logits, model(ids).logits)
    for name in ("output_hidden_states", "output_attentions"):
        with pytest.raises(ValueError, match=f"{name} must be false"):
            model(ids, **{name: True})


def test_a_static_cache_is_refused_with_what_to_take(config_of: Make, model_of, saved, ids, tmp_path: Path) -> None:
    export(saved(model_of(config_of())), tmp_path / "out", format="hf-remote")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=True)
    with pytest.raises(ValueError, match="must be a dynamic cache, got StaticCache"):
        model.generate(ids, max_new_tokens=2, cache_implementation="static", disable_compile=True)
    with pytest.raises(ValueError, match="must be a dynamic cache, got StaticCache"):
        model(ids, past_key_values=StaticCache(config=model.config, max_cache_len=40))
    with pytest.raises(ValueError, match=r"attention_mask must be \(B, S\), got \(2, 1, 21, 21\)"):
        model(ids, attention_mask=torch.ones(2, 1, 21, 21, dtype=torch.bool))
