"""Every number of the link in one place, with the reason for it. Measured on loopback with grpcio 1.85.

gRPC takes options as pairs and of two with the same name the first wins, so they are kept in dictionaries.
"""

from __future__ import annotations

CHUNK_BYTES = 16 * 1024
"""Of a message, in one frame: half a second on a line of 256 kbit/s, so that an answer to a ping never waits long behind one."""
WINDOW_BYTES = 4 * CHUNK_BYTES
"""In flight before an acknowledgement: two seconds of such a line. More fills its buffers, and pings come
too late."""
MOST_WINDOW_BYTES = 2**20
"""In flight on a line that carries more (`shared.link.window`): 80 Mbit/s with a delay of 100 ms."""
MOST_FRAME_BYTES = 2 * CHUNK_BYTES
"""A frame that claims more ends the stream before it is read: a call of 400 MB costs nothing."""
MOST_MESSAGE_BYTES = 2**28
"""256 MB, more than any adapter here. What a site may reply is bounded far below, by what it was asked
(`server.link.mailroom`)."""

UPLOAD_SLOTS, UPLOAD_BYTES = 16, 64 * 2**20
"""So many sites upload at once; more, as long as all that they offered, and what waits to be fetched, fits into so many bytes. A
thousand with 30 KB do not wait for each other, and memory does not grow with the sites (a prototype without: 3.7 GB)."""
HELD_BYTES, FETCH_BYTES = 32 * 2**20, 8 * 2**20
"""Replies that nobody fetched yet; beyond, no further upload begins. So many bytes are fetched at once, or one reply: whoever
reads them has them three times."""

HELLO_SECONDS = 10.0
"""From the opening of a stream to its first frame."""
PROGRESS_SECONDS = 30.0
"""Without a single chunk or acknowledgement of a transfer that is under way, its stream ends. There is no limit on its length."""
FIRST_BACKOFF_SECONDS, LONGEST_BACKOFF_SECONDS = 0.2, 2.0
"""Of a site that connects again; refused ones wait the longest at once. A coordinator that is killed needs a second or two to
start: with both, all sites are back within five."""

_BOTH = {
    # Frames are small, so nobody has to hold more than one of a peer that does not keep to it.
    "grpc.max_receive_message_length": MOST_FRAME_BYTES,
    "grpc.max_send_message_length": MOST_FRAME_BYTES,
    "grpc.absolute_max_metadata_size": 16_384,
    # A dead peer is noticed after 8 s, in both directions: early enough for the status to say so within ten.
    "grpc.keepalive_time_ms": 4_000,
    "grpc.keepalive_timeout_ms": 4_000,
    # Without it a frozen process, whose kernel still acknowledges, is not noticed for a minute.
    "grpc.http2.ping_timeout_ms": 4_000,
    "grpc.keepalive_permit_without_calls": 1,
    # Probing for bandwidth grows the windows, and with them the memory and what is in flight on a slow line.
    "grpc.http2.bdp_probe": 0,
    # What is in flight is for `shared.link.window` to say; HTTP/2 must only not hold it back.
    "grpc.http2.lookahead_bytes": MOST_WINDOW_BYTES,
}

SERVER: dict[str, int | str] = {
    **_BOTH,
    # Idle connections without a certificate are closed by 6.7 s: 2,000 of them cost 41 MB until then. A limit on the number
    # of connections would shut honest sites out as well.
    "grpc.server_handshake_timeout_ms": 5_000,
    # Connections with a certificate and without a call.
    "grpc.max_connection_idle_ms": 60_000,
    # A site opens one stream, and now and then asks for the server's health.
    "grpc.max_concurrent_streams": 4,
    # The clients' pings must not be taken for an attack.
    "grpc.http2.min_ping_interval_without_data_ms": 3_000,
    "grpc.http2.max_ping_strikes": 0,
    # A second coordinator on the same port would get every other connection.
    "grpc.so_reuseport": 0,
    # grpc.max_connection_age_ms stays unset: it ends streams that are alive.
}

CLIENT: dict[str, int | str] = {
    **_BOTH,
    # As many pings as keep-alive wants, also while a site trains and sends nothing.
    "grpc.http2.max_pings_without_data": 0,
    # Every attempt has a channel of its own and waits by our rule; no earlier failure may slow it down.
    "grpc.use_local_subchannel_pool": 1,
    "grpc.initial_reconnect_backoff_ms": 200,
    # Also how long TCP and TLS may take: four round trips of 300 ms, and as much again for lost packets.
    "grpc.min_reconnect_backoff_ms": 5_000,
    "grpc.max_reconnect_backoff_ms": 5_000,
    "grpc.dns_min_time_between_resolutions_ms": 500,
}


def client_options(proxy: str | None) -> list[tuple[str, int | str]]:
    """Return the options of a site's channel, through the HTTP proxy that was named; one of the environment is never used."""
    through: dict[str, int | str] = {"grpc.enable_http_proxy": 0}
    if proxy is not None:
        through = {"grpc.enable_http_proxy": 1, "grpc.http_proxy": proxy}
    return list((CLIENT | through).items())
