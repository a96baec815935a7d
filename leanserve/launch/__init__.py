"""The only wiring: who runs in which process.

front_end   the process a user starts: HTTP, text, and the agent below as its child
agent       torchrun, quiet, tied to the front end's life; starts the ranks
rank        one process per device; rank 0 also runs the engine
"""
