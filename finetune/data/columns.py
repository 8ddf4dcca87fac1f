"""Numbers that travel with documents, by name."""

import torch


class Columns(dict[str, torch.Tensor]):
    """What is known beforehand of documents, by name; a missing name says which there are."""

    def __missing__(self, name: str) -> torch.Tensor:
        raise NoColumn(
            f"no column {name!r}; batch.columns has {list(self)}, the fields that the function of "
            "data.format returns"
        )


class NoColumn(KeyError):
    """A KeyError that shows its message as it is."""

    def __str__(self) -> str:
        return str(self.args[0])
