"""A tuned model behind HTTP."""
