"""Errors written for the user: the message is one sentence that names the config key or the file."""


class ConfigError(ValueError):
    """A setting cannot work. The message starts with the config key or its value."""


class ImageError(ValueError):
    """An image file cannot be read. The message names the file."""


class TrainingError(RuntimeError):
    """A training cannot continue. The message says where it was and why."""
