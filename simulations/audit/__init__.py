"""Privacy audits in three tiers; each can refute a claimed epsilon, none can prove it. See docs/auditing.md."""
