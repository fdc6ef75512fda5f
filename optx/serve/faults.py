"""What a client is told when its request cannot be served: a status and an error in OpenAI's form."""

from optx.errors import OptxError

KINDS = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
    500: "server_error",
    503: "service_unavailable_error",
    504: "timeout_error",
}


class Fault(OptxError):
    """An HTTP error. param: the field of the body that is wrong; code: a word for programs."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ):
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.headers = headers or {}

    @property
    def body(self) -> dict:
        kind = KINDS.get(self.status, "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


def busy(status: int, message: str, code: str) -> Fault:
    """A fault that is worth another try in a moment."""
    return Fault(status, message, code=code, headers={"Retry-After": "1"})
