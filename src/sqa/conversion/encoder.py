"""A BERT-type encoder as conversion sees it: its last hidden state takes the place of logits."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sqa.config import AttentionConfig
from sqa.conversion.moments import AttentionView
from sqa.interop import bert, native

NEIGHBOURS = 10  # of a passage, in the retrieval that is compared


@dataclass(frozen=True)
class Passages:
    """input_ids int64, and real (True where there is a token) bool, both (B, T)."""

    input_ids: Tensor
    real: Tensor


class Encoder:
    """What importance, surgery, healing and the verdict need of a model, for batches of padded passages."""

    default_speed_at = (128, 256, 512)

    def __init__(self, model: Any, source: Path) -> None:
        """A BertModel; `source` has the files that go with the weights."""
        self.dtype = model.dtype
        self.model, self.source = model.float().eval(), source

    @classmethod
    def load(cls, directory: Path) -> Encoder:
        """Read a BERT directory, or one that was converted before."""
        return cls(bert.load_bert(directory), directory)

    @classmethod
    def shape(cls, directory: Path) -> tuple[tuple[AttentionConfig, ...], int]:
        """The attention layers, and how many tokens the model can read."""
        config = bert.load_config(directory)
        return (bert.attention_config(config),) * config.num_hidden_layers, config.max_position_embeddings

    @classmethod
    def check(cls, directory: Path, attention: Sequence[AttentionConfig]) -> None:
        """Whatever fits the heads can be written."""

    @property
    def views(self) -> list[AttentionView]:
        """The attention layers."""
        config, layers = bert.attention_config(self.model.config), (each.attention for each in self.model.encoder.layer)
        return [AttentionView(config, x.self.query, x.self.key, x.self.value, x.output.dense) for x in layers]

    def batches(
        self, directory: Path, documents: Iterator[str], rows: int, length: int, batch_size: int
    ) -> list[Passages]:
        """The first `length` tokens of each of the next `rows` documents, as many to a batch."""
        tokenizer = native.read_tokenizer(directory, self.model.config.vocab_size)
        if tokenizer is None:
            raise ValueError(f"model: {directory} has no tokenizer.json, which the calibration text is encoded with")
        tokenizer.enable_truncation(length)
        tokenizer.enable_padding(pad_id=self.model.config.pad_token_id)
        texts = list(islice(documents, rows))
        if len(texts) < rows:
            raise ValueError(
                f"text: {rows} passages are asked for, but only {len(texts)} documents are left in this split; "
                f"give more documents, or ask for fewer passages"
            )
        batches = []
        for start in range(0, rows, batch_size):
            found = tokenizer.encode_batch(texts[start : start + batch_size])
            batches.append(
                Passages(torch.tensor([x.ids for x in found]), torch.tensor([x.attention_mask for x in found]).bool())
            )
        return batches

    def real(self, batch: Passages) -> Tensor | None:
        """Which positions are no padding."""
        return batch.real

    def run(self, batch: Passages) -> Tensor | None:
        """One forward pass; which positions are real."""
        self.hidden(batch)
        return self.real(batch)

    def layers(self, batch: Passages) -> Iterator[tuple[Tensor, Tensor]]:
        """What each layer's attention read and gave, both (B, T, d)."""
        read: dict[int, Tensor] = {}
        handles = [
            view.q.register_forward_pre_hook(lambda module, inputs, i=i: read.__setitem__(i, inputs[0]))
            for i, view in enumerate(self.views)
        ]
        try:
            self.hidden(batch)
        finally:
            for handle in handles:
                handle.remove()
        return ((read[i], self.attend(i, read[i], batch)) for i in range(len(read)))

    def attend(self, index: int, read: Tensor, batch: Passages) -> Tensor:
        """What the attention of one layer makes of its input."""
        attention = self.model.encoder.layer[index].attention
        given: Tensor = attention.output.dense(attention.self(read, attention_mask=batch.real[:, None, None])[0])
        return given

    def hidden(self, batch: Passages) -> Tensor:
        """The last hidden state, (B, T, d)."""
        state: Tensor = self.model(input_ids=batch.input_ids, attention_mask=batch.real.long()).last_hidden_state
        return state

    def loss(self, batch: Passages) -> Tensor:
        """Raises ValueError: an encoder predicts nothing by itself."""
        raise ValueError("convert: an encoder has no loss of its own; choose heads by another method, and no control")

    def distance(self, hidden: Tensor, teacher: Encoder, teacher_hidden: Tensor, batch: Passages) -> Tensor:
        """Squared error of the last hidden state as a share of its energy, over real positions."""
        target = teacher_hidden[batch.real].float()
        return (hidden[batch.real].float() - target).square().sum() / target.square().sum()

    @torch.no_grad()
    def outputs(self, batches: Sequence[Passages]) -> list[Tensor]:
        """Embeddings, (B, d) each: what `measure` compares."""
        return [bert.embed(self.model, batch.input_ids, batch.real) for batch in batches]

    @torch.no_grad()
    def measure(self, batches: Sequence[Passages], teacher: Encoder, reference: Sequence[Tensor]) -> dict[str, float]:
        """Cosine similarity of embeddings to the teacher's, and the share of each passage's neighbours that stay."""
        other = torch.cat(list(reference))
        own = other if teacher is self else torch.cat(self.outputs(batches))
        count = min(NEIGHBOURS, len(own) - 1)
        nearest = [
            (x @ x.T).fill_diagonal_(-torch.inf).topk(count).indices  # a passage is no neighbour of its own
            for x in (own, other)
        ]
        kept = (nearest[0][:, :, None] == nearest[1][:, None]).any(-1).float().mean()
        return {"cosine": float((own * other).sum(-1).mean()), "neighbours": float(kept)}

    def cost(self, n: int) -> dict[str, int]:
        """Parameters."""
        return {"parameters": sum(parameter.numel() for parameter in self.model.parameters())}

    def prefill(self, n: int) -> object:
        """What a passage of n tokens takes."""
        return self.hidden(self._row(n))

    def training_loss(self, n: int) -> Tensor:
        """Something to differentiate on one row of n tokens."""
        return self.hidden(self._row(n)).float().square().mean()

    def _row(self, n: int) -> Passages:
        ids = torch.arange(n)[None] % self.model.config.vocab_size
        return Passages(ids, torch.ones(1, n, dtype=torch.bool))

    def converted(self, attention: Sequence[AttentionConfig], weights: Sequence[dict[str, Tensor]]) -> Encoder:
        """A new model with these attention layers; `weights` by the names of AttentionView, all else is copied."""
        heads = attention[0]
        model = bert.with_heads(self.model, num_query_heads=heads.num_query_heads, num_kv_heads=heads.num_kv_heads)
        new = Encoder(model, self.source)
        new.dtype = self.dtype
        with torch.no_grad():
            for view, layer in zip(new.views, weights, strict=True):
                for name, tensor in layer.items():
                    projection, kind = name.split(".")
                    getattr(getattr(view, projection), kind).copy_(tensor)
        return new

    def keep(self, folder: Path) -> None:
        """Write the weights for `restored`, in fp32."""
        bert.save_bert(self.model, folder, self.source)

    def restored(self, folder: Path) -> Encoder:
        """Read what `keep` wrote."""
        kept = Encoder(bert.load_bert(folder), self.source)
        kept.dtype = self.dtype
        return kept

    def save(self, folder: Path, source: Path) -> None:
        """Write a directory that AutoModel reads with trust_remote_code, in the dtype of the source."""
        bert.save_bert(self.model.to(self.dtype), folder, source)
