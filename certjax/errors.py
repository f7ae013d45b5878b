"""Every error certjax raises on purpose, but for those of checkpoints (`checkpoints_tools.CheckpointError`). Each is
also the built-in a caller would expect."""


class CertjaxError(Exception):
    """Base of the errors raised by certjax."""


class InvalidArgumentError(CertjaxError, ValueError):
    """An argument is outside what the function accepts; the message names it and the remedy."""


class MissingTier2Error(CertjaxError, RuntimeError):
    """The originals are gone (or not in host memory): certified attention refuses instead of degrading."""


class ContextLengthError(CertjaxError, ValueError):
    """Prompt plus new tokens do not fit the cache or the model's context."""
