"""The modules that replace megatron-core's defaults in the layer spec.

Shapes: S positions, B micro-batch, N local query heads, K local key/value heads, D head width, H hidden width.
megatron-core is sequence-first.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.tensor_parallel.mappings import copy_to_tensor_model_parallel_region
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig

from megallama.kernels.attention.core import Attention
from megallama.kernels.attention.transformer_engine import TransformerEngineAttention
from megallama.kernels.norm import NormFunction
from megallama.kernels.swiglu import swiglu
from megallama.model.packing import DocumentPacking


class RmsNorm(torch.nn.Module):
    """RMSNorm over the hidden width.

    Under sequence parallel each tensor rank normalises its own positions, so the gradient of the weight is a
    partial sum; the weight passes through an operator that is the identity forward and an all-reduce over tp
    backward. Inside autograd this holds for every ZeRO stage; megatron-core's fix-up at the end of the step
    needs `main_grad`, which DeepSpeed does not keep.
    """

    kernel: NormFunction

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: Any) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))
        self.eps = eps
        self.is_partial = config.sequence_parallel and config.tensor_model_parallel_size > 1

    def forward(self, x_SBH: torch.Tensor) -> torch.Tensor:
        """Normalised input, same shape."""
        weight = copy_to_tensor_model_parallel_region(self.weight) if self.is_partial else self.weight
        return self.kernel(x_SBH, weight, self.eps)


class HeadNorm(RmsNorm):
    """RMSNorm over the width of each query or key head.

    A tensor rank normalises its own heads only, so under any tensor parallelism the weight's gradient is a partial
    sum. (Keys that several ranks share are normalised by each for its own queries: partial as well.)
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: Any) -> None:
        super().__init__(config, hidden_size, eps)
        self.is_partial = config.tensor_model_parallel_size > 1


class CoreAttention(torch.nn.Module):
    """Causal core attention inside documents, with megatron-core's signature, on `kernels.attention`."""

    kernel: Attention | TransformerEngineAttention

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        *_: Any,
        pg_collection: ProcessGroupCollection,
        **__: Any,
    ) -> None:
        super().__init__()
        assert config.softmax_scale is not None
        self.cp_group = pg_collection.cp
        self.scale = config.softmax_scale

    def forward(
        self,
        query_SBND: torch.Tensor,
        key_SBKD: torch.Tensor,
        value_SBKD: torch.Tensor,
        attention_mask: None,
        *,
        packed_seq_params: DocumentPacking | None = None,
        **_: Any,
    ) -> torch.Tensor:
        """Attention output, [S, B, N x D]."""
        assert attention_mask is None, "the causal mask is implied"
        out_SBND = self.kernel(
            *(query_SBND, key_SBKD, value_SBKD),
            scale=self.scale,
            documents=packed_seq_params.document_starts if packed_seq_params is not None else None,
            group=self.cp_group,
        )
        return out_SBND.flatten(2)


class SwigluMlp(MLP):
    """megatron-core's MLP with our SwiGLU; its own adds a constant offset to `up` in a pass of its own."""

    def __init__(self, config: TransformerConfig, **_: Any) -> None:
        parts = MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear)
        super().__init__(config, parts, ffn_hidden_size=config.ffn_hidden_size)

    def forward(
        self, hidden_states: torch.Tensor, per_token_scale: None = None, **_: Any
    ) -> tuple[torch.Tensor, None]:
        """[S, B, H] to [S, B, H]; the second value is megatron-core's bias, which LLaMA has not."""
        gate_up, _bias = self.linear_fc1(hidden_states)
        out, _bias = self.linear_fc2(swiglu(gate_up))
        return out, None


def with_kernel(
    module: type[torch.nn.Module], kernel: Attention | TransformerEngineAttention | NormFunction
) -> type[torch.nn.Module]:
    """A subclass of `module` bound to `kernel`: megatron-core's specs take classes, not instances."""
    return type(module.__name__, (module,), {"kernel": staticmethod(kernel)})
