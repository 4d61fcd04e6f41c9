"""What must not travel: files that hold keys, by name and by content, and known secret values in any text."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterable, Mapping
from pathlib import PurePosixPath
from urllib.parse import urlsplit

_NAMES = (
    *(
        ".env",
        ".env.*",
        "*.env",
        ".netrc",
        ".pypirc",
        ".npmrc",
        ".pgpass",
        ".git-credentials",
        ".htpasswd",
        ".dockercfg",
    ),
    *("*.pem", "*.key", "*.p12", "*.pfx", "*.jks", "*.keystore", "*.kdbx", "id_rsa*", "id_ecdsa*", "id_ed25519*"),
    *("*credentials*.json", "*service_account*.json", "*service-account*.json", "client_secret*.json", "kubeconfig"),
)
_FOLDERS = frozenset({".ssh", ".aws", ".gnupg", ".azure", ".gcloud", ".kube", ".docker", ".beaker", "secrets"})
_SAMPLES = ("*.example", "*.sample", "*.template", "*.pub")

# An environment variable of such a name holds a value that nobody else may see.
_SECRET_VARIABLE = re.compile(
    r"TOKEN|SECRET|PASSW|PASSPHRASE|API_?KEY|ACCESS_?KEY|PRIVATE_?KEY|(^|_)KEY$|CREDENTIAL|(^|_)PAT$", re.IGNORECASE
)
_SHORTEST = 8

# Forms that are keys wherever they stand, each with what it is. The texts are put together here so that this file
# itself is not taken for one.
_FORMS = {
    "a private key": re.compile(rb"-----" + rb"BEGIN (?:[A-Z]+ )*PRIVATE KEY" + rb"-----"),
    "an AWS access key": re.compile(rb"\b(?:AKIA|ASIA)[A-Z0-9]{16}\b"),
    "a GitHub token": re.compile(rb"\b(?:gh[pousr]_[A-Za-z0-9]{36}|github_pat_[A-Za-z0-9_]{60})"),
    "a Hugging Face token": re.compile(rb"\bhf_[A-Za-z0-9]{34}\b"),
    "a Google API key": re.compile(rb"\bAIza[A-Za-z0-9_-]{35}\b"),
    "a Slack token": re.compile(rb"\bxox[abprs]-[A-Za-z0-9-]{20,}"),
}
_IN_URL = re.compile(r"(?P<scheme>[A-Za-z][A-Za-z0-9+.-]*://)[^/\s@'\"]+@")
HIDDEN = "***"


def is_secret_name(name: str) -> bool:
    """Whether a file's name says that it holds a secret; samples (``.env.example``) and public keys do not."""
    path = PurePosixPath(name)
    base = path.name.lower()
    if any(fnmatch.fnmatch(base, pattern) for pattern in _SAMPLES):
        return False
    return any(part in _FOLDERS for part in path.parts[:-1]) or any(
        fnmatch.fnmatch(base, pattern) for pattern in _NAMES
    )


def is_secret_variable(name: str) -> bool:
    """Whether the name of an environment variable says that its value is a secret."""
    return _SECRET_VARIABLE.search(name) is not None


def secret_values(
    environment: Mapping[str, str], *, texts: Iterable[str] = (), urls: Iterable[str] = ()
) -> frozenset[str]:
    """The secret values that this machine knows of.

    Args:
        environment: variables and their values; those whose name speaks of a secret count.
        texts: contents of ``.env`` files, whose lines are taken in the same way.
        urls: addresses that may carry a user's token, as git remotes do.

    Returns:
        the values. Short ones, switches and paths are left out: they would be found everywhere.
    """
    pairs = [*environment.items(), *(pair for text in texts for pair in _assignments(text))]
    found = {value for name, value in pairs if is_secret_variable(name)}
    for url in urls:
        parts = urlsplit(url)
        found |= {part for part in (parts.password, parts.username if parts.password is None else None) if part}
    return frozenset(value for value in found if _telling(value))


def _assignments(text: str) -> list[tuple[str, str]]:
    pairs = []
    for line in text.splitlines():
        name, equals, value = line.strip().removeprefix("export ").partition("=")
        if equals and not name.startswith("#"):
            pairs.append((name.strip(), value.strip().strip("'\"")))
    return pairs


def _telling(value: str) -> bool:
    plain = value.startswith(("/", "~", "./", "${")) or "://" in value or re.fullmatch(r"[a-z]+|[A-Z]+|\d{1,11}", value)
    return len(value) >= _SHORTEST and not plain and not any(c.isspace() for c in value)


def find_secret(content: bytes, known: Iterable[str]) -> str | None:
    """What kind of secret a file holds, in words without the secret; None when none is found."""
    for what, form in _FORMS.items():
        if form.search(content):
            return what
    if any(value.encode() in content for value in known):
        return "the value of a secret of this machine's environment or .env"
    return None


def holds_login(text: str) -> bool:
    """Whether a URL in a text has a user or password in it."""
    return _IN_URL.search(text) is not None


def redact(text: str, known: Iterable[str]) -> str:
    """A text without known secrets, keys, and users and passwords in URLs."""
    for value in sorted(known, key=lambda value: (-len(value), value)):
        text = text.replace(value, HIDDEN)
    for form in _FORMS.values():
        text = re.sub(form.pattern.decode(), HIDDEN, text)
    return _IN_URL.sub(rf"\g<scheme>{HIDDEN}@", text)
