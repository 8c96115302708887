"""De-identification: an optional pass that masks names, dates, numbers and addresses in a record before it is tokenised.

It is a complement to differential privacy, not a substitute: rules and recognisers miss what they do not know, so a masked text
is not anonymous. What bounds what a release tells about a record is the noise (docs/privacy.md); what masking does is keep the
plain identifiers that it finds out of memory, caches and the model's input.

    config.py       what is masked, and by which engine
    spans.py        places in a text, and how overlapping ones become one placeholder
    dates.py contacts.py identifiers.py ages.py names.py chinese_names.py   the rules, one idea each
    presidio.py     the names that Microsoft Presidio finds, where it is installed
    engine.py       one record in, one masked record out
    report.py       counts of what was masked; never what
    files.py        a whole file, masked into another
"""
