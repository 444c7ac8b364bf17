"""The one error a user's configuration can cause, and the wording shared by all its messages."""

from __future__ import annotations

__all__ = ["ConfigError", "one_line"]

_LONGEST = 1000


class ConfigError(ValueError):
    """A mistake in an experiment file or an override: one line with the remedy.

    Example:
        >>> try:
        ...     Experiment.from_files(["flowbench:toy/cfm.yaml"], ["data.batchsize=64"])
        ... except ConfigError as error:
        ...     print(error)
        data: FlowDataModule does not accept 'batchsize'; did you mean 'batch_size'?
    """

    def __init__(self, message: object = "") -> None:
        text = one_line(message)
        # A message may quote a user's text of any length; what to do about it stands at the end.
        super().__init__(text if len(text) <= _LONGEST else f"{text[: _LONGEST - 305]} ... {text[-300:]}")


def one_line(text: object) -> str:
    """Collapse any message to a single line."""
    return " ".join(str(text).split())
