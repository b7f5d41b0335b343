"""The errors a user can meet. Each message names file or field, value, what is allowed and the way out."""

from __future__ import annotations


class VlaError(Exception):
    """Base of every error raised on purpose; the command line prints it as one line and exits 2."""


class InputError(VlaError):
    """A frame, image, data set or option is missing, unreadable or out of range."""


class RecipeError(VlaError):
    """A pruning recipe is inconsistent, or belongs to another model."""


class BundleError(VlaError):
    """A bundle is incomplete, edited, truncated or of a contract version this library does not know."""


class BackendError(VlaError):
    """A backend is not installed, or cannot run this bundle."""


class ParityError(VlaError):
    """An exported stage does not compute what the original model computes."""


class PlanError(VlaError):
    """The model's answer is not a plan: it cannot be parsed, is not finite, or lies out of range."""
