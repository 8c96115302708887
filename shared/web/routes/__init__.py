"""Pages that every console has: signing in, one's own account, everybody's accounts."""
