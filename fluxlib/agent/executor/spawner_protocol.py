"""What the agent and its spawner say to each other, in marshal, over a SEQPACKET socket.

    to the spawner  ("run", id, argv, env, cwd, uid, gid, rlimits, execution_id)   with fds: output [, stdin]
                    ("run", id, …, execution_id, plan)                             with fds: output, cgroup [, stdin]
                    ("kill", id, signal)        to the whole tree
                    ("stop",)
                    ("large",)                  a request in a file, as the first fd: larger than the socket takes
    from it         ("ready", notes) or ("refused", step, errno) once, then lists of
                    ("started", id, pid, monotonic time)
                    ("failed", id, step, errno)
                    ("exit", id, status, cpu_seconds)

cpu_seconds is None with a plan: then the agent knows them of the cgroup.
"""

MAX_MESSAGE = 1 << 20
MAX_FDS = 4
