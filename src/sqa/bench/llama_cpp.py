"""llama.cpp as a peer, with our weights in a GGUF file. It does forward passes only."""

import tempfile
from pathlib import Path
from typing import NamedTuple

import llama_cpp
import numpy as np
import torch
from torch import Tensor, nn

from sqa.interop.gguf_writer import check_gguf, write_gguf
from sqa.interop.text import TextSide
from sqa.model import Transformer


class Setting(NamedTuple):
    """The dtype of the weights in the file, and whether to use llama.cpp's flash attention."""

    dtype: str
    flash: bool

    @property
    def exact(self) -> bool:
        """Whether nothing is rounded below fp32, so that results must equal ours."""
        return self.dtype == "f32"


SETTINGS = {
    f"{dtype}{' flash' if flash else ''}": Setting(dtype, flash)
    for dtype in ("f32", "bf16", "q8_0")
    for flash in (False, True)
}


class LlamaCpp(nn.Module):
    """A model in llama.cpp with as many threads as PyTorch; (B, T) token ids give the last logits (B, 1, V) in fp32.

    Raises InputError for a model that a GGUF file of ours cannot hold.
    """

    def __init__(self, model: Transformer, setting: Setting) -> None:
        super().__init__()
        self.config = model.config
        cache_type = llama_cpp.GGML_TYPE_F32 if setting.exact else llama_cpp.GGML_TYPE_F16
        with tempfile.TemporaryDirectory() as folder:  # the file stays mapped after it is deleted
            path = Path(folder) / "model.gguf"
            check_gguf(model.config, None, path)
            write_gguf(model, TextSide(), path, setting.dtype)
            self._llama = llama_cpp.Llama(
                str(path),
                n_ctx=self.config.max_seq_len,
                n_threads=torch.get_num_threads(),
                n_threads_batch=torch.get_num_threads(),
                type_k=cache_type,
                type_v=cache_type,
                flash_attn=setting.flash,
                verbose=False,
            )

    def forward(self, input_ids: Tensor) -> Tensor:
        """input_ids int64 (B, T) -> logits of the last position (B, 1, V), fp32."""
        return torch.stack([self._last(row.tolist()) for row in input_ids])

    def _last(self, tokens: list[int]) -> Tensor:
        self._llama.reset()
        self._llama.eval(tokens)
        logits = llama_cpp.llama_get_logits_ith(self._llama.ctx, -1)
        return torch.from_numpy(np.ctypeslib.as_array(logits, shape=(1, self.config.vocab_size)).copy())
