"""The authors' checkpoints: their format built here from its description, computed by a straight line of torch."""

import json
import math
import warnings
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor

from sqa.interop import import_model, load_model
from sqa.variants import preset

D, H, FF, VOCAB, LAYERS, LENGTH = 32, 8, 24, 50, 2, 40
KINDS = {  # att_type, att_groups, att_num_query_groups -> Hq, Hkv
    "sqa": ("sqa", 2, 4, 4, 2),
    "ssqa": ("sqa", 4, 4, 4, 4),
    "xsmqa": ("sqa", 1, 2, 2, 1),
    "mha": ("mha", 1, 1, 8, 8),
    "gqa": ("gqa", 2, 1, 8, 2),
    "mqa": ("mqa", 1, 1, 8, 1),
}


def write(folder: Path, kind: str, **changes: object) -> Path:
    att_type, groups, query_groups, hq, hkv = KINDS[kind]
    config = {
        "num_layers": LAYERS,
        "vocab_size": VOCAB,
        "embed_dim": D,
        "ff_dim": FF,
        "att_heads": H,
        "seq_len": LENGTH,
        "att_type": att_type,
        "att_groups": groups,
        "att_num_query_groups": query_groups,
        "use_flash_attention": False,
        "use_gated": True,
        "ff_activation": "swish",
        "use_rms_norm": True,
        "use_moe_ff": False,
        "use_head_norm": False,
        **changes,
    }
    generator = torch.Generator().manual_seed(3)

    def normal(*shape: int, mean: float = 0.0) -> Tensor:
        return torch.randn(shape, generator=generator) * 0.2 + mean

    head_dim = D // H
    inv_freq = 10_000.0 ** (-torch.arange(0, head_dim, 2).float() / head_dim)
    angles = torch.outer(torch.arange(LENGTH).float(), inv_freq)
    tensors = {
        "model.embedding.weight": normal(VOCAB, D),
        "model.head.weight": normal(VOCAB, D),
        "model.head.bias": normal(VOCAB),
    }
    for i in range(LAYERS):
        tensors |= {
            f"model.layers.{i}.{name}": value
            for name, value in {
                "attention.q_proj.weight": normal(hq * head_dim, D),
                "attention.k_proj.weight": normal(hkv * head_dim, D),
                "attention.v_proj.weight": normal(hkv * head_dim, D),
                "attention.out_proj.weight": normal(D, hq * head_dim),
                "attention.out_proj.bias": normal(D),
                "attention.rope.inv_freq": inv_freq.clone(),
                "attention.rope.cache": torch.stack((angles.cos(), angles.sin()), -1),
                "ff.fc1.linear.weight": normal(2 * FF, D),
                "ff.fc1.linear.bias": normal(2 * FF),
                "ff.fc2.weight": normal(D, FF),
                "ff.fc2.bias": normal(D),
                "norm1.weight": normal(D, mean=1.0),
                "norm2.weight": normal(D, mean=1.0),
            }.items()
        }
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "model.safetensors")
    return folder


