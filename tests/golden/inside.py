"""Started by `tests.golden.record` with one checkout on its path; records cases of that checkout.

It imports the recorder beside this file and then takes its own folder off the path, so that the
product can only come from the checkout.
"""

from __future__ import annotations

import sys

from recorder.main import main

if __name__ == "__main__":
    sys.path.pop(0)
    main(sys.argv[1:])
