"""What only Windows asks of a program: a window of its own, closing it, and services."""
