"""A throw-away certificate for the loopback servers, made by openssl. It is its own CA."""

from __future__ import annotations

import ssl
import subprocess
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Tls:
    """Certificate and key files; the certificate must name 127.0.0.1 and 127.0.0.2."""

    cert: Path
    key: Path

    def context(self) -> ssl.SSLContext:
        """The server's side of it."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(self.cert, self.key)
        return context


def make_tls(directory: Path, *, names: str = "IP:127.0.0.1,IP:127.0.0.2,DNS:localhost") -> Tls:
    """A new key and a certificate that names the servers; trust its `cert` file to talk to them."""
    tls = Tls(directory / "cert.pem", directory / "key.pem")
    command = [
        "openssl",
        "req",
        "-x509",
        "-newkey",
        "ec",
        "-pkeyopt",
        "ec_paramgen_curve:prime256v1",
        "-nodes",
        "-days",
        "2",
        "-subj",
        "/CN=nvcache test",
    ]
    command += ["-addext", f"subjectAltName={names}", "-keyout", str(tls.key), "-out", str(tls.cert)]
    subprocess.run(command, check=True, capture_output=True, timeout=30)
    return tls
