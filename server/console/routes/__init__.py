"""The routes of the coordinator's console: one file for each kind of page."""
