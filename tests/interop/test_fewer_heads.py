"""Head counts for an existing shape."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, BertConfig, LlamaConfig, MistralConfig, Qwen2Config

from sqa import InputError, ModelConfig, Transformer, fewer_query_heads
from sqa.cost import attention_flops
from sqa.interop import load_model

Make = Callable[..., ModelConfig]
SMOLLM2 = LlamaConfig(hidden_size=576, num_attention_heads=9, num_key_value_heads=3, num_hidden_layers=2)
QWEN2 = Qwen2Config(hidden_size=896, num_attention_heads=14, num_key_value_heads=2, num_hidden_layers=2)
MISTRAL = MistralConfig(hidden_size=4096, num_attention_heads=32, num_key_value_heads=8, num_hidden_layers=2)
PLAIN = LlamaConfig(hidden_size=96, num_attention_heads=12, num_hidden_layers=2)


@pytest.mark.parametrize(
    ("config", "counts"),
    [
        (SMOLLM2, [(6, 3), (3, 3)]),
        (QWEN2, [(10, 2), (8, 2), (4, 2)]),
        (MISTRAL, [(24, 8), (16, 8), (8, 8)]),
        (PLAIN, [(8, 8), (6, 6), (3, 3)]),
    ],
)
def test_counts(config: LlamaConfig, counts: list[tuple[int, int]], tmp_path: Path) -> None:
    found = fewer_query_heads(config)
    assert [(choice.num_query_heads, choice.num_kv_heads) for choice in found] == counts
    heads = config.num_attention_heads
    assert [choice.attention_saving for choice in found] == [heads / query for query, _ in counts]
    head_dim = config.hidden_size // heads
    for choice in found:
        assert type(choice.config) is type(config)
        given = choice.config.num_attention_heads, choice.config.num_key_value_heads, choice.config.head_dim
        assert given == (choice.num_query_heads, choice.num_kv_heads, head_dim)
        choice.config.save_pretrained(tmp_path)  # checks it
    assert config.num_attention_heads == heads


def test_the_config_of_transformers_builds_a_model_that_we_read(ids: torch.Tensor, tmp_path: Path) -> None:
    small = LlamaConfig(
        vocab_size=300, hidden_size=72, intermediate_size=64, num_attention_heads=9, num_key_value_heads=3,
        num_hidden_layers=2, max_position_embeddings=64,
    )  # fmt: skip
    theirs = AutoModelForCausalLM.from_config(fewer_query_heads(small)[0].config).eval()
    assert theirs.model.layers[0].self_attn.q_proj.weight.shape == (6 * 8, 72)
    theirs.save_pretrained(tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(load_model(tmp_path)(ids).logits, theirs(ids).logits, atol=1e-5, rtol=1e-5)


def test_a_directory_and_a_config_of_ours(config_of: Make, model_of, saved) -> None:
    config = config_of(num_heads=8, num_query_heads=8, num_kv_heads=2, window=7)
    expected = [config.replace(attention=config.layers[0].replace(num_query_heads=n)) for n in (6, 4, 2)]
    for source in (config, saved(model_of(config))):
        found = [choice.config for choice in fewer_query_heads(source)]
        assert found == expected
        assert isinstance(Transformer(found[0]), Transformer)


def test_the_saving_is_over_the_heads_that_the_model_has(config_of: Make) -> None:
    """Of eight nominal heads it has six: three of them halve its attention."""
    config = config_of(num_heads=8, num_query_heads=6, num_kv_heads=3)
    (choice,) = fewer_query_heads(config)
    before, after = (attention_flops(each.layers[0], 64) for each in (config, choice.config))
    assert choice.attention_saving == before / after == 2


def test_what_has_no_choices_is_refused(config_of: Make) -> None:
    with pytest.raises(InputError, match="1 query heads and 1 KV heads leave none"):
        fewer_query_heads(config_of(num_query_heads=1, num_kv_heads=1))
    with pytest.raises(InputError, match="llama, mistral, qwen2, qwen3, got BertConfig"):
        fewer_query_heads(BertConfig())
    layer = config_of().layers[0]
    with pytest.raises(InputError, match="different head counts"):
        fewer_query_heads(config_of(attention=(layer, layer.replace(num_query_heads=2))))
