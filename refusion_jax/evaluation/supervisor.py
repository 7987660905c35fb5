"""Runs one program and ends it and all that it started: the inner half of sandbox.py, a script of its own.

    python -I supervisor.py '{"folder": DIR, "token": TEXT, "seconds": 10, ...}' < PROGRAM

It prints one JSON object: {"passed": bool, "reason": text}. Where it may (as the first process of new namespaces), it
first makes all file systems read-only and puts a small one into `folder`.
"""

import contextlib
import ctypes
import json
import os
import resource
import signal
import subprocess
import sys
import time

POLL = 0.02  # seconds between two looks at what the program is doing
MS_RDONLY, MS_NOSUID, MS_NODEV, MS_REMOUNT, MS_BIND, MS_REC, MS_PRIVATE = 1, 2, 4, 32, 4096, 16384, 1 << 18
PR_SET_CHILD_SUBREAPER = 36
PAGE = os.sysconf("SC_PAGE_SIZE")


def main() -> None:
    order = json.loads(sys.argv[1])
    text = sys.stdin.buffer.read()
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)  # what the program leaves alone becomes a child of this process
    if os.getpid() == 1:
        confine(libc, order["folder"], order["disk"])
    os.chdir(order["folder"])
    with open("program.py", "wb") as file:
        file.write(text)
    read, write = os.pipe()
    os.set_inheritable(write, True)
    errors = os.memfd_create("errors")  # not in the folder, which may be full when there is something to say
    order["threads"] = threads_of_user()
    child = subprocess.Popen(
        [sys.executable, "-I", "program.py", str(write)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=errors,
        pass_fds=[write],
        # Without namespaces it stays in this process's session, which whoever started that kills as a whole.
        start_new_session=os.getpid() == 1,
        preexec_fn=lambda: limit(order),
    )
    os.close(write)
    reason = watch(child, order)
    os.set_blocking(read, False)
    said = b""
    with contextlib.suppress(BlockingIOError):
        said = os.read(read, 4096)
    passed = not reason and not child.returncode and said.startswith(order["token"].encode())
    if not passed and not reason:
        reason = last_error(errors, child.returncode) if child.returncode else "ended before its last line"
    print(json.dumps({"passed": passed, "reason": reason or ""}), flush=True)
    end_all()


def confine(libc: ctypes.CDLL, folder: str, disk: int) -> None:
    """A small file system in `folder`; all others read-only. What the system does not allow is left as it is."""
    mount = lambda source, target, kind, flags, data: libc.mount(
        source, target.encode(), kind, ctypes.c_ulong(flags), data
    )
    mount(None, "/", None, MS_REC | MS_PRIVATE, None)
    with open("/proc/self/mountinfo") as file:
        places = [line.split()[4].encode().decode("unicode_escape") for line in file]
    for place in places:
        for kept in (0, MS_NOSUID, MS_NODEV, MS_NOSUID | MS_NODEV, MS_NOSUID | MS_NODEV | 8, 1024 | MS_NOSUID):
            # Flags that the owner of the file system has set must be repeated: the first combination that fits.
            if not mount(None, place, None, MS_REMOUNT | MS_BIND | MS_RDONLY | kept, None):
                break
    mount(b"tmpfs", folder, b"tmpfs", MS_NOSUID | MS_NODEV, f"size={disk},nr_inodes=4096".encode())


def limit(order: dict) -> None:
    """Limits of the program, before it starts; it cannot raise them."""
    for kind, value in {
        resource.RLIMIT_CPU: int(order["seconds"]) + 1,
        resource.RLIMIT_AS: order["memory"],
        resource.RLIMIT_FSIZE: order["disk"],
        resource.RLIMIT_NOFILE: 64,
        # The kernel's own limit, for what forks faster than it can be watched; it does not bind root.
        resource.RLIMIT_NPROC: order["threads"] + 4 * order["processes"],
        resource.RLIMIT_CORE: 0,
    }.items():
        hard = resource.getrlimit(kind)[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)  # a limit that is lower already stays
        resource.setrlimit(kind, (value, value))
    os.nice(10)  # whatever it does, the supervisor gets to see it


def threads_of_user() -> int:
    """Threads that this user has, of all programs."""
    found = 0
    for name in os.listdir("/proc"):
        with contextlib.suppress(OSError):
            if name.isdigit() and os.stat(f"/proc/{name}").st_uid == os.getuid():
                found += len(os.listdir(f"/proc/{name}/task"))
    return found


def watch(child: subprocess.Popen, order: dict) -> str:
    """Waits for the program's end; the reason why it must be ended before, if it must."""
    end = time.monotonic() + order["seconds"]
    while child.poll() is None:
        if time.monotonic() > end:
            return f"took longer than {order['seconds']:g} s"
        family = descendants()
        if len(family) > order["processes"]:
            return f"started more than {order['processes']} processes"
        if sum(family.values()) > order["memory"]:
            return f"took more than {order['memory'] >> 20} MB of memory"
        if size_of(".") > order["disk"]:
            return f"wrote more than {order['disk'] >> 20} MB"
        time.sleep(POLL)
    return ""


def descendants() -> dict[int, int]:
    """Bytes in memory of all processes below this one, by their number in /proc."""
    parent, memory = {}, {}
    for name in os.listdir("/proc"):
        if name.isdigit():
            with contextlib.suppress(OSError, ValueError, IndexError):
                with open(f"/proc/{name}/stat") as file:
                    fields = file.read().rpartition(")")[2].split()
                parent[int(name)], memory[int(name)] = int(fields[1]), int(fields[21]) * PAGE
    found, new = set(), {int(os.readlink("/proc/self"))}
    while new:
        new = {child for child, of in parent.items() if of in new} - found
        found |= new
    return {number: memory[number] for number in found}


def size_of(folder: str) -> int:
    """Bytes of all files below a folder."""
    total = 0
    for place, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(OSError):
                total += os.lstat(os.path.join(place, name)).st_blocks * 512
    return total


def end_all() -> None:
    """Kills everything below this process and, without namespaces, this process too."""
    if os.getpid() == 1:
        return  # what is in the namespace ends with its first process
    for number in (signal.SIGSTOP, signal.SIGKILL):  # stopped first, so that nothing new is started meanwhile
        done: set[int] = set()
        for _ in range(10):  # a program that forks faster is of this group: see below
            new = descendants().keys() - done
            for process in new:
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.kill(process, number)
            done |= new
    os.killpg(0, signal.SIGKILL)


def last_error(errors: int, code: int) -> str:
    """The last line that the program wrote to stderr; what ended it if it wrote none."""
    size = os.fstat(errors).st_size
    lines = os.pread(errors, 4000, max(0, size - 4000)).decode(errors="replace").strip().splitlines()
    if code < 0 or not lines:
        return f"ended by {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"
    return lines[-1][:300]


if __name__ == "__main__":
    main()
