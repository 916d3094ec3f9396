"""Models in and out of files: ours, Hugging Face's, llama.cpp's and the SQA authors'."""

from sqa.interop.fewer_heads import FewerHeads, fewer_query_heads
from sqa.interop.hub import push_to_hub
from sqa.interop.replace import Replacement, replace_attention
from sqa.interop.source import ModelSource, load_config, load_model, open_source, read_text_side
from sqa.interop.writers import export, import_model, write_like

__all__ = [
    "FewerHeads",
    "ModelSource",
    "Replacement",
    "export",
    "fewer_query_heads",
    "import_model",
    "load_config",
    "load_model",
    "open_source",
    "push_to_hub",
    "read_text_side",
    "replace_attention",
    "write_like",
]
