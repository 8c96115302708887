"""What the link tells whoever keeps a log or a status; nothing happens by default."""

from __future__ import annotations


class LinkEvents:
    """Called in the link's own thread: return soon, and raise nothing."""

    def connected(self, site: str, peer: str, software: str) -> None:
        """A site's stream is open."""

    def disconnected(self, site: str, reason: str) -> None:
        """A site's stream has ended."""

    def refused(self, name: str, peer: str, reason: str) -> None:
        """Somebody with a certificate was not let in, or may not stay."""

    def twin(self, site: str, peer: str) -> None:
        """A second process showed the key of a site that is connected; it was refused."""
