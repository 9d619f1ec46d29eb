"""The HTTP API: ``Api`` is made of the services it is given."""

from fluxlib.control.http.api import Api

__all__ = ["Api"]
