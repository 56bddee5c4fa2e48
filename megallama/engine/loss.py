"""What a run minimises: one loss for each token. The engine takes the mean over the tokens of the global batch.

Shape suffixes: B sequences of a micro-batch, S positions of this context-parallel rank, V rows of the embedding.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch

from megallama.engine.step import StepBatch
from megallama.host.errors import UserError
from megallama.model.head import whole_logits
from megallama.topology.groups import Topology


class TokenLoss(ABC):
    """A loss made of the cross-entropy of each token, which the built-in head computes without whole logits."""

    @abstractmethod
    def __call__(self, losses_BS: torch.Tensor, batch: StepBatch) -> torch.Tensor:
        """The loss of each token [B, S], masked ones included.

        Args:
            losses_BS: Cross-entropy of each label.
            batch: What the losses are of, on the device of the model.
        """


class LogitsLoss(ABC):
    """A loss made of the logits, in at least fp32. Every tensor-parallel rank gets them whole and computes the same.

    It costs memory for B x S x V numbers on each rank of the last stage, and as much for their gradient.
    """

    @abstractmethod
    def __call__(self, logits_BSV: torch.Tensor, batch: StepBatch) -> torch.Tensor:
        """The loss of each token [B, S], masked ones included.

        Args:
            logits_BSV: Logits of the whole vocabulary. V is the padded size of the embedding: rows from
                `model.vocab_size` on are padding, which the built-in head counts in its softmax too.
            batch: What the logits are of, on the device of the model.
        """


Loss = TokenLoss | LogitsLoss


def token_losses(
    loss: Loss | None, output: torch.Tensor, batch: StepBatch, *, topology: Topology
) -> torch.Tensor:
    """Losses of each token, in at least fp32, from what the last chunk gave: losses, or this rank's part of the logits.

    Raises:
        UserError: the loss gave something else than a number for each token.
    """
    output = output.to(torch.promote_types(output.dtype, torch.float32))
    if loss is None:
        return output
    given = whole_logits(output, tp_group=topology.tp_group) if isinstance(loss, LogitsLoss) else output
    losses_BS = loss(given, batch)
    if losses_BS.shape != batch.labels_BS.shape:
        raise UserError(
            f"loss ({type(loss).__name__}) returned a tensor of shape {tuple(losses_BS.shape)} for labels of shape"
            f" {tuple(batch.labels_BS.shape)}: return one loss a token, without a mean; the framework takes it"
        )
    return losses_BS
