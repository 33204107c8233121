"""The exit codes of all commands, and those after which a supervisor does not restart."""

DONE = 0  # the command did what it was asked for
FOUND = 1  # a command that looks for faults found one; also an error nobody expected
BAD_INPUT = 2  # wrong arguments, config or data; argparse and tyro use it, too
DIVERGED = 3  # the loss diverged again after each return to an earlier checkpoint
HANG = 4  # a step, or a wait for data, took too long
STORAGE = 5  # a disk is full, or a disk or a store cannot be read or written
PEERS_LOST = 6  # another process or host of the run is gone: restart all of them
BROKEN_PIPE = 141  # the reader of the output has closed it, as of a program that SIGPIPE ends
PREEMPTED = 42  # stopped early, and what was done is saved: run the same command to resume

FINAL = (DONE, BAD_INPUT, DIVERGED, PREEMPTED)  # a restart does not help or is not wanted
