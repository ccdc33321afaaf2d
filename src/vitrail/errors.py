"""Errors for the user: each message names the config key or the file, what is wrong, and what to do."""


class ConfigError(ValueError):
    """An invalid setting. The message starts with the config key or its value."""


class ImageError(ValueError):
    """An unreadable image file. The message names the file."""


class TrainingError(RuntimeError):
    """A training that cannot continue. The message states the step and the reason."""
