"""BLAKE2 and SHA-256 without OpenSSL, which `hashlib` loads: 2.5 ms of every command.

As the standard library's own `random` has it: the lean module that hashlib is made of first, and
hashlib where an interpreter was built without it.
"""

try:
    from _blake2 import blake2s as _blake2s
except ImportError:
    from hashlib import blake2s as _blake2s

try:
    from _sha2 import sha256 as _sha256  # since Python 3.12
except ImportError:
    try:
        from _sha256 import sha256 as _sha256
    except ImportError:
        from hashlib import sha256 as _sha256


def blake2s(text: str) -> bytes:
    """32 bytes."""
    return _blake2s(text.encode()).digest()


def sha256(text: str) -> str:
    """64 hexadecimal digits."""
    digest: str = _sha256(text.encode()).hexdigest()
    return digest
