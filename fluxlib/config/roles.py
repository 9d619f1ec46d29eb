"""The roles of API keys, most powerful first."""

ROLES = ("admin", "deploy", "invoke", "read")
