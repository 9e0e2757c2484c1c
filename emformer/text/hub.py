"""Is the hub there? Asked in at most two seconds: without network a run fails at once and not after many retries."""

from __future__ import annotations

import os
import socket
import threading
import urllib.request
from collections.abc import Generator
from contextlib import contextmanager
from urllib.parse import urlsplit

TRUE = {"1", "ON", "YES", "TRUE"}


def reachable(seconds: float = 2.0) -> bool:
    """Whether a TCP connection to the hub (`HF_ENDPOINT`, or the proxy that leads to it) opens within `seconds`.

    False without any probe where `HF_HUB_OFFLINE`, `HF_DATASETS_OFFLINE` or `TRANSFORMERS_OFFLINE` is set.
    """
    switches = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE")
    if any(os.environ.get(name, "").upper() in TRUE for name in switches):
        return False
    endpoint = urlsplit(os.environ.get("HF_ENDPOINT") or "https://huggingface.co")
    proxy = urllib.request.getproxies().get(endpoint.scheme)
    if proxy and not urllib.request.proxy_bypass(endpoint.hostname or ""):
        endpoint = urlsplit(proxy if "//" in proxy else f"//{proxy}", scheme="http")
    try:
        address = endpoint.hostname or "", endpoint.port or (80 if endpoint.scheme == "http" else 443)
    except ValueError:  # a port that is no number
        return False

    opened = threading.Event()

    def probe() -> None:
        try:
            socket.create_connection(address, timeout=seconds).close()
        except OSError:
            return
        opened.set()

    # In a thread, because a name server that does not answer ignores the timeout of the connection.
    thread = threading.Thread(target=probe, daemon=True)
    thread.start()
    thread.join(seconds)
    return opened.is_set()


@contextmanager
def offline() -> Generator[None, None, None]:
    """While inside, `datasets` and `huggingface_hub` look into their local cache only and never retry."""
    import datasets.config
    import huggingface_hub.constants

    modules = (datasets.config, huggingface_hub.constants)
    before = [module.HF_HUB_OFFLINE for module in modules]
    for module in modules:
        module.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        for module, value in zip(modules, before, strict=True):
            module.HF_HUB_OFFLINE = value
