"""The site's console: pages about jobs that wait for approval, budget, releases, policy and health, for people in a browser.

It reads what the node writes, in a process of its own, and decides about jobs as the command line does; a console that dies, or
is not installed, changes nothing in training.
"""
