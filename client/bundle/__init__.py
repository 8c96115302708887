"""Everything that a site without a network needs, in one folder: made where there is one, checked where there is none."""
