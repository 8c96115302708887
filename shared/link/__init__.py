"""The link between coordinator and sites: what both ends must agree on.

Importing it limits TLS to version 1.3 (`shared.link.tls`), so it comes before whatever imports grpc, Flower included.
"""

from shared.link import tls

tls.allow_only_1_3()
