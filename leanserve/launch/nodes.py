"""Which machines take part, when they are several."""

from dataclasses import dataclass

from leanserve.contracts.errors import ConfigError

__all__ = ["Nodes"]


@dataclass(frozen=True, kw_only=True)
class Nodes:
    """The same command runs on every machine, with another node_rank. The first one, 0, has the front end."""

    count: int = 1
    rank: int = 0
    """This machine among them."""
    endpoint: str | None = None
    """host:port on machine 0 where the agents meet."""

    def __post_init__(self) -> None:
        if self.count < 1:
            raise ConfigError(f"nnodes is {self.count}; it must be at least 1")
        if not 0 <= self.rank < self.count:
            raise ConfigError(f"node rank is {self.rank}; with nnodes {self.count} it is 0 to {self.count - 1}")
        if self.count == 1:
            return
        host, _, port = (self.endpoint or "").rpartition(":")
        if not host or not port.isdecimal():
            raise ConfigError(
                f"rdzv endpoint is {self.endpoint!r}; several nodes meet at HOST:PORT on node 0, such as 10.0.0.1:29400"
            )

    @property
    def host(self) -> str:
        """Of the endpoint."""
        return (self.endpoint or "").rpartition(":")[0].strip("[]")
