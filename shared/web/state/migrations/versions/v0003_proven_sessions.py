"""When the person of a session last proved to be its account's."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"


def upgrade() -> None:
    """Add it; a session of before has proved nothing lately."""
    op.add_column("sessions", sa.Column("proven", sa.BigInteger(), nullable=False, server_default="0"))
