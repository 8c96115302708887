"""What a console keeps: accounts, sessions, invitations, attempts, in SQLite or PostgreSQL."""
