"""What a request gets that is not carried out, as OpenAI's clients read it: a status, what is wrong, and what to do."""

import math
from typing import Any

from starlette.exceptions import HTTPException

from cachec.runtime.errors import CachecError, DeadlineError, EngineError, InputError

STOPPED = "the server stops, and this was not done: send it again"


class Refused(HTTPException):
    """An answer other than a result.

    ``param``: the field that is wrong; ``code``: what programs look at; ``retry_after``: seconds after which it may go better.
    """

    def __init__(
        self, status: int, message: str, *, code: str, param: str | None = None, retry_after: float | None = None
    ) -> None:
        headers = {} if retry_after is None else {"Retry-After": str(max(1, math.ceil(retry_after)))}
        super().__init__(status, message, headers)
        self.code, self.param = code, param

    def to_json(self) -> dict[str, Any]:
        kind = "server_error" if self.status_code >= 500 else "invalid_request_error"
        if self.status_code == 429:
            kind = "rate_limit_error"
        return {"error": {"message": self.detail, "type": kind, "param": self.param, "code": self.code}}


def refused_for(error: Exception) -> Refused:
    """What an error means to the sender of a request."""
    match error:
        case Refused():
            return error
        case DeadlineError():
            return Refused(429, str(error), code="deadline", param="deadline",
                           retry_after=error.seconds if math.isfinite(error.seconds) else None)  # fmt: skip
        case InputError():
            return Refused(400, str(error), code="invalid_value")
        case EngineError():
            return Refused(500, str(error), code="engine_failed")
        case CachecError():
            return Refused(500, str(error), code=type(error).__name__)
        case TimeoutError():
            return Refused(504, "the request took longer than this server allows: take another level, or fewer steps",
                           code="timeout")  # fmt: skip
    return Refused(500, "the server failed, which is a fault of its own: see its log", code="internal_error")
