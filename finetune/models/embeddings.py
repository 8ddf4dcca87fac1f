"""Find embedding and head; add new tokens to them, and noise to the embedding's output."""

from typing import Any

import torch


def embedding_and_head(model: Any) -> list[Any]:
    """Return those of the two that the model has, with a weight, in this order."""
    names = ("get_input_embeddings", "get_output_embeddings")
    found = [getattr(model, name)() for name in names if hasattr(model, name)]
    return [module for module in found if getattr(module, "weight", None) is not None]


def extend(model: Any, ids: list[int]) -> None:
    """Set the rows of new token ids in embedding and head to the mean of the old rows.

    Adds rows where there are too few. A mean row gives a new token the average probability; zeros
    or noise would make it the likeliest or break the first steps (Hewitt, 2021). Rows that a model
    has past its vocabulary are padding, and are set too.
    """
    old = min(ids)
    if max(ids) >= model.get_input_embeddings().weight.shape[0]:
        model.resize_token_embeddings(max(ids) + 1, mean_resizing=False)
    with torch.no_grad():
        for weight in (module.weight for module in embedding_and_head(model)):
            if not weight.is_meta:
                weight[ids] = weight[:old].mean(0, dtype=torch.float32).to(weight.dtype)


def add_noise(model: Any, alpha: float) -> None:
    """Add uniform noise of +-alpha / sqrt(L d) in training only: NEFTune (Jain et al., 2023).

    L is the length of a token's document, also in a pack; d the width of the embedding.
    """
    lengths: list[torch.Tensor] = []

    def store_lengths(module: Any, arguments: tuple[Any, ...], inputs: dict[str, Any]) -> None:
        ids, bounds = inputs["input_ids"], inputs.get("cu_seq_lens_q")
        mask = inputs.get("attention_mask")
        if bounds is not None:
            sizes = bounds.diff()
            # With output_size, PyTorch need not wait for the GPU to sum the sizes.
            lengths[:] = [sizes.repeat_interleave(sizes, output_size=ids.shape[1])[None]]
        elif mask is not None:
            lengths[:] = [mask.sum(1, keepdim=True)]
        else:
            lengths[:] = [torch.full_like(ids[:, :1], ids.shape[1])]

    def add(module: Any, arguments: tuple[Any, ...], embedded: torch.Tensor) -> torch.Tensor:
        if not model.training:
            return embedded
        # In float32: L d may exceed 65,504, the largest float16.
        reach = alpha / (lengths[0][..., None].float() * embedded.shape[-1]).sqrt()
        noise = torch.empty_like(embedded, dtype=torch.float32).uniform_(-1, 1) * reach
        return embedded + noise.to(embedded.dtype)

    model.register_forward_pre_hook(store_lengths, with_kwargs=True)
    model.get_input_embeddings().register_forward_hook(add)
