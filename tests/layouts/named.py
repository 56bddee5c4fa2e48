"""Layouts that are proved equal to one process by name, beside the covering set of `matrix.py`.

The covering set has every pair of settings that up to 4 ranks can have. `NAMED` has what it cannot have (settings of
one model alone, more ranks, uneven stages, offload) and the layouts in which planted bugs show. `FURTHER` has
combinations of three and more in which bugs were found, or which have a term of their own in the formula of traffic.
"""

from __future__ import annotations

from megallama.verification.layouts import Layout, parse_layouts

QWEN3 = "model.qk_norm=true,model.head_dim=24"
BOTH = "model.qkv_bias=true,model.qk_norm=true"
YARN = "model.rope_scaling=yarn,model.rope_scaling_factor=4,model.rope_original_max_seq_len=16"


def _parse(topics: dict[str, list[str]]) -> dict[str, list[Layout]]:
    return {topic: parse_layouts(";".join(texts)) for topic, texts in topics.items()}


NAMED = _parse(
    {
        "planted bugs": [
            "cp=2",
            "cp=2,cp_kind=ring,zero=0",
            "cp=2,cp_kind=ulysses",
            "dp=2,zero=0",
            "pp=2,ties=true,zero=1",
            "pp=2,vp=2,zero=1",
            "pp=2,vp=2,zero=2,zero.offload=true,zero.accumulate_micro_batches=3",
            "pp=2,zero=2,recompute=full",
            "tp=2",
            "tp=2,model.qk_norm=true,model.qkv_bias=true",
            "tp=2,sp=true",
        ],
        "offload and seldom reduction": [
            "dp=2,zero=1,zero.offload=true",
            "dp=2,pp=2,ties=true,zero=2,zero.offload=true",
            "dp=2,pp=2,vp=2,zero=2,zero.offload=true",
            "tp=2,dp=2,pp=2,vp=2,ties=true,zero=1,zero.offload=true",
            "dp=2,pp=2,vp=2,ties=true,zero=2,zero.accumulate_micro_batches=3",
        ],
        "stages and recomputed layers": [
            "pp=3,layers_per_stage=[2,2,1],model.num_layers=5",
            "pp=2,layers_per_stage=[1,4],model.num_layers=5",
            "pp=2,vp=2,layers_per_stage=[1,2,2,1],model.num_layers=6",
            "pp=2,layers_per_stage=[3,1],model.num_layers=4,tp=2,sp=true,recompute=full,train.recompute_layers=2",
            "dp=2,pp=2,vp=2,zero=2,recompute=full,train.recompute_layers=1,model.num_layers=8",
            "pp=2,ties=true,zero=3,recompute=full",
        ],
        "heads and ranks": [
            "cp=4,cp_kind=ulysses,model.num_kv_heads=2",
            "tp=2,cp=2,cp_kind=ring,model.num_heads=4,model.num_kv_heads=1,model.qkv_bias=true",
            "tp=4,sp=true,model.num_heads=4,model.num_kv_heads=1,recompute=full",
            "cp=2,pp=4,zero=2",
            "cp=2,tp=2,pp=2,sp=true,zero=2",
            "cp=2,kernels.attention=reference",
        ],
        "families": [
            "model.qkv_bias=true,ties=true,tp=2,sp=true,zero=2",
            "model.qkv_bias=true,ties=true,pp=2",
            f"{QWEN3},tp=2,sp=true",
            f"{QWEN3},tp=2,recompute=full",
            f"{QWEN3},pp=2,zero=2",
            f"{BOTH},tp=4,model.num_kv_heads=2,sp=true",
            f"{BOTH},tp=2,dp=2,zero=3",
            f"{BOTH},{YARN},cp=2",
            f"{YARN},tp=2,pp=2",
        ],
    }
)
"""By what they are about; `make test` proves them."""

