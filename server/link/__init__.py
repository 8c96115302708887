"""The coordinator's end of the link."""

import shared.link  # noqa: F401  (before anything imports grpc)
