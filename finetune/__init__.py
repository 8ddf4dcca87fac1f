"""Specialise a language model to a task, and prove it."""

import logging

# peft imports bitsandbytes, which suggests in every run to download a kernel for 4-bit products on
# a CPU.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
# Libraries import DeepSpeed if it is installed, and it warns on every machine without a GPU.
logging.getLogger("DeepSpeed").addFilter(
    lambda record: "Setting accelerator to CPU" not in str(record.msg)
)


class _WarnOnce(logging.Filter):
    """Report once that the Hub does not answer, and what to do.

    huggingface_hub reports it at each of five retries of each file.
    """

    is_known = False

    def filter(self, record: logging.LogRecord) -> bool:
        text = str(record.msg)
        if " thrown while requesting " not in text:
            return not text.startswith("Retrying in ")
        first, self.is_known = not self.is_known, True
        url = text.partition(" thrown while requesting ")[2].split(" ")[-1]
        host = "/".join(url.split("/")[:3])
        record.msg = (
            f"note: {host} does not answer; trying again for half a minute. Without a network give "
            "a folder, or set HF_HUB_OFFLINE=1 to use the cache"
        )
        return first


logging.getLogger("huggingface_hub.utils._http").addFilter(_WarnOnce())
