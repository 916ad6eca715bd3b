"""Attention that reads or keeps less: exact tiling, windows, chosen pairs, features, fewer heads.

`flash_attention` computes the exact result tile by tile; `transformer_xl` carries states from
segment to segment; `longformer`, `etc` and `bigbird` see a window and a few global tokens, and
`sliding_window` gives a trained model one; `sparsefinder` predicts which pairs entmax attention
(`entmax`) will use; `grouped_query` lets heads share keys and values; `kv_cache` counts what
decoding keeps, and `streaming_llm` forgets most of it. Beside them: `reformer` (with `reversible`),
`linformer`, `performer` and `linear_attention`.
"""

from effnb.design.attention.bigbird import bigbird_attention, bigbird_pattern, random_blocks
from effnb.design.attention.entmax import entmax, entmax15, entmax_attention, sparsemax
from effnb.design.attention.etc import EtcAttention, etc_pairs
from effnb.design.attention.flash_attention import (
    FlashStep,
    MemoryAccesses,
    SoftmaxState,
    flash_attention,
    flash_forward,
    flash_trace,
    memory_accesses,
    online_softmax,
)
from effnb.design.attention.grouped_query import grouped_query, pool_heads
from effnb.design.attention.kv_cache import CacheShape, decode_logits, kv_bytes, stored_cache_bytes
from effnb.design.attention.linear_attention import (
    LinearState,
    elu_features,
    empty_state,
    feature_attention,
    linear_attention,
    linear_attention_step,
)
from effnb.design.attention.linformer import (
    LinformerAttention,
    cumulative_energy,
    linformer_attention,
)
from effnb.design.attention.longformer import LongformerAttention, dilated_attention
from effnb.design.attention.neighbours import Neighbours, bucket_neighbours, neighbour_attention
from effnb.design.attention.patterns import (
    chosen_tokens,
    count_pairs,
    etc_pattern,
    hops,
    receptive_field,
    share_of_dense,
    window_pattern,
)
from effnb.design.attention.performer import (
    default_features,
    gaussian_features,
    kernel_mse,
    performer_attention,
    softmax_features,
)
from effnb.design.attention.reformer import (
    full_shared_attention,
    lsh_attention,
    lsh_buckets,
    top_key_recall,
)
from effnb.design.attention.reversible import ReversibleBlock, ReversibleStack, chunked
from effnb.design.attention.sliding_window import sliding_window, sliding_window_attention
from effnb.design.attention.sparsefinder import (
    GraphQuality,
    Projections,
    add_window,
    bucket_graph,
    cluster_buckets,
    distance_graph,
    fit_projections,
    graph_quality,
    kmeans,
    quantization_buckets,
    sample_triplets,
    triplet_loss,
)
from effnb.design.attention.streaming_llm import (
    StreamingCache,
    StreamingLayer,
    rotary_frequencies,
    rotate_keys,
    streaming_llm,
)
from effnb.design.attention.transformer_xl import (
    RelativeAttention,
    TransformerXL,
    XlLayer,
    XlOutput,
    read_in_segments,
    rel_shift,
    relative_table,
)

__all__ = [
    "CacheShape",
    "EtcAttention",
    "FlashStep",
    "GraphQuality",
    "LinearState",
    "LinformerAttention",
    "LongformerAttention",
    "MemoryAccesses",
    "Neighbours",
    "Projections",
    "RelativeAttention",
    "ReversibleBlock",
    "ReversibleStack",
    "SoftmaxState",
    "StreamingCache",
    "StreamingLayer",
    "TransformerXL",
    "XlLayer",
    "XlOutput",
    "add_window",
    "bigbird_attention",
    "bigbird_pattern",
    "bucket_graph",
    "bucket_neighbours",
    "chosen_tokens",
    "chunked",
    "cluster_buckets",
    "count_pairs",
    "cumulative_energy",
    "decode_logits",
    "default_features",
    "dilated_attention",
    "distance_graph",
    "elu_features",
    "empty_state",
    "entmax",
    "entmax15",
    "entmax_attention",
    "etc_pairs",
    "etc_pattern",
    "feature_attention",
    "fit_projections",
    "flash_attention",
    "flash_forward",
    "flash_trace",
    "full_shared_attention",
    "gaussian_features",
    "graph_quality",
    "grouped_query",
    "hops",
    "kernel_mse",
    "kmeans",
    "kv_bytes",
    "linear_attention",
    "linear_attention_step",
    "linformer_attention",
    "lsh_attention",
    "lsh_buckets",
    "memory_accesses",
    "neighbour_attention",
    "online_softmax",
    "performer_attention",
    "pool_heads",
    "quantization_buckets",
    "random_blocks",
    "read_in_segments",
    "receptive_field",
    "rel_shift",
    "relative_table",
    "rotary_frequencies",
    "rotate_keys",
    "sample_triplets",
    "share_of_dense",
    "sliding_window",
    "sliding_window_attention",
    "softmax_features",
    "sparsemax",
    "stored_cache_bytes",
    "streaming_llm",
    "top_key_recall",
    "triplet_loss",
    "window_pattern",
]
