"""Configuration of MoMa models (arXiv 2407.21770) for Hugging Face transformers 5.

Shipped next to the weights. A token's modality follows from its id alone, so `modalities` is part of the model.
"""

from typing import Any, ClassVar

from transformers.configuration_utils import PreTrainedConfig

NORMS = ("pre", "post", "post_per_expert")
CHOICES = ("sigmoid", "competitive", "softmax")
SCORES = ("sigmoid", "softmax")
UNTIED = ("attention", "ffn", "norms", "final_norm")
ROUTINGS = ("causal", "top1", "threshold")


class MomaConfig(PreTrainedConfig):
    """Shape of a mixed-modal decoder with modality-grouped experts, Mixture-of-Depths, or neither.

    Attributes:
        vocab_size: rows of the embedding; ids past the last modality are padding of the table and never occur.
        intermediate_size: SwiGLU width of the dense feed-forward layer, or of every expert.
        norm: placement of RMSNorm: before each sub-layer (`pre`), on its output (`post`), or on its output with every
            expert's output normalised by itself (`post_per_expert`).
        qk_norm: RMSNorm of each head's query and key.
        qkv_bias: biases of the query, key and value projections.
        untie: parts with weights of their own for each modality: of `attention`, `ffn`, `norms` (of layers), and
            `final_norm`.
        modalities: `[name, first id, one past the last id]` of each, in id order; ids beyond them are of the first.
        no_modality_id: the id that belongs to none, and that no expert takes; `pad_token_id` may become another.
        expert_groups: `{"name", "modalities": [indices], "experts": number}` of each group; empty: a dense layer. A
            group of one expert with `"ungated": true` has no router: every token of its modalities goes through it.
        choice: by what an expert ranked tokens in training: its logit (`sigmoid`), its logit minus the mean over the
            group's experts (`competitive`), or the logarithm of the softmax over them (`softmax`). Cut-offs are on that
            scale; the gate is the sigmoid of the logit under every choice.
        token_choice: `{"scores", "top_k"}` if each token goes to the `top_k` experts of its group with the highest
            scores, `sigmoid` or `softmax` of the logits, plus a bias; null: experts chose tokens in training, and
            `routing` decides. The gate is the score, divided by the sum over the token's experts if there are several.
        shared_intermediate_size: SwiGLU width of the shared experts together; 0: none.
        mod_layers: Mixture-of-Depths layers, from 0. (`layer_types` would refuse a name of its own.)
        auxiliary_size: inner width of the auxiliary routers; 0: there are none.
        keeps_thresholds: whether there are averaged cut-offs.
        routing: who decides which experts take a token: the auxiliary routers where their sigmoid is above a threshold
            (`causal`), the best of them (`top1`; depth layers as in `causal`), or what the router ranks tokens by
            against its averaged cut-off (`threshold`).
        head_dim: width of a head in an engine's cache (vLLM's), which has one width for keys and values of all layers.
        head_width: width of a head; 0: head_dim. Models with Mixture-of-Depths have a wider head_dim: their keys need
            one more channel for the flag of a skipped token, and engines have kernels for certain widths only.
        tokens_per_image: length of an image between `<boi>` and `<eoi>`; 0: not known.
        mmscale: settings of the training run, for the way back into one.
    """

    model_type = "moma"
    # Tensor parallelism of attention and dense layers; __post_init__ adds experts. All others are on every rank.
    base_model_tp_plan: ClassVar[dict[str, str]] = {
        **dict.fromkeys((f"layers.*.self_attn.{name}_proj" for name in "qkv"), "colwise"),
        "layers.*.self_attn.o_proj": "rowwise",
        "layers.*.mlp.gate_proj": "colwise",
        "layers.*.mlp.up_proj": "colwise",
        "layers.*.mlp.down_proj": "rowwise",
    }
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["past_key_values", "cache"]

    vocab_size: int = 65536
    hidden_size: int = 512
    intermediate_size: int = 1365
    num_hidden_layers: int = 8
    num_attention_heads: int = 8
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    head_width: int = 0
    max_position_embeddings: int = 4096
    rms_norm_eps: float = 1e-5
    norm: str = "pre"
    qk_norm: bool = True
    qkv_bias: bool = False
    untie: list | None = None
    rope_parameters: dict | None = None
    tie_word_embeddings: bool = False
    initializer_range: float = 0.02
    use_cache: bool = True
    modalities: list | None = None
    no_modality_id: int = 0
    expert_groups: list | None = None
    choice: str = "sigmoid"
    token_choice: dict | None = None
    shared_intermediate_size: int = 0
    mod_layers: list | None = None
    auxiliary_size: int = 0
    keeps_thresholds: bool = False
    routing: str = "causal"
    tokens_per_image: int = 0
    mmscale: dict | None = None
    pad_token_id: int | None = 0
    bos_token_id: int | None = 1
    eos_token_id: int | list[int] | None = 2
    boi_token_id: int | None = 3
    eoi_token_id: int | None = 4

    def __post_init__(self, **kwargs: Any) -> None:
        """Set values that follow from other settings."""
        if self.norm not in NORMS:
            raise ValueError(f"norm must be one of {', '.join(NORMS)}, not {self.norm!r}")
        if unknown := sorted({*(self.untie or [])} - {*UNTIED}):
            raise ValueError(f"untie must be of {', '.join(UNTIED)}, not {', '.join(unknown)}")
        if self.choice not in CHOICES:
            raise ValueError(f"choice must be one of {', '.join(CHOICES)}, not {self.choice!r}")
        if self.routing not in ROUTINGS:
            raise ValueError(f"routing must be one of {', '.join(ROUTINGS)}, not {self.routing!r}")
        if self.token_choice is not None and self.token_choice["scores"] not in SCORES:
            raise ValueError(f"token_choice: scores must be one of {', '.join(SCORES)}, not {self.token_choice!r}")
        if (self.expert_groups and self.token_choice is None) or self.mod_layers:
            lacking = not self.keeps_thresholds if self.routing == "threshold" else not self.auxiliary_size
            if lacking:
                raise ValueError(f"routing {self.routing!r} needs tensors that this model does not have")
        self.num_key_value_heads = self.num_key_value_heads or self.num_attention_heads
        self.head_dim = self.head_dim or self.hidden_size // self.num_attention_heads
        self.head_width = self.head_width or self.head_dim
        self.rope_parameters = self.rope_parameters or {"rope_type": "default", "rope_theta": 10000.0}
        self.modalities = self.modalities or [["text", 0, self.vocab_size]]
        self.untie = self.untie or []
        self.expert_groups = self.expert_groups or []
        self.mod_layers = self.mod_layers or []
        # transformers and vLLM read the plans from the instance.
        self.base_model_tp_plan = {**type(self).base_model_tp_plan, **self._experts_tp_plan()}  # type: ignore[misc]
        if not self.needs_modality:
            self.base_model_pp_plan = {
                "embed_tokens": (["input_ids"], ["inputs_embeds"]),
                "layers": (["hidden_states", "attention_mask"], ["hidden_states"]),
                "norm": (["hidden_states"], ["hidden_states"]),
            }
        super().__post_init__(**kwargs)

    @property
    def needs_modality(self) -> bool:
        """Whether a layer computes something else for another modality.

        vLLM gives later stages of a pipeline hidden states and no ids, from which no modality follows: only models that
        do not need it have a plan for pipelines.
        """
        every = set(range(len(self.modalities or [])))
        return bool(self.untie) or any(set(group["modalities"]) != every for group in self.expert_groups or [])

    def _experts_tp_plan(self) -> dict[str, str]:
        """Shards the inner width of every expert; partial results are summed behind their sum over experts.

        Normalised experts are on every rank, because a norm of a partial result is not a part of the norm.
        """
        if not self.expert_groups or self.norm == "post_per_expert":
            return {}
        places = [f"layers.*.mlp.experts.{group['name']}" for group in self.expert_groups]
        if self.shared_intermediate_size:
            places.append("layers.*.mlp.shared")
        # Weights are [..., in, out]: 'rowwise' shards the last dimension, gate and up alike, 'colwise' the one before.
        styles = ((".gate_up_proj", "packed_rowwise"), (".down_proj", "colwise"), ("", "moe_tp_experts"))
        return {place + name: style for place in places for name, style in styles}


__all__ = ["MomaConfig"]
