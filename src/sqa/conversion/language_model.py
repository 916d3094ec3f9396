"""Causal language models in conversion: our Transformer, which reads Llama, Mistral, Qwen2 and Qwen3."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from sqa import interop, storage
from sqa.config import AttentionConfig
from sqa.conversion.records import LanguageQuality
from sqa.conversion.subject import AttentionView, Subject
from sqa.data.batches import Batch, pack
from sqa.errors import InputError
from sqa.interop.text import TextSide
from sqa.losses import IGNORE, linear_distillation
from sqa.model import Transformer


class LanguageModel(Subject):
    """A language model. Its batches are packed rows, in which every position is a real token."""

    default_speed_at = (512, 2048, 8192)
    predicts = True

    @classmethod
    def load(cls, directory: Path) -> LanguageModel:
        return cls(interop.load_model(directory))

    @classmethod
    def shape(cls, directory: Path) -> tuple[tuple[AttentionConfig, ...], int]:
        source = interop.open_source(directory)
        source.read_text_side()  # `save` copies it
        return source.config.layers, source.config.max_seq_len

    @property
    def views(self) -> list[AttentionView]:
        layers = (block.self_attn for block in self.model.model.layers)
        return [AttentionView(each.config, each.q_proj, each.k_proj, each.v_proj, each.o_proj) for each in layers]

    def batches(self, side: TextSide, documents: Iterator[str], rows: int, length: int, batch_size: int) -> list[Batch]:
        if not rows:
            return []
        end = [] if side.end_of_document is None else [side.end_of_document]
        encoded = (side.encode(document) + end for document in documents)
        text = packed_rows(encoded, rows=rows, length=length)
        return [text.take(slice(start, start + batch_size), self.device) for start in range(0, rows, batch_size)]

    def row_of(self, input_ids: Tensor) -> Batch:
        return Batch(input_ids=input_ids, labels=input_ids, labels_all_positions=None, document_ids=None)

    def attend(self, index: int, x: Tensor, batch: Batch) -> Tensor:
        return self.model.model.layers[index].self_attn(x, document_ids=batch.document_ids)

    def layers(self, batch: Batch) -> Iterator[tuple[Tensor, Tensor]]:
        x = self.model.model.embed_tokens(batch.input_ids)
        for index, layer in enumerate(self.model.model.layers):
            normed = layer.input_layernorm(x)
            output = self.attend(index, normed, batch)
            yield normed, output
            x = x + output
            x = x + layer.mlp(layer.post_attention_layernorm(x))

    def hidden(self, batch: Batch) -> Tensor:
        return self.model.hidden_states(batch.input_ids, document_ids=batch.document_ids)

    def prefill(self, batch: Batch) -> object:
        """Logits of the last position."""
        return self.model(batch.input_ids, num_logits=1)

    def loss(self, batch: Batch) -> Tensor:
        """Mean of -log p over the targets."""
        return self.model(batch.input_ids, batch.labels, document_ids=batch.document_ids).loss

    def distance(self, hidden: Tensor, teacher: LanguageModel, teacher_hidden: Tensor, batch: Batch) -> Tensor:
        """KL(teacher || this model), mean over tokens."""
        head, other = self.model.lm_head, teacher.model.lm_head
        total = linear_distillation(hidden, head.weight, head.bias, (teacher_hidden, other.weight, other.bias))
        return total / batch.input_ids.numel()

    @torch.no_grad()
    def outputs(self, batches: Iterable[Batch]) -> list[Tensor]:
        return [self.hidden(batch) for batch in batches]

    @torch.no_grad()
    def measure(self, batches: Iterable[Batch], teacher: LanguageModel, reference: Sequence[Tensor]) -> LanguageQuality:
        sums = dict.fromkeys(("nll", "kl", "agreed", "real", "positions"), 0.0)
        for batch, target in zip(batches, reference, strict=True):
            hidden = target if teacher is self else self.hidden(batch)
            for own, other, labels in zip(hidden, target, batch.labels, strict=True):  # a row at a time: V is large
                log_p = self.model.lm_head(own).float().log_softmax(-1)
                log_q = log_p if teacher is self else teacher.model.lm_head(other).float().log_softmax(-1)
                real = labels != IGNORE
                sums["nll"] -= float(log_p[real].gather(1, labels[real, None]).sum())
                sums["kl"] += float((log_q.exp() * (log_q - log_p)).sum())
                sums["agreed"] += int((log_p.argmax(-1) == log_q.argmax(-1)).sum())
                sums["real"] += int(real.sum())
                sums["positions"] += len(labels)
        loss = sums["nll"] / sums["real"]
        return LanguageQuality(
            loss=loss,
            perplexity=math.exp(min(loss, 700.0)),
            kl=sums["kl"] / sums["positions"],
            agreement=sums["agreed"] / sums["positions"],
        )

    def with_heads(self, attention: Sequence[AttentionConfig]) -> LanguageModel:
        config = self.model.config.replace(attention=tuple(attention))
        old = self.model.state_dict()
        with torch.device("meta"):
            new = Transformer(config).state_dict()
        tensors = {
            key: old[key] if old[key].shape == wanted.shape else old[key].new_zeros(wanted.shape)
            for key, wanted in new.items()
        }
        return LanguageModel(Transformer.from_tensors(config, tensors, "the converted model").to(self.device))

    def continued(self, batch: Batch, new_tokens: int) -> Tensor:
        return self.model.generate(batch.input_ids, max_new_tokens=new_tokens)[:, batch.input_ids.shape[1] :]

    @classmethod
    def serve(cls, directory: Path) -> str:
        if storage.read_config(directory).get("model_type") == storage.MODEL_TYPE:
            return f'sqa generate {directory.name} --prompt "..."'
        return f"vllm serve {directory.name}"

    def save(self, folder: Path, source: Path, dtype: torch.dtype) -> None:
        interop.write_like(self.model.to(dtype), folder, source)


def packed_rows(documents: Iterator[list[int]], *, rows: int, length: int) -> Batch:
    """The next documents (token ids) packed into rows of `length` tokens. Raises InputError when there is less text."""
    needed = rows * length + 1
    found: list[list[int]] = []
    count = 0
    while count < needed:
        ids = next(documents, None)
        if ids is None:
            raise InputError(
                f"text: {rows} rows of {length} tokens take {needed:,} tokens, but only {count:,} are left in this "
                f"split; give more documents, or ask for fewer or shorter rows"
            )
        found.append(ids)
        count += len(ids)
    tokens = np.fromiter(chain.from_iterable(found), np.int64)
    numbers = np.repeat(np.arange(len(found)), [len(ids) for ids in found])
    return pack(tokens[:needed], numbers[:needed], length)
