"""What consoles and the service of models share: sockets, TLS, connections that end, names of hosts."""
