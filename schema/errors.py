"""The error tree: every error that Funnel raises on purpose is a FunnelError."""


class FunnelError(Exception):
    """Base of all errors raised on purpose; the text says what was expected, what came, what to do next."""


class ConfigError(FunnelError):
    """A configuration or dataset declaration is wrong."""


class DataError(FunnelError):
    """Source data break the event contract."""


class ShapeError(FunnelError):
    """A tensor or array has the wrong shape or dtype."""


class IndexBuildError(FunnelError):
    """The candidate index cannot be built or does not pass its own checks."""


class CheckpointError(FunnelError):
    """An exported model cannot be rebuilt from its checkpoint by this code."""


class CollapsedModelError(FunnelError):
    """The retrieval model recommends the same to everybody."""


class PoorSupportError(FunnelError):
    """A log says too little about a policy other than the one that made it."""


class ServingError(FunnelError):
    """A model server or a request to it failed."""


class BundleError(ServingError):
    """Exported models that are to work together do not belong together."""
