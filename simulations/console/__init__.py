"""The research console: runs, repeats and sweeps of a folder in a browser, read only.

It reads what simulations and federations write, in a process of its own that never loads PyTorch. Nothing in the folder is
changed, no link in it is followed, and a run that is damaged is shown with the reason.
"""
