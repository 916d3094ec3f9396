"""A causal language model as conversion sees it: our Transformer, which reads Llama, Mistral, Qwen2 and Qwen3."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from sqa import interop
from sqa.config import AttentionConfig
from sqa.conversion.moments import AttentionView
from sqa.conversion.text import packed_batches
from sqa.cost import parameters, prefill_flops, train_step_flops
from sqa.data.batches import Batch
from sqa.interop import native
from sqa.losses import IGNORE, linear_distillation, token_losses
from sqa.model import Block, Transformer


class Decoder:
    """What importance, surgery, healing and the verdict need of a model, for batches of packed rows."""

    default_speed_at = (512, 2048)

    def __init__(self, model: Transformer, dtype: torch.dtype = torch.float32) -> None:
        """`dtype` is what the weights are written in; here they are fp32."""
        self.model, self.dtype = model, dtype

    @classmethod
    def load(cls, directory: Path) -> Decoder:
        """Read a model directory of any kind that Transformer.load reads."""
        model = interop.load_model(directory)
        return cls(model.float().eval(), model.lm_head.weight.dtype)

    @classmethod
    def shape(cls, directory: Path) -> tuple[tuple[AttentionConfig, ...], int]:
        """The attention layers, and how many tokens the model can read."""
        config = interop.load_config(directory)
        return config.layers, config.max_seq_len

    @classmethod
    def check(cls, directory: Path, attention: Sequence[AttentionConfig]) -> None:
        """Raise ValueError when the result could not be written as `directory` is."""
        interop.check_like(interop.load_config(directory).replace(attention=tuple(attention)), directory)

    @property
    def blocks(self) -> list[Block]:
        return list(self.model.model.layers)  # type: ignore[arg-type]

    @property
    def views(self) -> list[AttentionView]:
        """The attention layers."""
        layers = [block.self_attn for block in self.blocks]
        return [AttentionView(layer.config, layer.q_proj, layer.k_proj, layer.v_proj, layer.o_proj) for layer in layers]

    def batches(
        self, directory: Path, documents: Iterator[str], rows: int, length: int, batch_size: int
    ) -> list[Batch]:
        """The next `rows` rows of `length` tokens of the text, by the tokenizer in `directory`."""
        tokenizer = native.read_tokenizer(directory, self.model.config.vocab_size)
        if tokenizer is None:
            raise ValueError(f"model: {directory} has no tokenizer.json, which the calibration text is encoded with")

        def encode(texts: Sequence[str]) -> list[list[int]]:
            return [encoding.ids for encoding in tokenizer.encode_batch_fast(list(texts))]

        end_id = interop.end_token(directory, tokenizer)
        return packed_batches(documents, encode, end_id, rows=rows, length=length, batch_size=batch_size)

    def real(self, batch: Batch) -> Tensor | None:
        """Which positions are no padding: all (None)."""
        return None

    def run(self, batch: Batch) -> Tensor | None:
        """One forward pass; which positions are real."""
        self.hidden(batch)
        return self.real(batch)

    def layers(self, batch: Batch) -> Iterator[tuple[Tensor, Tensor]]:
        """Runs the layers one by one: what each one's attention read and gave, both (B, T, d)."""
        hidden = self.model.model.embed_tokens(batch.input_ids)
        for block in self.blocks:
            read = block.input_layernorm(hidden)
            given = block.self_attn(read, document_ids=batch.document_ids)
            yield read, given
            hidden = hidden + given
            hidden = hidden + block.mlp(block.post_attention_layernorm(hidden))

    def attend(self, index: int, read: Tensor, batch: Batch) -> Tensor:
        """What the attention of one layer makes of its input."""
        given: Tensor = self.blocks[index].self_attn(read, document_ids=batch.document_ids)
        return given

    def hidden(self, batch: Batch) -> Tensor:
        """What the output head reads, (B, T, d)."""
        return self.model.hidden_states(batch.input_ids, document_ids=batch.document_ids)

    def loss(self, batch: Batch) -> Tensor:
        """Mean nll a real token."""
        loss = self.model(batch.input_ids, batch.labels, document_ids=batch.document_ids).loss
        assert loss is not None
        return loss

    def distance(self, hidden: Tensor, teacher: Decoder, teacher_hidden: Tensor, batch: Batch) -> Tensor:
        """KL(teacher || this model), mean over tokens."""
        head, other = self.model.lm_head, teacher.model.lm_head
        total = linear_distillation(hidden, head.weight, head.bias, (teacher_hidden, other.weight, other.bias))
        return total / batch.input_ids.numel()

    @torch.no_grad()
    def outputs(self, batches: Sequence[Batch]) -> list[Tensor]:
        """What `measure` compares with, when this model is the teacher."""
        return [self.hidden(batch) for batch in batches]

    @torch.no_grad()
    def measure(self, batches: Sequence[Batch], teacher: Decoder, reference: Sequence[Tensor]) -> dict[str, float]:
        """Loss (nats a real token), its perplexity, and KL to the teacher, whose `outputs` are `reference`, a token."""
        nll = divergence = 0.0
        tokens = positions = 0
        for batch, target in zip(batches, reference, strict=True):
            hidden = target if teacher is self else self.hidden(batch)
            losses, _ = token_losses(hidden, self.model.lm_head.weight, self.model.lm_head.bias, batch.labels)
            nll += float(losses.double().sum())
            tokens += int((batch.labels != IGNORE).sum())
            if teacher is not self:
                divergence += float(self.distance(hidden, teacher, target, batch)) * batch.input_ids.numel()
            positions += batch.input_ids.numel()
        loss = nll / tokens
        return {"loss": loss, "perplexity": math.exp(min(loss, 700.0)), "kl": divergence / positions}

    def cost(self, n: int) -> dict[str, int]:
        """Parameters, and FLOPs of one sequence of n tokens."""
        config = self.model.config
        return {
            "parameters": parameters(config),
            "prefill_flops": prefill_flops(config, n),
            "train_step_flops": train_step_flops(config, n),
        }

    def converted(self, attention: Sequence[AttentionConfig], weights: Sequence[dict[str, Tensor]]) -> Decoder:
        """A new model with these attention layers; `weights` by the names of AttentionView, all else is copied."""
        config = self.model.config.replace(attention=attention[0] if len(set(attention)) == 1 else tuple(attention))
        tensors: dict[str, Tensor] = self.model.state_dict()
        for i, layer in enumerate(weights):
            for name, tensor in layer.items():
                key = f"model.layers.{i}.self_attn.{name[0]}_proj{name[1:]}"
                tensors[key] = tensor.to(tensors[key].dtype)
        return Decoder(native.build(config, tensors, "the converted model").eval(), self.dtype)

    def prefill(self, n: int) -> object:
        """What a prompt of n tokens takes: logits of the last position."""
        return self.model(self._row(n).input_ids, num_logits=1)

    def training_loss(self, n: int) -> Tensor:
        """The loss of one row of n tokens, to be timed with its gradients."""
        return self.loss(self._row(n))

    def _row(self, n: int) -> Batch:
        ids = torch.arange(n)[None] % self.model.config.vocab_size
        return Batch(input_ids=ids, labels=ids, labels_all_positions=None, document_ids=None)

    def keep(self, folder: Path) -> None:
        """Write the weights for `restored`, in fp32."""
        self.model.save(folder)

    def restored(self, folder: Path) -> Decoder:
        """Read what `keep` wrote."""
        return Decoder(Decoder.load(folder).model, self.dtype)

    def save(self, folder: Path, source: Path) -> None:
        """Write the kind of directory that `source` is, in its dtype."""
        interop.write_like(self.model.to(self.dtype), folder, source)
