"""The exit codes of all commands, and those after which a supervisor does not restart."""

DONE = 0
FOUND = 1  # a command that looks for faults found one; also an error nobody expected
BAD_INPUT = 2  # argparse's and tyro's, too
DIVERGED = 3
HANG = 4
STORAGE = 5
PEERS_LOST = 6  # another process or host of the run is gone: restart all of them
BROKEN_PIPE = 141  # the reader of the output has closed it, as of a program that SIGPIPE ends
PREEMPTED = 42  # stopped early, and what was done is saved: run the same command to resume

FINAL = (DONE, BAD_INPUT, DIVERGED, PREEMPTED)  # a restart does not help or is not wanted
