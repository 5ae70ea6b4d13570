"""Slow references of the model in plain loops, and the tiny configurations and batches that tests run them on.

Shares nothing with mmscale.model but parameter names and the configuration. One document, head, query, token and
expert at a time; in fp64 if the weights are, so that what a comparison shows is the model's own rounding.

Shapes: B sequences, S tokens of a sequence, n tokens of a sequence that a layer sees, H hidden width, D width of a
head.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mmscale.config import (
    Config,
    DepthConfig,
    ExpertsConfig,
    ModalityVocab,
    ModelConfig,
    ParallelConfig,
    PrecisionConfig,
    VocabConfig,
)
from tests.unit.model.reference_parts import (
    capacity_of,
    choose,
    choose_depth,
    depth_numbers,
    rank,
    rms_norm,
    rotate,
    swiglu,
    token_room,
)

PAD = 0
TEXT_IDS, IMAGE_IDS = 20, 11
SHARE = {"text": 0.5, "image": 0.5}
Weights = Mapping[str, Tensor]


# --- tiny configurations and batches ---------------------------------------------------------------------------------


def tiny(
    kind: str = "moma",
    *,
    experts: ExpertsConfig | None = None,
    dtype: str = "fp32",
    recompute: str = "none",
    more: tuple[ModalityVocab, ...] = (),
    **model: object,
) -> Config:
    """A model of two layers and width 16 over 20 text and 11 image ids.

    Args:
        kind: of the feed-forward slots.
        experts: by default four in one group, or three text experts and one image expert.
        dtype: of parameters and activations.
        recompute: of activations.
        more: further modalities.
        model: further settings of ModelConfig.
    """
    if experts is None:
        experts = {
            "dense": ExpertsConfig(),
            "moe": ExpertsConfig(counts={"mixed": 4}, share=SHARE),
            "moma": ExpertsConfig(counts={"text": 3, "image": 1}, share=SHARE),
        }[kind]
    settings: dict[str, object] = {
        "kind": kind,
        "num_layers": 2,
        "hidden_size": 16,
        "ffn_hidden_size": 24,
        "num_attention_heads": 4,
        "seq_length": 12,
        "experts": experts,
    }
    modalities = (ModalityVocab(name="text", size=TEXT_IDS), ModalityVocab(name="image", size=IMAGE_IDS))
    return Config(
        vocab=VocabConfig(modalities=modalities + more, pad_multiple=8),
        model=ModelConfig.model_validate(settings | model),
        parallel=ParallelConfig.model_validate({"recompute": recompute}),
        precision=PrecisionConfig.model_validate({"dtype": dtype}),
    )


def moma_experts(**settings: object) -> ExpertsConfig:
    """Three text experts and one image expert; `settings` overrides."""
    return ExpertsConfig.model_validate({"counts": {"text": 3, "image": 1}, "share": SHARE} | settings)


def depth(choice: str = "mixed", **settings: object) -> DepthConfig:
    """Half of the tokens in every second layer."""
    return DepthConfig.model_validate({"every": 2, "capacity": 0.5, "multiple": 2, "choice": choice} | settings)


@dataclass(frozen=True)
class Batch:
    """A micro-batch as the loader has it: four [B, S] tensors."""

    ids: Tensor
    modality: Tensor
    position: Tensor
    document: Tensor

    def rows(self, *indices: int) -> Batch:
        """Some of its sequences."""
        own = list(indices)
        return Batch(self.ids[own], self.modality[own], self.position[own], self.document[own])


def batch_of(sequences: Sequence[Sequence[Sequence[int]]], *, length: int) -> Batch:
    """Pack documents (lists of ids) into sequences, padded with id 0; padding is a document of its own, -1."""
    facts: list[list[list[int]]] = [[], [], [], []]
    for documents in sequences:
        ids = [token for tokens in documents for token in tokens]
        position = [place for tokens in documents for place in range(len(tokens))]
        document = [number for number, tokens in enumerate(documents) for _ in tokens]
        padding = length - len(ids)
        assert padding >= 0, "documents do not fit"
        ids += [PAD] * padding
        position += list(range(padding))
        document += [-1] * padding
        modality = [-1 if token == PAD else int(token >= TEXT_IDS) for token in ids]
        for column, values in zip(facts, (ids, modality, position, document), strict=True):
            column.append(values)
    ids_BS, modality_BS, position_BS, document_BS = (torch.tensor(column) for column in facts)
    return Batch(ids_BS, modality_BS.to(torch.int8), position_BS, document_BS.to(torch.int32))


def random_documents(lengths: Iterable[int], *, seed: int, image: float = 0.5) -> list[list[int]]:
    """Documents of these lengths, a share `image` of their tokens being image tokens."""
    generator = torch.Generator().manual_seed(seed)
    documents = []
    for length in lengths:
        text = torch.randint(1, TEXT_IDS, (length,), generator=generator)
        picture = torch.randint(TEXT_IDS, TEXT_IDS + IMAGE_IDS, (length,), generator=generator)
        documents.append(torch.where(torch.rand(length, generator=generator) < image, picture, text).tolist())
    return documents


def usual_batch() -> Batch:
    """Two sequences of 12: documents of 5, 1 and 6 tokens; of 4 and 5 tokens with 3 of padding."""
    return batch_of([random_documents((5, 1, 6), seed=1), random_documents((4, 5), seed=2)], length=12)


# --- layers ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Facts:
    """Modality, position and document of the tokens of one sequence that a layer sees."""

    modality: list[int]
    position: list[int]
    document: list[int]

    def take(self, rows: Sequence[int]) -> Facts:
        """The same of some of its tokens."""
        return Facts(*([column[row] for row in rows] for column in (self.modality, self.position, self.document)))


class Reference:
    """The whole model.

    Args:
        config: what the built model was built from.
        weights: its parameters by name.
    """

    def __init__(self, config: Config, weights: Weights) -> None:
        self.config, self.model, self.weights = config, config.model, weights

    def logits(self, batch: Batch) -> Tensor:
        """[B, S, padded vocabulary]."""
        facts = [
            Facts(self._modality(ids), self._position(documents), documents)
            for ids, documents in zip(batch.ids.tolist(), batch.document.tolist(), strict=True)
        ]
        hidden = [self.weights["embedding.word_embeddings.weight"][row] for row in batch.ids]
        for number in range(self.model.num_layers):
            hidden = self.layer(number, hidden, facts)
        head = self.weights["embedding.word_embeddings.weight" if self.model.tie_embeddings else "output_layer.weight"]
        norm = "decoder.final_layernorm.weight"
        return torch.stack([self._norm(x, norm, f.modality) @ head.t() for x, f in zip(hidden, facts, strict=True)])

    def layer(self, number: int, hidden: list[Tensor], facts: list[Facts]) -> list[Tensor]:
        """Layer `number` from 0, of either kind; one [n, H] tensor for every sequence."""
        if self.model.depth is None or number % self.model.depth.every != 0:
            return self.inner_layer(number, hidden, facts)
        router = self.weights[f"decoder.layers.{number}.depth_router"]
        keep, quotas = depth_numbers(self.config)
        scores = [torch.sigmoid(x @ router) for x in hidden]
        rows = [choose_depth(s.tolist(), f.modality, keep, quotas) for s, f in zip(scores, facts, strict=True)]
        taken = [x[r] for x, r in zip(hidden, rows, strict=True)]
        processed = self.inner_layer(number, taken, [f.take(r) for f, r in zip(facts, rows, strict=True)])
        result = []
        for x, score, row, out in zip(hidden, scores, rows, processed, strict=True):
            tokens = list(x)
            for place, token in enumerate(row):
                tokens[token] = x[token] + score[token] * (out[place] - x[token])
            result.append(torch.stack(tokens))
        return result

    def inner_layer(self, number: int, hidden: list[Tensor], facts: list[Facts]) -> list[Tensor]:
        """Attention and feed-forward with their norms and residual connections."""
        prefix, pre = f"decoder.layers.{number}.", self.model.norm == "pre"

        def normalized(tokens: list[Tensor], name: str) -> list[Tensor]:
            return [self._norm(x, prefix + name, f.modality) for x, f in zip(tokens, facts, strict=True)]

        into = normalized(hidden, "input_layernorm.weight") if pre else hidden
        out = [self.attention(prefix, x, f) for x, f in zip(into, facts, strict=True)]
        if not pre:
            out = normalized(out, "self_attn_bda.norm.weight")
        hidden = [x + y for x, y in zip(hidden, out, strict=True)]

        into = normalized(hidden, "pre_mlp_layernorm.weight") if pre else hidden
        if dense := self.model.kind == "dense":
            out = [self.dense(prefix, x, f) for x, f in zip(into, facts, strict=True)]
        else:
            out = self.moma(prefix, into, facts)
        if self.model.norm == "post" or (self.model.norm == "post_per_expert" and dense):
            out = normalized(out, "mlp_bda.norm.weight")
        return [x + y for x, y in zip(hidden, out, strict=True)]

    def attention(self, prefix: str, x: Tensor, facts: Facts) -> Tensor:
        """Causal attention of each document by itself, [n, H] -> [n, H]."""
        prefix += "self_attention."
        heads, groups, width = self.model.num_attention_heads, self.model.query_groups, self.model.head_dim
        per_group = heads // groups
        # linear_qkv holds, for each key/value head, its query heads, then the key head, then the value head.
        fused = self._projected(x, f"{prefix}linear_qkv.weight", facts)
        blocks = (fused + self.weights.get(f"{prefix}linear_qkv.bias", 0.0)).split(width, dim=1)  # each [n, D]
        query = [blocks[h // per_group * (per_group + 2) + h % per_group] for h in range(heads)]
        key = [blocks[g * (per_group + 2) + per_group] for g in range(groups)]
        value = [blocks[g * (per_group + 2) + per_group + 1] for g in range(groups)]
        outputs: list[list[Tensor]] = [[] for _ in facts.document]
        for head in range(heads):
            group = head // per_group
            for document in sorted(set(facts.document)):
                rows = [row for row, own in enumerate(facts.document) if own == document]
                q, k, v = query[head][rows], key[group][rows], value[group][rows]
                if self.model.qk_norm:
                    own = [facts.modality[row] for row in rows]
                    q = self._norm(q, f"{prefix}q_layernorm.weight", own)
                    k = self._norm(k, f"{prefix}k_layernorm.weight", own)
                q = torch.stack([rotate(t, facts.position[r], self.model) for t, r in zip(q, rows, strict=True)])
                k = torch.stack([rotate(t, facts.position[r], self.model) for t, r in zip(k, rows, strict=True)])
                for place, row in enumerate(rows):
                    scores = (k[: place + 1] @ q[place]) / math.sqrt(width)
                    outputs[row].append(torch.softmax(scores, dim=0) @ v[: place + 1])
        joined = torch.stack([torch.cat(parts) for parts in outputs])
        return self._projected(joined, f"{prefix}linear_proj.weight", facts)

    def dense(self, prefix: str, x: Tensor, facts: Facts) -> Tensor:
        """The SwiGLU of a dense layer, token by token."""
        rows = []
        for token, modality in zip(x, facts.modality, strict=True):
            gate, up = self._own(f"{prefix}mlp.linear_fc1.weight", modality).chunk(2)
            rows.append(swiglu(token, gate.t(), up.t(), self._own(f"{prefix}mlp.linear_fc2.weight", modality).t()))
        return torch.stack(rows)

    def _own(self, name: str, modality: int) -> Tensor:
        """The weight that a token uses: its modality's where there is one, the last modality's for padding (-1)."""
        untied = f"{name.removesuffix('.weight')}.{self.config.vocab.names[modality]}"
        return self.weights[untied if untied in self.weights else name]

    def _projected(self, x: Tensor, name: str, facts: Facts) -> Tensor:
        """Each token times the weight that it uses, [n, in] -> [n, out]."""
        return torch.stack([self._own(name, m) @ token for token, m in zip(x, facts.modality, strict=True)])

    def expert(self, prefix: str, group: str, number: int, x: Tensor) -> Tensor:
        """One expert of one token, normalised where the placement says so."""
        kind = "ungated" if group in self.model.experts.ungated else "experts"
        w1, w2 = self.weights[f"{prefix}mlp.{kind}.{group}.w1"], self.weights[f"{prefix}mlp.{kind}.{group}.w2"]
        out = swiglu(x, w1[number, :, 0], w1[number, :, 1], w2[number])
        return (
            self._norm(out, f"{prefix}mlp.expert_norm.{group}.weight") if self.model.norm == "post_per_expert" else out
        )

    def gates(
        self, prefix: str, group: str, hidden: list[Tensor], facts: list[Facts]
    ) -> dict[tuple[int, int, int], Tensor]:
        """Gate of every choice (expert, sequence, token) of a group."""
        if group in self.model.experts.ungated:
            own = self.config.vocab.names.index(group)
            places = [(b, i) for b, one in enumerate(facts) for i, m in enumerate(one.modality) if m == own]
            return {(0, b, i): torch.ones(()) for b, i in places}
        router = self.weights[f"{prefix}mlp.router.{group}"]
        logits = [x @ router.t() for x in hidden]
        scores = [torch.sigmoid(x) for x in logits]
        token_choice = self.model.experts.token_choice
        wanted = set(range(len(self.config.vocab.names)))
        if self.model.kind == "moma":
            wanted = {self.config.vocab.names.index(group)}
        length, batch = len(facts[0].modality), len(facts)
        scopes = [[(b, i) for i in range(length)] for b in range(batch)]
        if self.model.experts.scope == "micro_batch":
            scopes = [[(b, i) for i in range(length) for b in range(batch)]]
        chosen = {}
        for scope in scopes:
            if token_choice is not None:
                members = [(b, i) for b, i in scope if facts[b].modality[i] in wanted]
                bias = self.weights[f"{prefix}mlp.router_bias.{group}"].tolist()
                room = token_room(self.config, len(scope), group)
                chosen |= self.token_choices({place: logits[place[0]][place[1]] for place in members}, bias, room)
                continue
            values = [scores[b][i].tolist() for b, i in scope]
            member = [facts[b].modality[i] in wanted for b, i in scope]
            ranked = [rank(logits[b][i].tolist(), self.model.experts.choice) for b, i in scope]
            for expert, token in choose(
                values, member, capacity_of(self.config, len(scope), group, own=sum(member)), ranked=ranked
            ):
                b, i = scope[token]
                chosen[expert, b, i] = scores[b][i][expert]
        return chosen

    def token_choices(
        self, logits: Mapping[tuple[int, int], Tensor], bias: Sequence[float], room: int
    ) -> dict[tuple[int, int, int], Tensor]:
        """Gate of every choice (expert, sequence, token) among the tokens of a scope, one token after the other."""
        settings = self.model.experts.token_choice
        assert settings is not None
        found, loads = {}, [0] * len(bias)
        for (b, i), own in logits.items():
            scores = torch.sigmoid(own) if settings.scores == "sigmoid" else own.exp() / own.exp().sum()
            ranked = [float(score.detach()) + extra for score, extra in zip(scores, bias, strict=True)]
            order = sorted(range(len(bias)), key=lambda e, r=ranked: -r[e])  # type: ignore[misc]
            best = order[: settings.top_k]
            total = sum(scores[e] for e in best) if settings.top_k > 1 else 1.0
            for expert in best:
                loads[expert] += 1
                if loads[expert] <= room:
                    found[expert, b, i] = scores[expert] / total
        return found

    def moma(self, prefix: str, hidden: list[Tensor], facts: list[Facts]) -> list[Tensor]:
        """Sum of gate * expert at each token, plus the shared experts."""
        rows = [[torch.zeros_like(token) for token in x] for x in hidden]
        for group in self.model.experts.counts:
            for (expert, b, i), gate in self.gates(prefix, group, hidden, facts).items():
                rows[b][i] = rows[b][i] + gate * self.expert(prefix, group, expert, hidden[b][i])
        total = [torch.stack(row) for row in rows]
        return [y + self.shared(prefix, x) for x, y in zip(hidden, total, strict=True)]

    def shared(self, prefix: str, x: Tensor) -> Tensor:
        """Sum of the shared experts of every token."""
        experts = self.model.experts
        if not experts.shared:
            return torch.zeros_like(x)
        w1, w2 = self.weights[f"{prefix}mlp.shared.w1"][0], self.weights[f"{prefix}mlp.shared.w2"][0]
        width = experts.shared_ffn_hidden_size or self.model.ffn_hidden_size
        out = torch.zeros_like(x)
        for number in range(experts.shared):
            own = slice(number * width, (number + 1) * width)
            out = out + swiglu(x, w1[:, 0, own], w1[:, 1, own], w2[own])
        return self._norm(out, f"{prefix}mlp.shared_norm.weight") if self.model.norm == "post_per_expert" else out

    def _norm(self, x: Tensor, name: str, modality: Sequence[int] | None = None) -> Tensor:
        """RMSNorm of rows [n, ...]; with the modality of each row, by the weight that such a token uses."""
        if modality is None:
            return rms_norm(x, self.weights[name], self.model.norm_eps)
        weights = [self._own(name, one) for one in modality]
        rows = [rms_norm(row, weight, self.model.norm_eps) for row, weight in zip(x, weights, strict=True)]
        return torch.stack(rows)

    def _modality(self, ids: Sequence[int]) -> list[int]:
        ranges = self.config.vocab.ranges
        return [-1 if i == PAD else next(m for m, (low, high) in enumerate(ranges) if low <= i < high) for i in ids]

    @staticmethod
    def _position(documents: Sequence[int]) -> list[int]:
        """Position of each token within its document."""
        return [sum(earlier == own for earlier in documents[:place]) for place, own in enumerate(documents)]
