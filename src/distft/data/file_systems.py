"""The file systems behind addresses: fsspec's, and for S3 and Google Cloud Storage those of Arrow, which is there."""

from __future__ import annotations

import contextlib
import os
from datetime import timedelta
from typing import Any

_SILENT_S = 60
"""How long to wait for a server that says nothing."""


def file_system(address: str) -> tuple[Any, str]:
    """The fsspec file system of an address, and the path in it. `s3fs` and `gcsfs` are used if they are installed.

    Raises:
        ImportError, ValueError: the protocol needs a package that is not installed, or is unknown.
    """
    import fsspec

    protocol, _, path = address.partition("://")
    try:
        fsspec.get_filesystem_class(protocol)
    except ImportError:
        if protocol not in ARROW_READS:
            raise
        from fsspec.implementations.arrow import ArrowFSWrapper

        return ArrowFSWrapper(ARROW_READS[protocol](path.partition("/")[0]), skip_instance_cache=True), path
    options = _http_options() if protocol in ("http", "https") else {}
    system, path = fsspec.core.url_to_fs(address, skip_instance_cache=True, **options)
    return system, path


def _http_options() -> dict[str, Any]:
    import aiohttp

    # By default a download ends after 5 minutes, proxies are ignored, and `.gz` files may arrive uncompressed.
    return {
        "headers": {"Accept-Encoding": "identity"},
        "client_kwargs": {
            "timeout": aiohttp.ClientTimeout(total=None, sock_connect=_SILENT_S, sock_read=_SILENT_S),
            "trust_env": True,
            "auto_decompress": False,
        },
    }


def _s3(bucket: str) -> Any:
    from pyarrow.fs import S3FileSystem, resolve_s3_region

    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
    if not (endpoint or region):
        with contextlib.suppress(OSError):  # the request itself will say what is wrong
            region = resolve_s3_region(bucket)
    return S3FileSystem(
        anonymous=_configured("s3", "anon") == "true",
        region=region,
        endpoint_override=endpoint,
        connect_timeout=_SILENT_S,
        request_timeout=_SILENT_S,
    )


def _gcs(_: str) -> Any:
    from pyarrow.fs import GcsFileSystem

    anonymous = _configured("gs", "token") == "anon"
    return GcsFileSystem(anonymous=anonymous, retry_time_limit=timedelta(seconds=_SILENT_S))


def _configured(protocol: str, key: str) -> str:
    """An option of fsspec, as FSSPEC_S3_ANON=true or a file in its folder sets it."""
    from fsspec.config import conf

    return str(conf.get(protocol, {}).get(key, "")).lower()


ARROW_READS = {"s3": _s3, "s3a": _s3, "gs": _gcs, "gcs": _gcs}
"""Protocols that Arrow reads, by what makes the file system of a bucket."""
