"""The embedding: new tokens in it, noise on it."""

from typing import Any

import torch


def extend(model: Any, ids: list[int]) -> None:
    """Give new token ids a row in embedding and head, where they have none, and start them from the
    mean of the old rows.

    A mean row gives an unknown token the average probability, where zeros or noise would make it
    the likeliest or break the first steps (Hewitt, 2021). Rows past the old vocabulary that a model
    came with are padding, and are started alike.
    """
    old = min(ids)
    if max(ids) >= model.get_input_embeddings().weight.shape[0]:
        model.resize_token_embeddings(max(ids) + 1, mean_resizing=False)
    with torch.no_grad():
        for module in (model.get_input_embeddings(), model.get_output_embeddings()):
            if module is not None and not module.weight.is_meta:
                module.weight[ids] = (
                    module.weight[:old].mean(0, dtype=torch.float32).to(module.weight.dtype)
                )


def add_noise(model: Any, alpha: float) -> None:
    """NEFTune (Jain et al., 2023): uniform noise of +-alpha / sqrt(L d) on the embeddings, in
    training only.

    L is the length of a token's own document, also in a pack; d the width of the embedding.
    """
    lengths: list[torch.Tensor] = []

    def note(module: Any, arguments: tuple[Any, ...], inputs: dict[str, Any]) -> None:
        ids, bounds, mask = (
            inputs["input_ids"],
            inputs.get("cu_seq_lens_q"),
            inputs.get("attention_mask"),
        )
        if bounds is not None:
            sizes = bounds.diff()
            # Its sum is known here; else a GPU would be asked for it.
            lengths[:] = [sizes.repeat_interleave(sizes, output_size=ids.shape[1])[None]]
        else:
            lengths[:] = [
                mask.sum(1, keepdim=True)
                if mask is not None
                else torch.full_like(ids[:, :1], ids.shape[1])
            ]

    def disturb(module: Any, arguments: tuple[Any, ...], embedded: torch.Tensor) -> torch.Tensor:
        if not model.training:
            return embedded
        reach = (
            alpha / (lengths[0][..., None].float() * embedded.shape[-1]).sqrt()
        )  # float16 ends at 65,504
        noise = torch.empty_like(embedded, dtype=torch.float32).uniform_(-1, 1) * reach
        return embedded + noise.to(embedded.dtype)

    model.register_forward_pre_hook(note, with_kwargs=True)
    model.get_input_embeddings().register_forward_hook(disturb)
