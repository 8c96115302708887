"""From one version of the database to the next, by Alembic; a migration that was released is never changed."""
