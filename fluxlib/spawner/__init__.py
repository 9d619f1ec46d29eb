"""The process that starts every program, and the sandboxes it starts them in.

Imports the standard library and itself only (an import contract sees to it): it runs as root, holds no network
connection and no store, and every page it uses is paid for by each clone.

The agent and the spawner speak marshal over a SEQPACKET socket. A request is a dictionary; "fds" names the descriptors
that come with it, in their order. Readers ignore fields they do not know and take a default for those that are missing.

    do: run      id argv env cwd uid gid rlimits execution code work tmp_bytes no_network trial
                 fds: stdin, stdout, and stderr (default: stdout), cgroup, listen (becomes descriptor 3)
    do: signal   id signal                  to the program and everything it has started
    do: ping     id                         answered by the same loop that starts programs
    do: stop
    do: large                               the request is in the file that comes as the first descriptor

The spawner greets with ("ready": version, notes) or ("refused": step, errno, version), then sends lists of events:

    event: started   id pid at              at: time.monotonic() before the clone
    event: failed    id step errno          it never became the program
    event: exit      id status cpu_seconds  cpu_seconds is None where a cgroup counts them
    event: pong      id
"""

# Raised when an agent of the previous version could misunderstand what a spawner says, or the other way round. After an
# upgrade a new spawner may come up under the old agent, which then says so instead of guessing.
VERSION = 1
MAX_MESSAGE = 1 << 20
MAX_FDS = 6
