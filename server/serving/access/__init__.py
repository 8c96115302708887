"""Who may ask a service, how much, and what it is billed."""
