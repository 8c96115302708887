"""What Alembic runs: the migrations, within the transaction that `shared.web.state.database.upgrade` is in."""

from __future__ import annotations

from alembic import context

if __name__ != "shared.web.state.migrations.env":  # Alembic loads the file itself; as a module it does nothing
    context.configure(connection=context.config.attributes["connection"], transaction_per_migration=False)
    context.run_migrations()
