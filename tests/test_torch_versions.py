"""What differs between versions of PyTorch is asked for once, and answered for each of them."""

from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

from finetune import torch_versions


def varlen_2_11(
    query,
    key,
    value,
    cu_seq_q,
    cu_seq_k,
    max_q,
    max_k,
    *,
    return_aux=None,
    scale=None,
    window_size=(-1, -1),
):
    """The signature of torch 2.11."""


def varlen_2_13(
    query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, return_aux=None, scale=None,
    window_size=(-1, -1), enable_gqa=False, seqused_k=None, block_table=None, num_splits=None,
):  # fmt: skip
    """The signature of torch 2.13 and 2.14."""


@pytest.mark.parametrize(
    ("kernel", "is_grouped", "wanted"),
    [
        (varlen_2_11, True, {}),
        (varlen_2_11, False, {}),
        (varlen_2_13, True, {"enable_gqa": True}),
        (varlen_2_13, False, {"enable_gqa": False}),
    ],
)
def test_grouped_heads_are_announced_where_the_kernel_asks_for_it(kernel, is_grouped, wanted):
    assert torch_versions.varlen_keywords(kernel, is_grouped=is_grouped) == wanted


def test_the_installed_version_takes_these_arguments():
    import inspect

    parameters = inspect.signature(torch_versions.varlen_attn).parameters
    assert {"scale", "window_size", *torch_versions.VARLEN_GROUPED[True]} <= set(parameters)


def test_host_copies_are_made_as_often_as_asked_and_outlive_the_next_step():
    """torch 2.11's own stager closes itself after the first copy."""
    copy = torch_versions.host_copier(torch.device("cpu"))
    weights = {"model": {"w": torch.zeros(4), "tied": None}, "lr": 0.1}
    weights["model"]["tied"] = weights["model"]["w"]
    for value in (1.0, 2.0, 3.0):
        weights["model"]["w"].fill_(value)
        copied = copy(weights)
        weights["model"]["w"].fill_(-1.0)
        assert copied["model"]["w"].tolist() == [value] * 4
        assert copied["model"]["tied"].data_ptr() == copied["model"]["w"].data_ptr()
        assert copied["lr"] == 0.1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_quantised_bytes_keep_their_bits_under_a_float_dtype(dtype):
    packed = torch.arange(256, dtype=torch.uint8).repeat(4)[
        :, None
    ]  # every byte: NaN and infinities among them
    stored = torch_versions.as_floats(packed, dtype)
    assert stored.dtype == dtype
    assert stored.shape == (1024 // dtype.itemsize, 1)
    assert torch.equal(stored.view(torch.uint8).view(-1, 1), packed)


def test_the_timeout_of_collectives_is_set_without_a_warning(tmp_path):
    """Here a warning is an error."""
    store = dist.FileStore(str(tmp_path / "store"))
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        torch_versions.set_timeout(timedelta(seconds=77))
        backend = dist.group.WORLD._get_backend(torch.device("cpu"))
        assert backend.options._timeout == timedelta(seconds=77)
    finally:
        dist.destroy_process_group()
