"""How often the known browsers of an account were forgotten."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"


def upgrade() -> None:
    """Add it; browsers that are known stay known."""
    op.add_column("accounts", sa.Column("browsers_ended", sa.Integer(), nullable=False, server_default="0"))
