"""The errors that a user, a client or a file can cause, with HTTP status and OpenAI code.

What only HTTP knows, such as a body that is no JSON, has its codes in the server package.

ServeError
├── InvalidRequestError            400  invalid_request_error
│   ├── ContextLengthError         400  context_length_exceeded
│   └── AdapterInvalidError        400  adapter_invalid
├── AuthenticationError            401  invalid_api_key
├── PermissionDeniedError          403  permission_denied
├── ModelNotFoundError             404  model_not_found
├── RequestTimeoutError            408  request_timeout
├── AdapterExistsError             409  adapter_exists
├── PinsFullError                  409  pins_full
├── VersionMismatchError           412  version_mismatch
├── RequestTooLargeError           413  request_too_large
├── QueueFullError                 429  queue_full
├── OverloadedError                429  overloaded
├── AdapterUnavailableError        503  adapter_unavailable
├── StorageError                   503  storage_failed
├── EngineStoppedError             503  engine_stopped
├── DrainingError                  503  draining
├── SamplingError                  500  sampling_failed
├── UnsupportedModelError          (at start only)
└── ConfigurationError             (at start only)
"""


class ServeError(Exception):
    """An error with a message for the person who caused it.

    param                the field at fault
    retry_after_seconds  when the same request may succeed
    """

    status = 500
    error_type = "server_error"
    code = "internal_error"

    def __init__(
        self,
        message: str,
        *,
        param: str | None = None,
        retry_after_seconds: float | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.retry_after_seconds = retry_after_seconds


class InvalidRequestError(ServeError):
    """The request is malformed or asks for something out of range."""

    status = 400
    error_type = "invalid_request_error"
    code = "invalid_value"


class ContextLengthError(InvalidRequestError):
    """Prompt and requested tokens do not fit the model's context."""

    code = "context_length_exceeded"


class AdapterInvalidError(InvalidRequestError):
    """An adapter's files cannot be served; the message lists every problem and the way out."""

    code = "adapter_invalid"


class AuthenticationError(ServeError):
    """The request has no API key, or one that this server does not know."""

    status = 401
    error_type = "invalid_request_error"
    code = "invalid_api_key"


class PermissionDeniedError(ServeError):
    """The request's API key is known, but not enough for what is asked."""

    status = 403
    error_type = "invalid_request_error"
    code = "permission_denied"


class ModelNotFoundError(ServeError):
    """`model` names neither the base nor an adapter."""

    status = 404
    error_type = "invalid_request_error"
    code = "model_not_found"


class RequestTimeoutError(ServeError):
    """The client stopped sending its request."""

    status = 408
    error_type = "invalid_request_error"
    code = "request_timeout"


class AdapterExistsError(ServeError):
    """A name is taken by another adapter."""

    status = 409
    error_type = "invalid_request_error"
    code = "adapter_exists"


class PinsFullError(ServeError):
    """No more adapters may be pinned to the device."""

    status = 409
    error_type = "invalid_request_error"
    code = "pins_full"


class VersionMismatchError(ServeError):
    """An adapter is no longer at the version that If-Match names."""

    status = 412
    error_type = "invalid_request_error"
    code = "version_mismatch"


class RequestTooLargeError(ServeError):
    """The request's body is larger than the server accepts."""

    status = 413
    error_type = "invalid_request_error"
    code = "request_too_large"


class QueueFullError(ServeError):
    """Too many requests are waiting, or too many uploads are under way."""

    status = 429
    error_type = "rate_limit_error"
    code = "queue_full"


class OverloadedError(ServeError):
    """The client has so many requests waiting that this one's first token would come too late."""

    status = 429
    error_type = "rate_limit_error"
    code = "overloaded"


class AdapterUnavailableError(ServeError):
    """The adapter exists but could not be loaded."""

    status = 503
    code = "adapter_unavailable"


class StorageError(ServeError):
    """The store could not be written or read: a full disk, missing rights, a damaged file."""

    status = 503
    code = "storage_failed"


class EngineStoppedError(ServeError):
    """The engine is shutting down or has failed."""

    status = 503
    code = "engine_stopped"


class DrainingError(ServeError):
    """The server finishes what it has and takes nothing new; another one takes it."""

    status = 503
    code = "draining"


class SamplingError(ServeError):
    """The model gave one request logits that are not finite; the rest of the batch goes on."""

    code = "sampling_failed"


class UnsupportedModelError(ServeError):
    """The base's architecture or configuration is not one that this server computes."""


class ConfigurationError(ServeError):
    """A flag, an environment variable or a file given at start is wrong."""
