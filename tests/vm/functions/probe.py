#!/usr/bin/python3 -I
"""Tries what a function must not be able to do and says, as JSON, what came of each: "works" or an errno's name.

Arguments, as JSON: what the test put on the machine for it to find.
"""

import asyncio
import ctypes
import errno
import fcntl
import getpass
import json
import os
import pwd
import resource
import signal
import socket
import stat
import struct
import subprocess
import sys

libc = ctypes.CDLL(None, use_errno=True)
CLONE_NEWUSER, CLONE_NEWNS = 0x10000000, 0x20000
PTRACE_ATTACH = 16
BPF, IO_SETUP = {"x86_64": (321, 206), "aarch64": (280, 0)}[os.uname().machine]
AF_NETLINK, NETLINK_ROUTE, NETLINK_USERSOCK, NETLINK_SOCK_DIAG, SO_ATTACH_FILTER = 16, 0, 2, 4, 26
FLUX_PORT, AGENT_PORT = 7227, 50052
target = json.loads(sys.argv[1])
victim, agent = target["victim"], target["agent"]


def call(name, *arguments):
    ctypes.set_errno(0)
    if getattr(libc, name)(*arguments) < 0:
        raise OSError(ctypes.get_errno(), name)


def read(path):
    with open(path, "rb") as file:
        if not file.read(4096):
            raise OSError(errno.ENODATA, path)


def write(path, data="x"):
    with open(path, "w") as file:
        file.write(data)


def ptrace():
    call("ptrace", PTRACE_ATTACH, victim, None, None)
    os.waitpid(victim, 0)


def connect(address, family=socket.AF_UNIX):
    with socket.socket(family) as client:
        client.settimeout(5)
        client.connect(address)


def listen(address, family=socket.AF_INET):
    with socket.socket(family) as server:
        server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        server.bind(address)
        server.listen()


def share_standard_input():
    """Flags of an open file that others have too, /dev/null, would be seen by them."""
    if stat.S_ISFIFO(os.fstat(0).st_mode):
        raise OSError(errno.EPERM, "standard input")


def lock_a_file_of_the_machine():
    with open("/etc/passwd") as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def count_processes():
    """Without /proc: a number that exists is refused otherwise than one that does not."""
    try:
        os.kill(1, 0)
    except PermissionError:
        return


def hand_memory_on():
    """A memfd stays while anybody has it, also when its maker has ended and is charged no longer."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        memory = os.memfd_create("lab")
        socket.send_fds(ours, [b"x"], [memory])
        os.close(memory)
        os.close(socket.recv_fds(theirs, 1, 1)[1][0])


def tee():
    subprocess.run(["tee", "/dev/stdout", "/dev/stderr"], stdin=subprocess.DEVNULL, check=True)


def ssh():
    """It ends when it cannot find who it is."""
    subprocess.run(["ssh", "-G", "localhost"], capture_output=True, check=True)


def set_user_id(path):
    done = subprocess.run([path, "-u"], capture_output=True, text=True)
    if done.stdout.strip() != "0":
        raise OSError(errno.EPERM, path)


def own_cgroup():
    with open("/proc/self/cgroup") as file:
        return "/sys/fs/cgroup" + file.read().strip().split("::")[1]


def leave_cgroup():
    unit = os.path.dirname(os.path.dirname(own_cgroup()))
    write(os.path.join(unit, "agent/cgroup.procs"), str(os.getpid()))


def see_other_cgroups():
    found = [path for path, *_ in os.walk("/sys/fs/cgroup") if path.endswith(target["victim_execution"])]
    if not found:
        raise OSError(errno.ENOENT, "cgroup")


def read_memory_limit():
    read(os.path.join(own_cgroup(), "memory.max"))


def write_to_fifo():
    os.close(os.open("/var/lib/lab/fifo", os.O_RDWR | os.O_NONBLOCK))


def take_terminals():
    for _ in range(200):
        os.open("/dev/ptmx", os.O_RDWR | os.O_NOCTTY)


def netlink(protocol):
    socket.socket(AF_NETLINK, socket.SOCK_RAW, protocol).close()


def filter_of_a_socket():
    accept = ctypes.create_string_buffer(struct.pack("HBBI", 6, 0, 0, 0xFFFF))
    program = struct.pack("HL", 1, ctypes.addressof(accept))
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as one:
        one.setsockopt(socket.SOL_SOCKET, SO_ATTACH_FILTER, program)


def change_the_core_limit():
    before = resource.getrlimit(resource.RLIMIT_CORE)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if resource.getrlimit(resource.RLIMIT_CORE) == before:
        raise OSError(errno.EPERM, "core limit")


def crash():
    """Whether the machine's handler of crashes was started."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    pid = os.fork()
    if pid == 0:
        os.kill(os.getpid(), signal.SIGSEGV)
    if not os.WCOREDUMP(os.waitpid(pid, 0)[1]):
        raise OSError(errno.EPERM, "core dump")


