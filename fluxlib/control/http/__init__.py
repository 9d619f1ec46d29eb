"""The HTTP API. ``create_app`` makes a Flask application of the services it is given."""

from fluxlib.control.http.application import create_app

__all__ = ["create_app"]
