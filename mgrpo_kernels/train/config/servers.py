"""The URLs of ``--vllm-servers``, which are written to files and logs, and so must not contain a secret."""

from __future__ import annotations

import re


def split_urls(text: str | None) -> list[str]:
    """Return the URLs in an option's text."""
    return [] if text is None else [url.strip().rstrip("/") for url in text.split(",")]


def check_urls(text: str | None) -> None:
    """Raise ValueError unless all are different URLs without user, password or query. The error shows none of these."""
    urls = split_urls(text)
    shown = re.sub(r"[?#][^,\s]*", "?***", re.sub(r"//[^,\s]*@", "//***@", text or ""))
    if any(re.search(r"[@?#]", url) for url in urls):
        raise ValueError(
            f"vllm_servers: expected URLs without user, password or query, since they are written to files and logs, got {shown!r}: put "
            "the servers' key into VLLM_API_KEY, or the name of a file that contains it into VLLM_API_KEY_FILE"
        )
    if len(set(urls)) < len(urls) or not all(re.fullmatch(r"https?://[^/\s]+(/\S*)?", url) for url in urls):
        raise ValueError(
            f"vllm_servers: expected http://HOST:PORT, or several different ones separated by commas, got {shown!r}"
        )
