"""What one console is made of; `shared.web.application` serves it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shared.web.accounts.accounts import Accounts
from shared.web.accounts.links import OneTimeLink
from shared.web.accounts.sessions import Sessions
from shared.web.roles import Action

if TYPE_CHECKING:
    from shared.web.oidc.provider import Provider


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A line of the navigation; it is shown to those who may follow it, once a route with its path is there.

    Attributes:
        key: of its message in `texts/`, section `nav`.
        path: where it leads.
        action: what its page asks for.
        count: of the console's content, how many things wait there for somebody; shown beside it unless it is 0.
    """

    key: str
    path: str
    action: Action
    count: Callable[[Any], int] | None = None


@dataclass(frozen=True, kw_only=True)
class Console:
    """A console before it is served.

    Attributes:
        kind: "site", "coordinator" or "research"; names its cookies.
        owner: whose it is, shown on every page, such as the site's name.
        accounts, sessions: who may use it.
        navigation: its pages, in order.
        folders: rooms with `templates/`, `texts/` and `static/` of this console, beside the shared ones.
        now: whole seconds since 1970.
        names: the hosts by which it may be called, beside the machine's own names if it listens on loopback.
        loopback: it listens on loopback only.
        secure: it is served over TLS.
        port: it listens on; names its cookies where several consoles share one host.
        filters: what its templates call, beside the shared ones.
        provider: sign-in by OpenID Connect; None: with accounts of its own only.
        link: sign-in by a link that the terminal prints; None: there is none.
        shows_errors: whether people who are signed in see the texts of errors, which may quote files. Else the log has them.
        content: what its own routes work on.
    """

    kind: str
    owner: str
    accounts: Accounts
    sessions: Sessions
    navigation: tuple[Entry, ...]
    folders: tuple[Path, ...]
    now: Callable[[], int]
    names: frozenset[str] = frozenset()
    loopback: bool = True
    secure: bool = False
    port: int = 0
    filters: Mapping[str, Callable[..., Any]] = field(default_factory=dict)
    provider: Provider | None = None
    link: OneTimeLink | None = None
    shows_errors: bool = True
    content: Any = None

    def cookie(self, name: str) -> str:
        """Return the name of one of its cookies; over TLS browsers hold it to this host alone."""
        return f"__Host-silotune-{self.kind}-{name}" if self.secure else f"silotune-{self.kind}-{self.port}-{name}"
