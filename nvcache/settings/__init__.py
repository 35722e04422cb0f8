"""The settings: one frozen object from defaults, a TOML file, the environment and flags, in that order of precedence. Where a client finds
the daemon is `environment`'s matter.

Every scalar setting `name` is `NVCACHE_NAME` in the environment; lists are separated by commas there. The ecosystem's own variables (`HF_ENDPOINT`,
`HF_TOKEN`, `HF_TOKEN_PATH`, `HTTPS_PROXY`, `NO_PROXY`, `SSL_CERT_FILE`) are honoured and rank below nvcache's.
Secrets are never kept here: tokens are named by file and read when needed.
"""

from __future__ import annotations

from nvcache.settings.daemon import LISTS, LIVE, SIZES, TABLES, MirrorSetting, ModelSetting, Settings
from nvcache.settings.disks import DiskSettings, QueueSettings, TuningSettings
from nvcache.settings.gather import Given
from nvcache.settings.load import load, take
from nvcache.settings.outside import azure_access, child_environment, hub_token, proxies, proxy_hosts, source_transport, traces_wanted
from nvcache.settings.sizes import format_size, parse_size

__all__ = [
    "LISTS",
    "LIVE",
    "SIZES",
    "TABLES",
    "DiskSettings",
    "Given",
    "MirrorSetting",
    "ModelSetting",
    "QueueSettings",
    "Settings",
    "TuningSettings",
    "azure_access",
    "child_environment",
    "format_size",
    "hub_token",
    "load",
    "parse_size",
    "proxies",
    "proxy_hosts",
    "source_transport",
    "take",
    "traces_wanted",
]
