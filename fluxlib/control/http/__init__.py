"""The HTTP API. ``create_app`` makes a Flask application of the services it is given."""

from fluxlib.control.http.application import Api, create_app

__all__ = ["Api", "create_app"]
