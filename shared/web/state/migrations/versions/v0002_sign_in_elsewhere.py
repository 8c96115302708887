"""Accounts that sign in by OpenID Connect."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    """Add who somebody is at the issuer."""
    # By an index: SQLite would copy the table for a constraint, and drop the sessions with the old one.
    op.add_column("accounts", sa.Column("issuer", sa.String(300)))
    op.add_column("accounts", sa.Column("subject", sa.String(300)))
    op.create_index("ix_accounts_subject", "accounts", ["issuer", "subject"], unique=True)
