"""A trigger as a new word (textual inversion, Gal et al. 2022, arXiv 2208.01618), learned together with an adapter.

Tokenizer and text do not change. The text encoder gets the learned vectors instead of the trigger's tokens, and the
following tokens move accordingly. A1111 and ComfyUI do the same with an embedding of that name. Internally the vectors
have negative ids, so that CLIP still finds the end of the text (the largest id, or the first end token).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn import functional

if TYPE_CHECKING:
    from transformers import CLIPTokenizer, PreTrainedModel


class LearnedToken:
    """The vectors of one word in one text encoder.

    Args:
        encoder: the text encoder; it is modified until `remove`.
        tokenizer: its tokenizer, which is not modified.
        word: the trigger.
        vectors: `[n, width]`; None: the embeddings of `init_word`, repeated up to `count`.
        init_word: by default `word`.
    """

    def __init__(
        self,
        encoder: PreTrainedModel,
        tokenizer: CLIPTokenizer,
        word: str,
        count: int,
        vectors: torch.Tensor | None = None,
        init_word: str = "",
    ):
        table = encoder.get_input_embeddings()
        self.encoder, self.off = encoder, False
        ids = tokenizer(word, add_special_tokens=False).input_ids
        self.word_ids, self.end = torch.tensor(ids, device=table.weight.device), int(tokenizer.eos_token_id)
        self.init_tokens = 0
        if vectors is None:
            first = tokenizer(init_word, add_special_tokens=False).input_ids if init_word else ids
            self.init_tokens = len(first)
            vectors = table.weight.detach()[[first[n % len(first)] for n in range(count)]]
        self.embedding = _Embedding(table, vectors)
        encoder.set_input_embeddings(self.embedding)
        self._hook = encoder.register_forward_pre_hook(self._before, with_kwargs=True)

    @property
    def vectors(self) -> nn.Parameter:
        """`[n, width]`, float32."""
        return self.embedding.vectors

    def remove(self) -> None:
        """Restore the encoder."""
        self._hook.remove()
        self.encoder.set_input_embeddings(self.embedding.table)

    def _before(self, _: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self.off:
            return None
        ids = args[0] if args else kwargs["input_ids"]
        ids = mark_token(ids, self.word_ids.to(ids.device), len(self.vectors), self.end)
        return ((ids, *args[1:]), kwargs) if args else (args, {**kwargs, "input_ids": ids})


class _Embedding(nn.Module):
    """A table of embeddings, and the vectors of ids -1, -2, ..."""

    def __init__(self, table: nn.Embedding, vectors: torch.Tensor):
        super().__init__()
        self.table = table
        self.vectors = nn.Parameter(vectors.detach().to(table.weight.device, torch.float32, copy=True))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """`[B, T]` -> `[B, T, width]`."""
        pretrained = self.table(ids.clamp(min=0))
        learned = functional.embedding((-1 - ids).clamp(0, len(self.vectors) - 1), self.vectors)
        return torch.where((ids < 0)[..., None], learned.to(pretrained.dtype), pretrained)


def mark_token(ids: torch.Tensor, word_ids: torch.Tensor, count: int, end: int) -> torch.Tensor:
    """Replace the ids `word_ids` in each row by -1, ..., -count. Nothing is read back from the device.

    Args:
        ids: `[B, T]`, padded with the last token of the row. Texts that become too long are cut and still end with
            `end`.
        word_ids: `[k]`.
        end: id of the end token.
    """
    length, wide = ids.shape[1], ids.shape[1] * max(1, count)
    start = torch.zeros_like(ids, dtype=torch.bool)
    rows = ids.unfold(1, len(word_ids), 1)
    start[:, : rows.shape[1]] = (rows == word_ids).all(-1)
    inside = start.clone()
    for offset in range(1, len(word_ids)):
        inside[:, offset:] |= start[:, :-offset]
    sizes = torch.where(start, count, torch.where(inside, 0, 1))
    places = sizes.cumsum(1) - sizes
    # An extra column, which is never read, receives the removed ids.
    output = ids[:, -1:].repeat(1, wide + 1)
    output.scatter_(1, torch.where(inside, wide, places), ids)
    for number in range(count):
        output.scatter_(1, torch.where(start, places + number, wide), torch.full_like(ids, -1 - number))
    output = output[:, :length]
    ended = (output == end).any(1, keepdim=True)
    return torch.cat([output[:, :-1], torch.where(ended, output[:, -1:], end)], dim=1)
