"""Errors for the user; defined in `vitrail_runtime`, whose programs and plugins must not import PyTorch."""

from vitrail_runtime.errors import ArgumentError, ConfigError, ImageError, TrainingError

__all__ = ["ArgumentError", "ConfigError", "ImageError", "TrainingError"]
