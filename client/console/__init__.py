"""The site's console: pages about its budget, its releases, its policy and its health, for people in a browser.

It reads what the node writes, in a process of its own; a console that dies, or is not installed, changes nothing in training.
"""
