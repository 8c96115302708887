"""A small run and a registry, as the registry's own tests have them."""

from tests.server.registry.conftest import filled, key_files, registry, small_run

__all__ = ["filled", "key_files", "registry", "small_run"]
