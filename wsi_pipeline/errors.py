"""The errors a caller may want to treat differently; the message says what to do."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager


def without_secrets(text: str) -> str:
    """Return a text whose URLs have lost user, password and all that comes behind a "?" or "#".

    Example:
        >>> without_secrets("https://me:k@y@host/a.svs?sig=1: no such file")
        'https://host/a.svs: no such file'
    """
    text = re.sub(r"(\w://)[^\s/'\"]*@", r"\1", text)
    return re.sub(r"(\w://[^\s?#'\"]*)[?#][^\s'\"]*?(?=:?(?:[\s'\"]|$))", r"\1", text)


class WsiPipelineError(Exception):
    """Anything this package refuses, with a message meant for the user: no secrets in it."""

    def __str__(self) -> str:
        return without_secrets(super().__str__())


class UsageError(WsiPipelineError, ValueError):
    """Inputs or options with which nothing could be done, whatever the files hold."""


class SourceError(WsiPipelineError, OSError):
    """A slide, image or stored grid that cannot be opened or read."""


class UnreachableError(WsiPipelineError, ConnectionError):
    """A server of slides that does not answer, or lets nobody in: no damage to a slide."""


class MissingMppError(SourceError):
    """A slide that does not say how many micrometres a pixel has."""


class BundleError(WsiPipelineError, ValueError):
    """A model bundle, or its weights, that does not hold what it must."""


class StoreError(WsiPipelineError, OSError):
    """An output folder or patch grid that cannot be used as asked."""


class BusyError(StoreError):
    """An output folder in which another process is working."""


class ClusterError(WsiPipelineError, ConnectionError):
    """A dask cluster that cannot be reached, or whose workers cannot do the work."""


class DeviceError(ClusterError):
    """A GPU with which this process can do no more."""


class AnnotationError(WsiPipelineError, ValueError):
    """A GeoJSON or mask file that cannot be used as annotations."""


class RecipeError(WsiPipelineError, ValueError):
    """A training recipe that does not hold what it must."""


class EvaluationError(WsiPipelineError, ValueError):
    """Two sides that cannot be compared."""


@contextmanager
def raised_as(
    kind: type[WsiPipelineError],
    caught: type[Exception] | tuple[type[Exception], ...],
    at: object = "",
) -> Iterator[None]:
    """Raise what the body raises of some kinds as another, `at` before its sentence."""
    try:
        yield
    except caught as error:
        raise kind(f"{at}: {error}" if at else str(error)) from error
