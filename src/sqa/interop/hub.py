"""The Hugging Face Hub: models by name, and publishing with a generated card."""

import json
import re
import tempfile
from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any

from sqa import cost
from sqa.config import ModelConfig
from sqa.errors import InputError, first_line, load_extra, shown
from sqa.variants import VARIANTS

_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def local_path(source: str | Path) -> Path:
    """`source` if it is a folder or a GGUF file; else the model of that name, downloaded into the Hub's cache.

    Raises InputError when it is none of these, ImportError when huggingface-hub is missing.
    """
    if not isinstance(source, str | PathLike):
        raise InputError(
            f"model: give a directory, a .gguf file or a name on the Hub, got {shown(repr(source))}; "
            f"a model in memory is saved first, with its save(directory)"
        )
    path = Path(source)
    if path.is_dir() or (path.is_file() and path.suffix == ".gguf"):
        return path
    if path.exists():
        raise InputError(f"model: {source} is a file; give the directory it is in, or a .gguf file")
    if not _HUB_NAME.fullmatch(str(source)) or path.suffix == ".gguf":
        raise InputError(f"model: {source} is no directory, no .gguf file, nor a name on the Hub (owner/name)")
    hub = _hub()
    patterns = ["*.json", "*.safetensors", "*.jinja"]
    try:
        return Path(hub.snapshot_download(str(source), allow_patterns=patterns))
    except Exception as error:  # network, missing name and missing permission have no common base
        raise InputError(
            f"model: {source} is no local directory and could not be had from the Hub: {first_line(error)}"
        ) from error


def _hub() -> Any:
    return load_extra("huggingface_hub", "the Hub needs huggingface-hub", "hub")


def model_card(
    config: ModelConfig,
    *,
    licence: str,
    result: Mapping[str, Any] | None = None,
    plan: Mapping[str, Any] | None = None,
    usage: str = "",
) -> str:
    """A README.md with shape and cost; with `result`, a row of results.jsonl, what training reached; with the plan."""
    layer, n = config.layers[0], config.max_seq_len
    heads = f"{layer.num_query_heads} / {layer.num_kv_heads}" if len(config.head_counts) == 1 else "differ by layer"
    rows: dict[str, Any] = {
        "query / KV heads": heads,
        "nominal heads, head_dim": f"{layer.num_heads}, {layer.head_dim}",
        "width, layers, feed-forward": f"{config.d_model}, {config.num_layers}, {config.d_ff}",
        "vocabulary, context": f"{config.vocab_size:,}, {n:,}",
        "parameters": cost.parameters(config),
        f"prefill FLOPs at {n:,} tokens": f"{cost.prefill_flops(config, n):.3g}",
        "KV cache a token (16 bit), bytes": cost.kv_cache_bytes(config),
    }
    title = "Language model"
    if result is not None:
        title = VARIANTS[result["variant"]].label if result["variant"] in VARIANTS else result["variant"]
        rows |= {f"validation {name.replace('_', ' ')}": value for name, value in result["val"].items()}
        rows |= {name.replace("_", " "): result[name] for name in ("seed", "steps", "tokens", "data_fingerprint")}
    table = "\n".join(f"| {name} | {_shown(value)} |" for name, value in rows.items() if value is not None)
    planned = f"\n## Plan\n\n```json\n{json.dumps(plan, indent=2)}\n```\n" if plan is not None else ""
    return (
        f"---\nlicense: {licence}\npipeline_tag: text-generation\ntags:\n- sparse-query-attention\n---\n\n"
        f"# {title}, {heads} query / KV heads\n\n"
        f"Trained with `sparse-query-attention`. Loss and accuracy "
        f"count real tokens, unless they say all positions.\n\n| | |\n|---|---|\n{table}\n\n{usage}{planned}"
    )


def _shown(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:.5g}" if isinstance(value, float) else str(value)


def push_to_hub(
    source: Path,
    repo_id: str,
    *,
    licence: str,
    format: str = "hf",
    private: bool = False,
    result: Mapping[str, Any] | None = None,
    plan: Mapping[str, Any] | None = None,
) -> str:
    """Export `source` as a `format` that transformers loads, add a model card and upload it; returns the commit's URL.

    `licence` is the Hub's identifier, such as "apache-2.0"; `result`, a row of results.jsonl, and `plan` go into the
    card. The token is huggingface-hub's own (`hf auth login`). Raises InputError for an unknown format or bad name.
    """
    from sqa.interop import export, load_config
    from sqa.interop.writers import FORMATS

    options = {name: row.from_pretrained for name, row in FORMATS.items() if row.from_pretrained is not None}
    if format not in options:
        raise InputError(f"push: format must be one of {', '.join(options)}, got {format!r}")
    if not _HUB_NAME.fullmatch(repo_id):
        raise InputError(f"push: repo_id must be owner/name, got {repo_id!r}")
    hub = _hub()
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "model"
        export(source, out, format=format)
        usage = (
            f"```python\nfrom transformers import AutoModelForCausalLM\n\n"
            f"model = AutoModelForCausalLM.from_pretrained({repo_id!r}{options[format]})\n```\n"
        )
        card = model_card(load_config(source), licence=licence, result=result, plan=plan, usage=usage)
        (out / "README.md").write_text(card, encoding="utf-8")
        api = hub.HfApi()
        api.create_repo(repo_id, private=private, exist_ok=True)
        commit = api.upload_folder(repo_id=repo_id, folder_path=out, commit_message=f"Upload {format} model")
    return str(commit.commit_url)
