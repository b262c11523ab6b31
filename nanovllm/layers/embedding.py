"""Token embedding and output head."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Embedding(nn.Module):
    """Looks tokens up, and as an output head scores them."""

    def __init__(self, vocab_size: int, hidden_size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(vocab_size, hidden_size), requires_grad=False)

    def forward(self, token_ids: Tensor) -> Tensor:
        """Map ids `[num_tokens]` to `[num_tokens, hidden_size]`."""
        return F.embedding(token_ids, self.weight)

    def logits(self, hidden: Tensor) -> Tensor:
        """Score every token for `hidden` `[num_rows, hidden_size]`: `[num_rows, vocab_size]`."""
        return F.linear(hidden, self.weight)
