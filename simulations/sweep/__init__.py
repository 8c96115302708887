"""Sweeps: one scenario under many settings, budgets among them, and what the best setting reaches at each budget."""
