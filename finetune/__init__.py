"""Specialise a language model to a task, and prove it."""

import logging

# peft imports bitsandbytes, which would like to download a kernel for 4-bit products on a CPU and
# says so in every run.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
# Libraries import DeepSpeed where it is installed, and it warns of every machine without a GPU.
logging.getLogger("DeepSpeed").addFilter(
    lambda record: "Setting accelerator to CPU" not in str(record.msg)
)  # fmt: skip


class _SayOnce(logging.Filter):
    """Say once that the Hub does not answer, and what helps.

    huggingface_hub says it at each of five retries of each file.
    """

    is_known = False

    def filter(self, record: logging.LogRecord) -> bool:
        text = str(record.msg)
        if " thrown while requesting " not in text:
            return not text.startswith("Retrying in ")
        first, self.is_known = not self.is_known, True
        host = "/".join(
            text.partition(" thrown while requesting ")[2].split(" ")[-1].split("/")[:3]
        )
        record.msg = (
            f"note: {host} does not answer; trying again for half a minute. Without a network give "
            "a folder, or set HF_HUB_OFFLINE=1 to take what is in the cache"
        )
        return first


logging.getLogger("huggingface_hub.utils._http").addFilter(_SayOnce())
