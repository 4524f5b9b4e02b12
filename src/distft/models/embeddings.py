"""New rows of the embeddings, for entries of a tokenizer that the base does not know: those of
`model.resize_embeddings`, and those that `data.chat_template` adds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch


def ends_with(name: str, end: str) -> bool:
    """Whether `end` names the module `name`, as PEFT decides it for entries of a list."""
    return name == end or name.endswith(f".{end}")


def vocabulary_size(tokenizer: Any) -> int:
    """The number of rows that the tokenizer's entries need; their numbers may have gaps."""
    return int(max(tokenizer.get_vocab().values())) + 1


@torch.no_grad()
def add_rows(model: Any, rows: int, new_tokens: Sequence[int] = ()) -> None:
    """Enlarge the embeddings of `model` to `rows`, if they have fewer. A new row is the mean of the others, and so is
    that of a new token for which the model has a spare row."""
    before = model.get_input_embeddings().weight.shape[0]
    new = sorted({*range(before, rows), *new_tokens})
    if not new:
        return
    if rows > before:
        model.resize_token_embeddings(rows, mean_resizing=False)
    for module in (model.get_input_embeddings(), model.get_output_embeddings()):
        if module is not None:
            module.weight[new] = module.weight[: new[0]].mean(0, dtype=torch.float32).to(module.weight.dtype)


def train_new_rows(lora: dict[str, Any], base: Any, before: int, new_tokens: Sequence[int] = ()) -> dict[str, Any]:
    """`lora`, a LoraConfig's arguments, with the rows of `base` from number `before` on, and those of `new_tokens`,
    among what is trained.

    Modules that are trained whole need nothing else. A tied output head follows the embedding.
    """
    rows = base.get_input_embeddings().weight.shape[0]
    new = {*range(before, rows), *new_tokens}
    if not new:
        return lora
    names = {id(module): name for name, module in base.named_modules()}
    embedding, head = base.get_input_embeddings(), base.get_output_embeddings()
    tied = head is None or head.weight is embedding.weight
    indices = lora.get("trainable_token_indices") or {}
    wanted = indices if isinstance(indices, dict) else {names[id(embedding)]: indices}
    for module in (embedding,) if tied else (embedding, head):
        name = names[id(module)]
        if not any(ends_with(name, whole) for whole in lora.get("modules_to_save") or []):
            key = next((key for key in wanted if ends_with(name, key)), name)
            wanted = wanted | {key: sorted({*wanted.get(key, []), *new})}
    return lora | ({"trainable_token_indices": wanted} if wanted else {})
