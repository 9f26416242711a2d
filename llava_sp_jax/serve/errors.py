"""Defines the errors that a client reads: a code, which decides status and type, and what to do."""

from __future__ import annotations

from llava_sp_jax.console import shortened
from llava_sp_jax.errors import LlavaSPError

SHOWN = 500  # characters of a message: part of it comes from the client

_INVALID, _SERVER = "invalid_request_error", "server_error"

# Code of an error -> its HTTP status, and its type in the words of OpenAI. Clients choose an
# exception by the status, and whether to try again: they do so after 408, 429 and 5xx.
CODES: dict[str, tuple[int, str]] = {
  "invalid_http": (400, _INVALID),
  "invalid_json": (400, _INVALID),
  "missing_required_parameter": (400, _INVALID),
  "invalid_type": (400, _INVALID),
  "invalid_value": (400, _INVALID),
  "unsupported_parameter": (400, _INVALID),
  "unsupported_value": (400, _INVALID),
  "too_many": (400, _INVALID),
  "context_length_exceeded": (400, _INVALID),
  "invalid_base64": (400, _INVALID),
  "invalid_image": (400, _INVALID),
  "image_too_large": (400, _INVALID),
  "invalid_image_url": (400, _INVALID),
  "image_url_refused": (400, _INVALID),
  "image_url_failed": (400, _INVALID),
  "cors_refused": (400, _INVALID),
  "invalid_api_key": (401, "authentication_error"),
  "not_found": (404, "not_found_error"),
  "model_not_found": (404, "not_found_error"),
  "method_not_allowed": (405, _INVALID),
  "request_timeout": (408, _INVALID),
  "request_too_large": (413, _INVALID),
  "unsupported_media_type": (415, _INVALID),
  "too_many_requests": (429, "rate_limit_error"),
  "internal_error": (500, _SERVER),
  "not_ready": (503, _SERVER),
  "too_many_connections": (503, _SERVER),
  "answer_timeout": (504, _SERVER),
}


# Status -> headers of its responses: what to send, whether to try again, and when (in seconds).
HEADERS: dict[int, dict[str, str]] = {
  401: {"www-authenticate": "Bearer"},
  429: {"retry-after": "1"},
  503: {"retry-after": "5"},
  504: {"x-should-retry": "false"},  # an answer that took too long would do so again
}


class ApiError(LlavaSPError):
  """Refuses a request: what was found, what was expected, and what to do.

  `code` is a key of CODES, which gives `status` (of HTTP) and `type`. `param` names the field that
  is wrong, such as `messages[0].content`; None if it is none of them. The message is one printable
  line of at most SHOWN characters.
  """

  def __init__(self, code: str, message: str, param: str | None = None):
    super().__init__(shortened(message, SHOWN))
    self.code, self.param = code, param and shortened(param, SHOWN)
    self.status, self.type = CODES[code]

  @property
  def headers(self) -> dict[str, str]:
    """Returns the headers of a response with this error."""
    return dict(HEADERS.get(self.status, {}))
