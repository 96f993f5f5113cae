"""The kernel's refusals in our words: what failed, on which object, why, and what to do."""

import errno
from collections.abc import Callable

from netorch.errors import KernelError, MissingError, NetorchError
from netorch.resources import Bridge, Rate, Resource, Tap, Veth

_MODULES: dict[type[Resource], str] = {Bridge: "bridge", Tap: "tun", Veth: "veth", Rate: "ifb"}


def refusal(verb: str, resource: Resource, error: KernelError) -> NetorchError:
    """The error that says "failed to create tap vm1-0: Operation not permitted" and what to do."""
    message = f"failed to {verb} {_named(resource)}: {error.message}"
    advise = _ADVICE.get(error.errno)
    hint = advise(resource) if advise else ""
    if error.errno in (errno.EOPNOTSUPP, errno.ENXIO):
        return MissingError(message, hint)
    return KernelError(message, error.errno, hint)


def _named(resource: Resource) -> str:
    assert isinstance(resource, Bridge | Tap | Veth | Rate)
    return f"{type(resource).__name__.lower()} {resource.name}"


def _missing(resource: Resource) -> str:
    module = _MODULES[type(resource)]
    return f"the kernel has no {module} driver here: load it with `modprobe {module}`"


def _denied(_resource: Resource) -> str:
    return "this needs CAP_NET_ADMIN over the network namespace; `--private` makes one of its own"


def _invalid(resource: Resource) -> str:
    if isinstance(resource, Tap) and resource.owner:
        return (
            f"uid {resource.owner} may be unknown here: a private place has only that of its owner"
        )
    return ""


def _taken(_resource: Resource) -> str:
    return "another link has taken the name; `ip -d link` shows whose it is"


_ADVICE: dict[int, Callable[[Resource], str]] = {
    errno.EOPNOTSUPP: _missing,
    errno.ENXIO: _missing,
    errno.EPERM: _denied,
    errno.EACCES: _denied,
    errno.EINVAL: _invalid,
    errno.EEXIST: _taken,
    errno.EBUSY: _taken,
    errno.EXFULL: lambda _: "a bridge takes at most 1,023 ports; use a second network",
    errno.EMFILE: lambda _: "too many open files: raise `ulimit -n`",
}
