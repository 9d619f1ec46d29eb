"""One route as the table declares it; Flask's rules, the fast path's, the checks and the document come from it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from fluxlib.control.http.answers import Answer
from fluxlib.control.http.bodies import NO_BODY, Body
from fluxlib.control.http.budget import Waits
from fluxlib.control.http.fields import Field, Schema
from fluxlib.control.http.request import Request

Handler = Callable[[Request], Answer]


@dataclass(frozen=True, slots=True)
class Content:
    """What one status answers with."""

    about: str
    schema: Schema = field(default_factory=dict)
    media_type: str = "application/json"


@dataclass(frozen=True, slots=True)
class Route:
    """``path`` names its parameters in braces; their checks are ``fields.PARAMS``."""

    method: str
    path: str
    about: str
    handler: Handler
    role: str  # the least that may; also of public routes, for what they say to those with a key
    answers: Mapping[int, Content]
    errors: tuple[int, ...] = ()  # beside those every route has
    body: Body = NO_BODY
    query: tuple[Field, ...] = ()
    waits: Waits = Waits.NO
    public: bool = False
    changes: bool = False  # goes to the audit log
    idempotent_key: bool = False  # takes Idempotency-Key
    fast: bool = False  # answered by the fast path, before Flask

    @property
    def statuses(self) -> tuple[int, ...]:
        """Every status it may answer with."""
        # A body nobody asked for may still be too large, or encoded.
        common = {400, 413, 415, 500, 503}
        if not self.public:
            common |= {401, 403, 429}
        return tuple(sorted(common | set(self.answers) | set(self.errors)))

    @property
    def parameter_names(self) -> tuple[str, ...]:
        return tuple(part[1:-1] for part in self.path.split("/") if part.startswith("{"))

    @property
    def name(self) -> str:
        """Flask's endpoint and OpenAPI's operationId."""
        words = [part.strip("{}") for part in self.path.strip("/").replace(".", "_").split("/")]
        return "_".join([self.method.lower(), *words])
