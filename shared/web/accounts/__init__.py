"""Who may use a console: accounts, invitations, sessions, and how often somebody may try."""