def straight_line(w: dict[str, Tensor], ids: list[int], hq: int, hkv: int) -> Tensor:
    """Logits (T, V), one head, one pair and one token after another; nothing of sqa."""

    def norm(x: Tensor, weight: Tensor) -> Tensor:
        return x / torch.sqrt((x * x).mean() + 2.0**-23) * weight

    def rotated(head: Tensor, position: int) -> Tensor:
        out = head.clone()
        for j in range(len(head) // 2):
            angle = position * 10_000.0 ** (-2 * j / len(head))
            a, b = head[2 * j], head[2 * j + 1]
            out[2 * j] = a * math.cos(angle) - b * math.sin(angle)
            out[2 * j + 1] = a * math.sin(angle) + b * math.cos(angle)
        return out

    size = D // H
    stream = [w["model.embedding.weight"][token] for token in ids]
    for i in range(LAYERS):
        p = {key.removeprefix(f"model.layers.{i}."): value for key, value in w.items()}
        normed = [norm(x, p["norm1.weight"]) for x in stream]
        q, k, v = ([p[f"attention.{name}_proj.weight"] @ x for x in normed] for name in "qkv")
        for t in range(len(ids)):
            heads = []
            for h in range(hq):
                group = h // (hq // hkv)
                query = rotated(q[t][h * size : (h + 1) * size], t)
                own = slice(group * size, (group + 1) * size)
                scores = torch.stack([query @ rotated(k[s][own], s) / math.sqrt(size) for s in range(t + 1)])
                weights = scores.softmax(0)
                heads.append(sum(weights[s] * v[s][own] for s in range(t + 1)))
            stream[t] = stream[t] + p["attention.out_proj.weight"] @ torch.cat(heads) + p["attention.out_proj.bias"]
        for t, x in enumerate(stream):
            both = p["ff.fc1.linear.weight"] @ norm(x, p["norm2.weight"]) + p["ff.fc1.linear.bias"]
            value, gate = both[:FF], both[FF:]
            stream[t] = x + p["ff.fc2.weight"] @ (value * F.silu(gate)) + p["ff.fc2.bias"]
    return torch.stack(stream) @ w["model.head.weight"].T + w["model.head.bias"]


@pytest.mark.parametrize("kind", KINDS)
def test_logits_are_those_of_the_straight_line(kind: str, tmp_path: Path) -> None:
    folder = write(tmp_path / "theirs", kind)
    model = load_model(folder)
    hq, hkv = KINDS[kind][3:]
    assert (model.config.layers[0].num_query_heads, model.config.layers[0].num_kv_heads) == (hq, hkv)
    ids = [7, 3, 49, 3, 0, 21, 12, 12, 30]
    weights = {key: value.double() for key, value in load_file(folder / "model.safetensors").items()}
    expected = straight_line(weights, ids, hq, hkv).float()
    with torch.no_grad():
        torch.testing.assert_close(model(torch.tensor([ids])).logits[0], expected, atol=1e-5, rtol=1e-5)


def test_a_published_shape_has_the_published_count(tmp_path: Path) -> None:
    import_model(write(tmp_path / "theirs", "sqa"), tmp_path / "ours")
    config = load_model(tmp_path / "ours").config
    published = preset("published", "sqa")
    assert (config.bias, config.final_norm, config.norm_eps) == (
        published.bias,
        published.final_norm,
        published.norm_eps,
    )


def test_flash_attention_in_the_config_is_worth_one_warning(tmp_path: Path) -> None:
    folder = write(tmp_path / "theirs", "sqa", use_flash_attention=True)
    with pytest.warns(UserWarning, match="mixed no tokens") as caught:
        model = load_model(folder)
    assert len(caught) == 1
    ids = torch.tensor([[1, 2, 3, 4, 5]])
    changed = torch.tensor([[1, 2, 9, 4, 5]])
    with torch.no_grad():
        differs = (model(ids).logits != model(changed).logits).any(-1)[0]
    assert differs.tolist() == [False, False, True, True, True]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_model(write(tmp_path / "theirs", "sqa"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"use_moe_ff": True}, "mixture of experts"),
        ({"use_gated": False}, "use_gated"),
        ({"ff_activation": "gelu"}, "ff_activation"),
        ({"use_rms_norm": False}, "use_rms_norm"),
        ({"use_head_norm": True}, "use_head_norm"),
        ({"att_type": "mla"}, "att_type"),
        ({"att_type": ["sqa"]}, "att_type must be one of mha, gqa, mqa, sqa, got"),
        ({"att_groups": None}, "att_groups"),
        ({"att_heads": "8"}, "att_heads in config.json must be a whole number above 0, got '8'"),
        ({"seq_len": None}, "config.json lacks seq_len"),
        ({"ff_dim": 25}, "expected 50 rows"),
        ({"vocab_size": 51}, r"\(50, 32\), expected \(51, 32\)"),
    ],
)
def test_other_shapes_are_refused(changes: dict, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        load_model(write(tmp_path / "theirs", "sqa", **changes))


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("model.layers.0.attention.q_proj.bias", torch.zeros(4), "unknown model.layers.0.self_attn.q_proj.bias"),
        ("model.norm.weight", torch.zeros(4), "unknown model.norm"),
        ("model.head.bias", None, "missing lm_head.bias"),
        ("model.layers.1.ff.fc1.linear.bias", None, "missing model.layers.1.mlp"),
        ("model.layers.1.attention.rope.inv_freq", torch.ones(2) * 0.7, "rotary table"),
    ],
)
def test_every_key_is_accounted_for(key: str, value: Tensor | None, message: str, tmp_path: Path) -> None:
    folder = write(tmp_path / "theirs", "sqa")
    tensors = load_file(folder / "model.safetensors")
    if value is None:
        del tensors[key]
    else:
        tensors[key] = value
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(ValueError, match=message):
        load_model(folder)
