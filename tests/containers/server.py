"""PID 1 of the machine that rootless podman runs on; `engine.py` starts it and talks to it.

Goal: podman's containers, storage and pause process, and what its set-up needs, without a change of
the machine that the tests run on. Everything is in namespaces that end with this process, and all
files are on a tmpfs in its mount namespace.

    engine.py ──exec──▶ server: unshare ──fork──▶ PID 1: mounts; runs what it reads

- /sys/fs/cgroup becomes a plain cgroup2 mount where it isn't one: podman runs on no other here.
- As root, podman runs as a user that only this mount namespace's /etc/passwd and /etc/subuid
  know, with 65,536 subordinate ids, and makes its user namespace by newuidmap as for anyone.
- As an ordinary user there is no way to those mounts but a user namespace. So that is made here,
  with the user's subordinate ids as far as he has any, and podman is told
  (_CONTAINERS_USERNS_CONFIGURED) that it is in the one that it would have made.
- The network namespace has nothing but lo: no container reaches anything outside.

End of input ends it, and the kernel then ends all others of the PID namespace.

Input and output are lines of JSON: first {"refused": why} or {"refused": ""}, then for each argv
{"status": ..., "output": ...}.
"""

import json
import os
import pwd
import subprocess
import sys
from pathlib import Path
from typing import Any

from netorch.system import namespaces as ns

NEWCGROUP = 0x02000000
CGROUP = Path("/sys/fs/cgroup")
USER = "netorch-containers"
_SECONDS = 300  # for one command
_KINDS = ns.NEWNS | ns.NEWPID | ns.NEWNET | NEWCGROUP


def main() -> None:
    scratch, *shared = map(Path, sys.argv[1:])
    uid, gid = os.geteuid(), os.getegid()
    what = "namespaces"
    try:
        _own_namespaces(uid, gid)
        child = os.fork()
        if child:
            sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
        what = "mounts"
        _propagation()
        ns.mount("proc", "/proc", "proc")
        _cgroup2()
        ns.loopback_up()
    except OSError as error:
        answer(refused=f"no {what} for podman here, as uid {uid}: {error}")
        return
    _files(scratch, shared)
    if uid == 0:
        run_as = _invented_user(scratch)
        environment = {"USER": USER}
    else:
        run_as = 0
        environment = {
            "_CONTAINERS_USERNS_CONFIGURED": "done",
            "_CONTAINERS_ROOTLESS_UID": str(uid),
            "_CONTAINERS_ROOTLESS_GID": str(gid),
        }
    answer(refused="")
    serve(scratch, run_as, environment)


def answer(**values: object) -> None:
    sys.stdout.write(json.dumps(values) + "\n")
    sys.stdout.flush()


def serve(scratch: Path, run_as: int, environment: dict[str, str]) -> None:
    identity: dict[str, Any] = {}
    if run_as:
        identity = {"user": run_as, "group": run_as, "extra_groups": []}
        for directory in scratch.iterdir():
            if directory.name != "share":
                os.chown(directory, run_as, run_as)
    environment |= {
        "HOME": str(scratch / "home"),
        "XDG_RUNTIME_DIR": str(scratch / "runtime"),
        "TMPDIR": str(scratch / "tmp"),
        "PATH": "/usr/local/bin:/usr/bin:/bin:/usr/local/sbin:/usr/sbin:/sbin",
    }
    for line in sys.stdin:
        # Into a file: conmon keeps a pipe open for as long as its container runs.
        with (scratch / "output").open("w+") as output:
            started = subprocess.Popen(
                json.loads(line),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=environment,
                cwd=scratch,
                **identity,
            )
            try:
                status = started.wait(_SECONDS)
            except subprocess.TimeoutExpired:
                started.kill()
                status = started.wait()
            output.seek(0)
            answer(status=status, output=output.read())


def _own_namespaces(uid: int, gid: int) -> None:
    if uid == 0:
        ns.unshare(_KINDS)
        return
    waiting, ready = os.pipe()
    pid = os.getpid()
    mapper = os.fork()
    if mapper == 0:
        mapped = False
        try:
            os.close(ready)
            os.read(waiting, 1)
            mapped = _map_many(pid, uid, gid)
        finally:  # whatever happens: what is above is not this process's to go on with
            os._exit(0 if mapped else 1)
    ns.unshare(_KINDS | ns.NEWUSER)
    os.close(ready)
    if os.waitpid(mapper, 0)[1] != 0:
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/uid_map").write_text(f"0 {uid} 1")
        Path("/proc/self/gid_map").write_text(f"0 {gid} 1")


def _map_many(pid: int, uid: int, gid: int) -> bool:
    """Map the user's subordinate ids by newuidmap, if he has some."""
    user = pwd.getpwuid(uid).pw_name
    for kind, own in (("u", uid), ("g", gid)):
        lines = Path(f"/etc/sub{kind}id").read_text().splitlines()
        ranges = [line.split(":")[1:] for line in lines if line.startswith(f"{user}:")]
        if not ranges:
            return False
        argv = [f"new{kind}idmap", str(pid), "0", str(own), "1", "1", *ranges[0]]
        subprocess.run(argv, check=True)
    return True


def _propagation() -> None:
    """Nothing comes out of here; shared below, as podman likes to have it."""
    ns.mount(None, "/", flags=ns.MS_REC | ns.MS_SLAVE)
    ns.mount(None, "/", flags=ns.MS_REC | ns.MS_SHARED)


def _cgroup2() -> None:
    mounts = [line.split() for line in Path("/proc/self/mountinfo").read_text().splitlines()]
    kinds = [fields[fields.index("-") + 1] for fields in mounts if fields[4] == str(CGROUP)]
    if kinds[-1:] != ["cgroup2"]:
        ns.mount("cgroup2", CGROUP, "cgroup2")


def _files(scratch: Path, shared: list[Path]) -> None:
    """A tmpfs with podman's directories, and `shared` in it where podman's user can read them."""
    ns.mount("tmpfs", scratch, "tmpfs", data="mode=0755")
    for name in ("home", "runtime", "tmp", "share"):
        (scratch / name).mkdir()
    for number, directory in enumerate(shared):
        target = scratch / "share" / str(number)
        target.mkdir()
        ns.mount(directory, target, flags=ns.MS_BIND | ns.MS_REC)


def _invented_user(scratch: Path) -> int:
    """An ordinary user who exists in this mount namespace only; his id, and his group's."""
    taken = {line.split(":")[2] for line in Path("/etc/passwd").read_text().splitlines()}
    uid = next(number for number in range(40000, 60000) if str(number) not in taken)
    for name, line in (
        ("passwd", f"{USER}:x:{uid}:{uid}::{scratch / 'home'}:/bin/sh"),
        ("group", f"{USER}:x:{uid}:"),
        ("subuid", f"{USER}:100000:65536"),
        ("subgid", f"{USER}:100000:65536"),
    ):
        path = Path("/etc", name)
        own = scratch / "share" / name
        own.write_text(
            f"{path.read_text()}{line}\n" if name in ("passwd", "group") else f"{line}\n"
        )
        if path.exists():
            ns.mount(own, path, flags=ns.MS_BIND)
    return uid


if __name__ == "__main__":
    main()