def who_am_i():
    try:
        entry = pwd.getpwuid(os.getuid())
    except KeyError as error:
        raise OSError(errno.ENOENT, "account") from error
    if not entry.pw_name == os.environ["USER"] == os.environ["LOGNAME"] == getpass.getuser():
        raise OSError(errno.EINVAL, entry.pw_name)


def read_standard_input():
    async def read():
        reader = asyncio.StreamReader()
        protocol = asyncio.StreamReaderProtocol(reader)
        await asyncio.get_running_loop().connect_read_pipe(lambda: protocol, os.fdopen(os.dup(0)))
        await asyncio.wait_for(reader.read(), 20)

    asyncio.run(read())


def use_a_terminal():
    for fd in os.openpty():
        os.close(fd)


ATTACKS = {
    "inherit a descriptor": lambda: next(fd for fd in range(3, 64) if fd_is_open(fd)),
    # What honest functions need.
    "HONEST write to /tmp": lambda: write("/tmp/mine"),
    "HONEST write to TMPDIR": lambda: write(os.path.join(os.environ["TMPDIR"], "mine")),
    "HONEST write to HOME": lambda: write(os.path.join(os.environ["HOME"], "mine")),
    "HONEST write to /dev/null": lambda: write("/dev/null"),
    "HONEST use shared memory": lambda: write("/dev/shm/mine"),
    "HONEST run a program": lambda: subprocess.run(["/bin/true"], check=True),
    "HONEST start a thread": lambda: __import__("threading").Thread(target=int).start(),
    "HONEST resolve a name": lambda: socket.getaddrinfo("localhost", 80),
    "HONEST read its limits": lambda: read("/proc/self/limits"),
    "HONEST read its memory limit": read_memory_limit,
    "HONEST write to /dev/stdout": lambda: write("/dev/stdout", ""),
    "HONEST write to /dev/stderr": lambda: write("/dev/stderr", ""),
    "HONEST tee to /dev/stdout and /dev/stderr": tee,
    "HONEST read standard input in an event loop": read_standard_input,
    "HONEST know who it is": who_am_i,
    "HONEST ask whoami": lambda: subprocess.run(["whoami"], capture_output=True, check=True),
    "HONEST run ssh": ssh,
    "HONEST use a terminal": use_a_terminal,
    "HONEST ask for its personality": lambda: call("personality", 0xFFFFFFFF),
    "HONEST list network interfaces": lambda: netlink(NETLINK_ROUTE),
    # What no function may do; what changes this process itself comes last.
    "see another's process": lambda: os.stat(f"/proc/{victim}"),
    "read another's environment": lambda: read(f"/proc/{victim}/environ"),
    "read another's memory": lambda: read(f"/proc/{victim}/maps"),
    "trace another": ptrace,
    "kill another": lambda: os.kill(victim, signal.SIGCONT),
    "see the agent": lambda: os.stat(f"/proc/{agent}"),
    "kill the agent": lambda: os.kill(agent, 0),
    "read another's code": lambda: read(target["victim_code"]),
    "read another's work": lambda: read(target["victim_work"]),
    "read the agent's store": lambda: read(target["store"]),
    "read the agent's configuration": lambda: read("/etc/flux-agent/agent.yaml"),
    "read a world-readable file in /srv": lambda: read("/srv/public-secret.txt"),
    "connect to a socket in /run": lambda: connect("/run/lab.sock"),
    "connect to an abstract socket": lambda: connect("\0lab"),
    "connect to a local port": lambda: connect(("127.0.0.1", 22), socket.AF_INET),
    "connect to the agent's port": lambda: connect(("127.0.0.1", AGENT_PORT), socket.AF_INET),
    "listen on Flux's port": lambda: listen(("127.0.0.1", FLUX_PORT)),
    "listen on Flux's port by IPv6": lambda: listen(("::1", FLUX_PORT), socket.AF_INET6),
    "open a raw network socket": lambda: socket.socket(socket.AF_PACKET, socket.SOCK_RAW).close(),
    "attach to another's SysV memory": lambda: call("shmget", 0x1AB, 4096, 0),
    "leave SysV memory behind": lambda: call("shmget", 0x2AB, 4096, 0o1666),
    "change its own code": lambda: write(os.path.join(os.path.dirname(__file__), "probe.py")),
    "add to its own code": lambda: write(os.path.join(os.path.dirname(__file__), "new")),
    "write to /usr": lambda: write("/usr/local/lab"),
    "write to /var/tmp": lambda: write("/var/tmp/lab"),
    "write to a disk mounted later": lambda: write("/opt/lab-disk/lab"),
    "connect to a socket in /var/lib": lambda: connect("/var/lib/lab/socket"),
    "write to a FIFO in /var/lib": write_to_fifo,
    "take the machine's terminals": take_terminals,
    "fill netlink queues": lambda: netlink(NETLINK_USERSOCK),
    "list the machine's sockets": lambda: netlink(NETLINK_SOCK_DIAG),
    "use up the memory for compiled filters": filter_of_a_socket,
    "take a share of fs.aio-max-nr": lambda: call("syscall", IO_SETUP, 1, ctypes.byref(ctypes.c_ulong(0))),
    "change its limit of core dumps": change_the_core_limit,
    "have root handle its crash": crash,
    "say it is root's login": lambda: write("/proc/self/loginuid", "0"),
    "be spared when memory runs out": lambda: write("/proc/self/oom_score_adj", "0"),
    "share its standard input with others": share_standard_input,
    "lock a file of the machine": lock_a_file_of_the_machine,
    "count processes by their numbers": count_processes,
    "hand memory on to others": hand_memory_on,
    "leave its cgroup": leave_cgroup,
    "see other cgroups": see_other_cgroups,
    "read a disk": lambda: read("/dev/vda"),
    "set the clock": lambda: call("settimeofday", ctypes.byref((ctypes.c_long * 2)(0, 0)), None),
    "become root": lambda: os.setuid(0),
    "read the kernel's log": lambda: call("klogctl", 3, ctypes.create_string_buffer(64), 64),
    "set up io_uring": lambda: call("syscall", 425, 1, ctypes.create_string_buffer(120)),
    "load a BPF program": lambda: call("syscall", BPF, 5, ctypes.create_string_buffer(128), 128),
    "use a set-user-ID program": lambda: set_user_id("/usr/local/bin/lab-suid"),
    "open a user namespace": lambda: call("unshare", CLONE_NEWUSER),
    "open a mount namespace": lambda: call("unshare", CLONE_NEWNS),
}


def fd_is_open(fd):
    try:
        os.fstat(fd)
        return True
    except OSError:
        return False


def outcome(attack):
    try:
        attack()
        return "works"
    except OSError as error:
        return errno.errorcode.get(error.errno, str(error))
    except (StopIteration, subprocess.SubprocessError) as error:
        return type(error).__name__


with open("/proc/self/status") as file:
    status = dict(line.split(":", 1) for line in file)
sets = [int(status[f"Cap{kind}"], 16) for kind in ("Inh", "Prm", "Eff", "Amb")]
results = {
    "uid": os.getuid(),
    "groups": os.getgroups(),
    "capabilities": sum(sets),
    "bounding set": int(status["CapBnd"], 16),
    "no new privileges": int(status["NoNewPrivs"]),
}
try:
    results["found in /tmp"] = os.listdir("/tmp")
except PermissionError:
    results["found in /tmp"] = "EACCES"
results |= {name: outcome(attack) for name, attack in ATTACKS.items()}
json.dump(results, sys.stdout)
