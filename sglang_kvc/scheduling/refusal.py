"""Why a request is not served, for its sender and for who counts."""

from __future__ import annotations

from enum import Enum
from http import HTTPStatus
from typing import NamedTuple


class Reason(Enum):
    """What ``/metrics`` calls it, and the status of the answer."""

    OPTIONS = "options", HTTPStatus.BAD_REQUEST
    TOO_LONG = "too_long", HTTPStatus.BAD_REQUEST
    OUT_OF_MEMORY = "out_of_memory", HTTPStatus.SERVICE_UNAVAILABLE
    ERROR = "error", HTTPStatus.INTERNAL_SERVER_ERROR

    @property
    def label(self) -> str:
        """Value of the label, one of `series.QUEUE_REASONS`."""
        return self.value[0]

    @property
    def status(self) -> HTTPStatus:
        """Status of the answer."""
        return self.value[1]


class Refusal(NamedTuple):
    """A reason, and the message in words for the sender."""

    reason: Reason
    message: str
