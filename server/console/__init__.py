"""The coordinator's console: pages about runs, sites, reports and new jobs, for people in a browser.

It reads what the coordinator writes, in a process of its own, and steers as the command line does; a console that dies, or is
not installed, changes nothing in training.
"""
