"""Errors for the user: each message names the config key or the file, what is wrong, and what to do."""

from vitrail_runtime.names import readable


class _UserError(Exception):
    """An error whose message can be written anywhere, whatever the file names in it."""

    def __init__(self, message: str) -> None:
        super().__init__(readable(message))


class ConfigError(_UserError, ValueError):
    """An invalid setting. The message starts with the config key or its value."""


class ArgumentError(ConfigError):
    """An argument of the wrong type or outside its range. `with_key` adds its config key to the message."""

    def __init__(self, name: str, value: object, problem: str, key: str = "") -> None:
        super().__init__(f"{f'{key}.' if key else ''}{name}={value}: {problem}.")
        self.name, self.value, self.problem = name, value, problem

    def with_key(self, key: str) -> "ArgumentError":
        """Return the error for the argument of the config `key`."""
        return ArgumentError(self.name, self.value, self.problem, key)


class ImageError(_UserError, ValueError):
    """An unreadable image file. The message names the file."""


class TrainingError(_UserError, RuntimeError):
    """A training that cannot continue. The message states the step and the reason."""
