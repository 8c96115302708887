"""The tables of a console's database, as its newest migration leaves them. Times are whole seconds since 1970, UTC.

Nothing here opens anything: of codes and sessions stand hashes only, of passwords argon2id, secrets of authenticators are sealed.
"""

from __future__ import annotations

from sqlalchemy import (
    BigInteger,
    Boolean,
    Column,
    ForeignKey,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    String,
    Table,
)

METADATA = MetaData()

ACCOUNTS = Table(
    "accounts",
    METADATA,
    Column("id", String(32), primary_key=True),
    Column("name", String(64), nullable=False),
    Column("name_key", String(128), nullable=False, unique=True),  # the name, however it is spelled
    Column("role", String(20), nullable=False),
    Column("password", String(200)),  # argon2id; none until the invitation was taken, or with sign-in elsewhere
    Column("totp", LargeBinary),  # sealed
    Column("totp_step", BigInteger, nullable=False),  # of the code that was used last
    Column("disabled", Boolean, nullable=False),
    Column("created", BigInteger, nullable=False),
    Column("signed_in", BigInteger),
    Column("issuer", String(300)),  # of an account that signs in elsewhere (OpenID Connect)
    Column("subject", String(300)),
    Column(
        "browsers_ended", Integer, nullable=False, server_default="0"
    ),  # how often those that were known were forgotten
    Index("ix_accounts_subject", "issuer", "subject", unique=True),
)
INVITATIONS = Table(
    "invitations",
    METADATA,
    Column("code", String(64), primary_key=True),  # SHA-256
    Column("account", String(32), ForeignKey("accounts.id", ondelete="CASCADE")),  # none: of the first administrator
    Column("totp", LargeBinary, nullable=False),  # sealed
    Column("expires", BigInteger, nullable=False),
)
SESSIONS = Table(
    "sessions",
    METADATA,
    Column("id", String(64), primary_key=True),  # SHA-256 of what the browser has
    Column("account", String(32), ForeignKey("accounts.id", ondelete="CASCADE"), nullable=False, index=True),
    Column("created", BigInteger, nullable=False),
    Column("seen", BigInteger, nullable=False),
    Column("address", String(64), nullable=False),
    Column("browser", String(200), nullable=False),
    Column("proven", BigInteger, nullable=False, server_default="0"),  # when password and code were given last
)
ATTEMPTS = Table(
    "attempts",
    METADATA,
    Column("who", String(80), primary_key=True),  # such as "account:" or "address:", and a hash
    Column("failures", Integer, nullable=False),
    Column("latest", BigInteger, nullable=False),
    Column("blocked_until", BigInteger, nullable=False),
)
