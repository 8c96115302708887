"""`silotune new`: from a file of records to a scenario that works; one idea a file.

`question` is what was asked, `looking` what the records are, `rule` which settings follow from public counts, `document` the file
that is written, `writing` all of it in order.
"""