FURTHER = _parse(
    {
        "sharded states": [
            *(f"zero={zero},mbs=4" for zero in (0, 2, 3)),
            *(f"tp=2,sp=true,dp=2,zero={zero}" for zero in range(4)),
            *(f"tp=2,pp=2,zero={zero}" for zero in range(4)),
            *(f"pp=2,dp=2,zero={zero}" for zero in range(4)),
            *(f"cp=2,dp=2,zero={zero}" for zero in range(4)),
            *(f"cp=2,cp_kind=ring,dp=2,zero={zero}" for zero in (2, 3)),
            *(f"dp=2,zero={zero}" for zero in (1, 2, 3)),
            "zero=3,recompute=full",
            "dp=2,zero=2,recompute=full",
            "dp=2,zero=2,zero.offload=true",
            "pp=2,dp=2,zero=2,zero.offload=true",
            "pp=2,dp=2,zero=2,ties=true,zero.accumulate_micro_batches=2",
            "tp=2,sp=true,pp=2,dp=2,zero=2",
            "tp=2,sp=true,pp=2,dp=2,ties=true,zero=3",
            "tp=2,dp=2,zero=1",
            "tp=2,dp=2,zero=3",
        ],
        "pipelines": [
            "pp=2",
            "pp=4",
            "pp=4,vp=2,zero=2",
            "pp=2,vp=2",
            "pp=2,vp=2,dp=2,zero=2",
            "pp=2,vp=2,tp=2,sp=true",
            "pp=2,recompute=full",
            "train.recompute_layers=2,recompute=full,model.num_layers=4",
            "tp=2,recompute=full",
            "tp=2,sp=true,recompute=full,mbs=2",
            "tp=2,recompute=full,train.recompute_layers=1",
            "tp=2,sp=true,pp=2,zero=2",
        ],
        "tied embeddings": [
            *(f"pp=2,ties=true,zero={zero}" for zero in (0, 2)),
            *(f"dp=2,pp=2,ties=true,zero={zero}" for zero in range(3)),
            "pp=4,ties=true",
            "pp=2,vp=2,ties=true,zero=2",
            "tp=2,sp=true,pp=2,ties=true,zero=2",
            "dp=2,pp=2,vp=2,ties=true,zero=3",
        ],
        "context": [
            "cp=2,cp_kind=all_gather,recompute=selective,mbs=2",
            "cp=2,cp_kind=ring,recompute=full,mbs=2",
            "cp=2,cp_kind=ulysses,recompute=full,mbs=2",
            *(f"cp=4,cp_kind={kind}" for kind in ("all_gather", "ring", "ulysses")),
            *(f"cp=2,tp=2,sp=true,cp_kind={kind}" for kind in ("all_gather", "ring", "ulysses")),
            "cp=2,tp=2,model.num_kv_heads=1",
            *(f"cp=2,pp=2,cp_kind={kind}" for kind in ("all_gather", "ring", "ulysses")),
            "cp=2,pp=2,vp=2,cp_kind=ring,ties=true",
            "cp=2,pp=2,zero=3",
            "data.reset_positions=true",
            "cp=2,data.reset_positions=true,cp_kind=ring",
            "pp=4,data.reset_positions=true,mbs=2",
            "cp=2,dp=2,recompute=full,zero=2,data.reset_positions=true",
            "cp=2,cp_kind=ring,recompute=full,train.recompute_layers=1",
            "cp=2,cp_kind=ring,pp=2,recompute=selective,ties=true",
            "cp=2,cp_kind=ring,pp=2,vp=2,zero=2",
            "cp=2,cp_kind=ulysses,zero=3",
            "cp=4,cp_kind=ulysses,model.num_kv_heads=2,recompute=selective",
            "cp=2,cp_kind=ulysses,tp=2,sp=true,recompute=full",
            "cp=2,tp=2,pp=2,zero=2",
            "cp=2,pp=2,zero=2,model.qkv_bias=true,ties=true",
            "tp=2,cp=2,cp_kind=ulysses,model.num_heads=4,model.num_kv_heads=1,recompute=selective",
        ],
        "families": [
            "model.qkv_bias=true,ties=true,tp=2",
            f"{QWEN3},tp=2",
            "tp=4,model.num_kv_heads=2,sp=true",
            "tp=4,model.num_heads=4,model.num_kv_heads=2",
            "tp=2,model.qk_norm=true,model.qkv_bias=true,recompute=full,mbs=2",
            *(f"{BOTH},dp=2,zero={zero}" for zero in (1, 2, 3)),
        ],
    }
)
"""Those that `make test-long` proves."""
