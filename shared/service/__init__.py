"""What a process that runs for months has: its log, its word with the service manager, its page for monitoring."""
